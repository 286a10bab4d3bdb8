#!/usr/bin/env bash
# Trains configs/tiny.py on this machine: creates the environment, trains, prints what to do next.
#
#   bash launch/local.sh [FLAGS OF python -m moe_jax train]
#
# --config and --workdir are optional here.  The exit code is the trainer's.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Paths are relative in the root of the checkout and absolute anywhere else.
prefix="$ROOT/"
[ "$(pwd -P)" = "$ROOT" ] && prefix=""
config=""
workdir=""
given=""  # the flag whose value is the next argument
for argument in "$@"; do
  case "$given" in
    config) config="$argument" ;;
    workdir) workdir="$argument" ;;
  esac
  given=""
  case "$argument" in
    --config=* | -config=*) config="${argument#*=}" ;;
    --workdir=* | -workdir=*) workdir="${argument#*=}" ;;
    --config | -config) given=config ;;
    --workdir | -workdir) given=workdir ;;
  esac
done
if [ -z "$workdir" ]; then
  workdir="${prefix}runs/tiny"
  set -- --workdir="$workdir" "$@"
fi
if [ -z "$config" ]; then
  config="${prefix}configs/tiny.py"
  set -- --config="$config" "$@"
fi

ensure_env
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

# The trainer runs in the background, because bash would handle a signal only after a command in
# the foreground has ended.  SIGTERM and Ctrl-C reach it as SIGTERM: it saves a checkpoint and exits
# with 42.
"$VENV_PYTHON" -m moe_jax train "$@" &
trainer=$!
trap 'kill -TERM "$trainer" 2>/dev/null' TERM INT
code=0
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do  # a trapped signal ended the wait, not the trainer
  code=0
  wait "$trainer" || code=$?
done
trap - TERM INT

case "$code" in
  0) ;;
  42)
    say "stopped; the same command resumes from the newest checkpoint."
    exit 42
    ;;
  *)
    say "the trainer ended with exit code $code; its last lines give the reason." >&2
    exit "$code"
    ;;
esac

q() { printf '%q' "$1"; }  # quoted for a shell

# Prints the arguments after --, quoted for a shell, without the flags named before it.
without() {
  local names=" " value="" argument name
  while [ "$1" != -- ]; do
    names="$names$1 "
    shift
  done
  shift
  for argument in "$@"; do
    name="${argument%%=*}"
    name="${name#-}"
    if [ -n "$value" ]; then
      value=""  # the value of a flag that is left out
    elif [ "${argument#-}" != "$argument" ] && [ "${names#* "${name#-}" }" != "$names" ]; then
      [ "${argument#*=}" != "$argument" ] || value=1
    else
      printf ' %q' "$argument"
    fi
  done
}

python="$(q "${prefix}.venv/bin/python")"
train="$python -m moe_jax train"
again="$(without config.train.steps -- "$@")"
mesh="$(without workdir init_from devices config.mesh.expert -- "$@")"
text="$(without workdir config.data.source config.data.files -- "$@")"
steps=$("$VENV_PYTHON" -c '
import json, sys
print(2 * json.load(open(sys.argv[1]))["train"]["steps"])' "$workdir/config.json")
cat <<END

Metrics:      $workdir/metrics.jsonl   (and TensorBoard events in the same folder)
Checkpoints:  $workdir/checkpoints     (list them: $python -m moe_jax checkpoint --workdir=$(q "$workdir"))
Samples:      $workdir/samples.txt

Train longer: bash $(q "${prefix}launch/local.sh")$again --config.train.steps=$steps
Other mesh:   $train$mesh --workdir=$(q "$workdir-experts") --init_from=$(q "$workdir") --devices=8 --config.mesh.expert=8
Own text:     $train$text --workdir=$(q "$workdir-text") --config.data.source=text --config.data.files='/path/*.txt'
END
