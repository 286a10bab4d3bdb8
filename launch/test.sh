#!/usr/bin/env bash
# Makes the environment, checks style and types, runs the tests.
#
#   bash launch/test.sh [--full] [ARGUMENTS OF pytest]
#   bash launch/test.sh --lifecycle [ARGUMENTS OF pytest]
#
# --full adds the long forms.  With arguments for pytest only pytest runs.  --lifecycle runs the
# tests that need torch, transformers or wandb, which it installs, those that live a run through, and
# the long halves of matrices, and no others.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

full="" lifecycle=""
for argument in "$@"; do  # rotates the arguments once, leaving our own flags out
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
# Where it is set, each of the hundred processes that tests start compiles our sources again.
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
  # Beside pytest, whose first minute collects tests in processes that wait for each other.
  types="$(mktemp)"
  stage "pyright" pyright --level error --pythonpath "$VENV_PYTHON" >"$types" 2>&1 &
  pyright=$!
  trap 'kill "$pyright" 2>/dev/null; rm -f "$types"' EXIT
fi

marks=("not lifecycle")
[ -z "$lifecycle" ] || marks=("lifecycle")
[ -n "$full" ] || marks+=("not full")
# Only on the cluster that .ci/slurm.sh makes: nobody's own gets jobs from a test.
if [ -z "$lifecycle" ] && ! scontrol show config 2>/dev/null | grep -q '^ClusterName *= moe-jax-test$'; then
  say "Slurm's test cluster is not running (.ci/slurm.sh starts it): its tests are left out"
  marks+=("not slurm")
fi
expression="$(printf ' and %s' "${marks[@]}")"
# Three workers: tests that wait for processes of their own leave a core free.
stage "pytest${full:+, every test}" python -m pytest -n 3 --dist=loadfile -m "${expression# and }" "$@"
if [ -n "${pyright:-}" ]; then
  code=0
  wait "$pyright" || code=$?
  cat "$types"
  exit "$code"
fi
