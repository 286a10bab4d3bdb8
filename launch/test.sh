#!/usr/bin/env bash
# Creates the environment, checks style and types, runs the tests.
#
#   bash launch/test.sh [--full] [ARGUMENTS OF pytest]
#   bash launch/test.sh --lifecycle [ARGUMENTS OF pytest]
#
# --full adds the tests marked `full`.  With arguments for pytest, only pytest runs.  --lifecycle
# runs only the tests marked `lifecycle`: those that need torch, transformers or wandb, which it
# installs, those of whole runs, and the long halves of test matrices.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

full="" lifecycle=""
for argument in "$@"; do  # rotates the arguments once and drops our own flags
  shift
  case "$argument" in
    --full) full=1 ;;
    --lifecycle) lifecycle=1 ;;
    *) set -- "$@" "$argument" ;;
  esac
done

if [ -n "$lifecycle" ]; then
  ensure_env test data plan wandb lifecycle
else
  ensure_env test data dev plan
fi
cd "$ROOT" || exit 1
# If it is set, each of the hundred processes that tests start compiles our sources again.
unset PYTHONDONTWRITEBYTECODE
export PATH="$VENV/bin:$PATH" JAX_PLATFORMS=cpu PYRIGHT_PYTHON_IGNORE_WARNINGS=1

stage() {
  local title="$1" started=$SECONDS code=0
  shift
  say "$title ..."
  "$@" </dev/null || code=$?
  [ "$code" -eq 0 ] || die "FAILED: $title (exit code $code, after $((SECONDS - started)) s)."
  say "$title: passed in $((SECONDS - started)) s"
}

if [ $# -eq 0 ] && [ -z "$lifecycle" ]; then
  stage "ruff check" ruff check .
  stage "ruff format" ruff format --check .
  # At the same time as pytest, which leaves a core idle in its first minute, the collection.
  types="$(mktemp)"
  stage "pyright" pyright --level error --pythonpath "$VENV_PYTHON" >"$types" 2>&1 &
  pyright=$!
  trap 'kill "$pyright" 2>/dev/null; rm -f "$types"' EXIT
fi

marks=("not lifecycle")
[ -z "$lifecycle" ] || marks=("lifecycle")
[ -n "$full" ] || marks+=("not full")
# Only on the cluster that .ci/slurm.sh starts: tests must not submit jobs to a real one.
if [ -z "$lifecycle" ] && ! scontrol show config 2>/dev/null | grep -q '^ClusterName *= moe-jax-test$'; then
  say "Slurm's test cluster is not running (.ci/slurm.sh starts it): its tests are skipped"
  marks+=("not slurm")
fi
expression="$(printf ' and %s' "${marks[@]}")"
# Three workers on two cores: a test that waits for the processes it started leaves a core idle.
stage "pytest${full:+, every test}" python -m pytest -n 3 --dist=loadfile -m "${expression# and }" "$@"
if [ -n "${pyright:-}" ]; then
  code=0
  wait "$pyright" || code=$?
  cat "$types"
  exit "$code"
fi
