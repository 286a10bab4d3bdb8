#!/usr/bin/env bash
# Trains configs/tiny.py on this machine: makes the environment, trains, says what to do next.
#
#   bash launch/local.sh [FLAGS OF python -m moe_jax train]
#
# --config and --workdir have defaults here and may be given.  The exit code is the trainer's.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Paths are printed as a person at the root of the checkout would type them.
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

# In the background, so that a signal sent to this script reaches the trainer: it then writes a
# checkpoint and leaves with 42.  Ctrl-C is passed on as SIGTERM for the same reason.
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
    say "stopped with a checkpoint; the same command goes on from it."
    exit 42
    ;;
  *)
    say "the trainer ended with exit code $code; its last lines say why." >&2
    exit "$code"
    ;;
esac

q() { printf '%q' "$1"; }  # as a shell would have to read it

# The arguments after --, as a shell would have to read them, without the flags named before it.
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
      value=""  # of a flag that is left out
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

Metrics:      $workdir/metrics.jsonl   (and TensorBoard events beside it)
Checkpoints:  $workdir/checkpoints     (list them: $python -m moe_jax checkpoint --workdir=$(q "$workdir"))
Samples:      $workdir/samples.txt

Go on:        bash $(q "${prefix}launch/local.sh")$again --config.train.steps=$steps
Other mesh:   $train$mesh --workdir=$(q "$workdir-experts") --init_from=$(q "$workdir") --devices=8 --config.mesh.expert=8
Own text:     $train$text --workdir=$(q "$workdir-text") --config.data.source=text --config.data.files='/path/*.txt'
END
