# Functions for the scripts in this folder, which source this file.  Needs only bash 3.2 and a
# Python with venv and pip.
#
#   ensure_env [EXTRA ...]   installs moe_jax with these extras in $ROOT/.venv; its Python is
#                            $VENV_PYTHON.
#
# The stamp in .venv records what was installed there.  It is written last, so an environment
# without a matching stamp is incomplete or out of date, and pip runs again.  If the environment's
# Python does not run, or is not the requested version, the environment is replaced.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
STAMP="$VENV/moe_jax.stamp"
LOG="$VENV/install.log"

say() { printf '%s\n' "[$(basename "$0")] $*"; }

die() {
  printf '%s\n' "[$(basename "$0")] $*" >&2
  exit 1
}

# Prints the version of a Python, such as 3.12.1, if we support it.  The candidate is run, because a
# shim on PATH may name a version that is not installed.
supported_version() {
  "$1" -c 'import sys
assert (3, 11) <= sys.version_info[:2] <= (3, 13)
print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

# Prints the first Python that is supported and can create environments.
find_python() {
  local candidate unable=""
  if [ -n "${PYTHON:-}" ]; then
    supported_version "$PYTHON" >/dev/null ||
      die "PYTHON=$PYTHON does not run as Python 3.11, 3.12 or 3.13: set it to one that does."
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    supported_version "$candidate" >/dev/null || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    unable="$candidate"
  done
  [ -z "$unable" ] || die "$unable has no venv module: install it (on Debian, python3-venv)."
  die "No Python 3.11, 3.12 or 3.13 found: install one, or set PYTHON to its path."
}

# Runs a command with its output in $LOG, and prints the log's last line every ten seconds.
with_progress() {
  local title="$1" started=$SECONDS heartbeat code=0
  shift
  (
    while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
      say "$title: $((SECONDS - started)) s: $(tail -n 1 "$LOG" | cut -c 1-100)"
    done
  ) &
  heartbeat=$!
  "$@" >"$LOG" 2>&1 </dev/null || code=$?
  kill "$heartbeat" 2>/dev/null
  wait "$heartbeat" 2>/dev/null
  [ "$code" -eq 0 ] && return
  tail -n 20 "$LOG" >&2
  die "$title failed: the lines above are the end of $LOG.  Fix the cause and run this again."
}

# A hash of everything except the extras that decides what pip would install.  It includes $ROOT:
# an editable install points at its checkout, so a copied .venv must be installed again.
fingerprint() {
  "$VENV_PYTHON" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [str(root), sys.version] + [(root / n).read_text() for n in ("setup.cfg", "pyproject.toml")]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

# Creates .venv, unless it exists, runs, and has the version of $PYTHON (if PYTHON is set).
ensure_venv() {
  local have="" want python
  have="$(supported_version "$VENV_PYTHON")" || have=""
  if [ -n "$have" ] && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    [ -n "${PYTHON:-}" ] || return 0
    want="$(supported_version "$PYTHON")" ||
      die "PYTHON=$PYTHON does not run as Python 3.11, 3.12 or 3.13: set it to one that does."
    [ "$have" != "$want" ] || return 0
  fi
  python="$(find_python)" || exit 1
  say "making $VENV with Python $(supported_version "$python") ($python)"
  rm -rf "$VENV"
  mkdir -p "$VENV"
  with_progress "making the environment" "$python" -m venv "$VENV"
}

ensure_env() {
  local key installed extras extra current=1
  ensure_venv
  key="$(fingerprint)" || die "$VENV does not run: delete it and run this again."
  installed="$(sed -n 2p "$STAMP" 2>/dev/null)"
  [ "$(sed -n 1p "$STAMP" 2>/dev/null)" = "$key" ] || current=""
  for extra in "$@"; do
    case ",$installed," in *",$extra,"*) ;; *) current="" ;; esac
  done
  [ -z "$current" ] || return 0
  # Extras that another script installed are kept: the scripts share one environment.
  extras="$(printf '%s\n' "$@" "$installed" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -s -d , -)"
  say "installing moe_jax${extras:+[$extras]} into $VENV (a minute or two the first time)"
  rm -f "$STAMP"
  with_progress "pip install" "$VENV_PYTHON" -m pip install --disable-pip-version-check \
    --progress-bar off --editable "$ROOT${extras:+[$extras]}"
  printf '%s\n%s\n' "$key" "$extras" >"$STAMP"
}
