"""Shell scripts for a TPU host: prepare it, train under launch/supervise.py, stop, show progress.

A host keeps everything in one folder, /var/lib/moe_jax or $MOE_JAX_HOME: the environment, the
source, run.log, and exit_code once the run has ended.
"""

import shlex
from collections.abc import Sequence

from launch.job import supervised

FOLDER = "/var/lib/moe_jax"
_HOME = f'home="${{MOE_JAX_HOME:-{FOLDER}}}"'

# TPU images have Python 3.10, which is too old, so uv installs 3.12.
_PREPARE = """\
curl --retry 5 -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$home/bin" sh &&
rm -rf "$home/source" &&
git init --quiet "$home/source" &&
git -C "$home/source" fetch --depth=1 {repository} {revision} &&
git -C "$home/source" checkout --quiet FETCH_HEAD &&
"$home/bin/uv" venv --clear --python 3.12 "$home/venv" &&
"$home/bin/uv" pip install --python "$home/venv/bin/python" "$home/source[tpu]"
"""

# The script holds the lock while it prepares the host.  The training process in the background
# inherits it and holds it until it ends.
_BEGIN = f"""\
#!/bin/bash
set -uo pipefail
{_HOME}
mkdir -p "$home"
exec 9>"$home/lock"
flock --wait 2 9 || {{ echo "busy already; output: $home/run.log"; exit 0; }}
exec > >(tee -a "$home/run.log" 9>&-) 2>&1
rm -f "$home/exit_code"
fail() {{ echo "this host is not ready to train"; echo 1 >"$home/exit_code"; exit 1; }}
"""

_TRAIN = """\
cd {directory} || fail
train() {{
  local code
  {command} &
  echo $! >"$home/pid"
  wait $!
  code=$?
  echo "$(date -Is) exit code $code"
  echo "$code" >"$home/exit_code"
}}
echo "training; output: $home/run.log"
train >>"$home/run.log" 2>&1 </dev/null &
"""


def prepare(repository: str, revision: str) -> str:
    """Install `revision` of a git repository with its extra `tpu`, once per revision."""
    what = shlex.quote(f"{repository} {revision}")
    commands = _PREPARE.format(repository=shlex.quote(repository), revision=shlex.quote(revision))
    return (
        f'if [ "$(cat "$home/prepared" 2>/dev/null)" != {what} ]; then\n'
        f"{commands.rstrip()} || fail\n"
        f'echo {what} >"$home/prepared"\n'
        f"fi\n"
    )


def prepare_with(script: str) -> str:
    """Prepare the host with the user's own script, which runs at every start."""
    return f"bash -c {shlex.quote(script)} || fail\n"


def train(python: str, directory: str, arguments: Sequence[str], max_stuck: int) -> str:
    """Train in the background, in a checkout and under launch/supervise.py."""
    return _TRAIN.format(
        directory=shlex.quote(directory),
        command=shlex.join(supervised(python, arguments, max_stuck)),
    )


def script(*parts: str) -> str:
    """Join parts to a script for root.  Its lock lets one such script run at a time per host."""
    return "".join([_BEGIN, *parts])


def as_root(text: str) -> str:
    """Wrap a script as one command for ssh that runs it as root."""
    return f"sudo bash -c {shlex.quote(text)}"


def stop() -> str:
    """End the run with a checkpoint; its supervisor does not restart it."""
    return as_root(f'{_HOME}; kill -TERM "$(cat "$home/pid")" && echo "stopping"')


_PROGRESS = f"""\
{_HOME}
if [ -e "$home/exit_code" ]; then state="$(cat "$home/exit_code")"
elif [ -e "$home/lock" ] && flock --nonblock "$home/lock" true; then state=idle
else state=running
fi
echo "run: $state"
tail -n 1 "$home/run.log" 2>/dev/null || true
"""


def progress() -> str:
    """Print `run: ` with "running", "idle" or an exit code, then the last line of output."""
    return _PROGRESS


def read_progress(answer: str) -> tuple[str, str]:
    """Parse what `progress` printed: ("running", "idle" or an exit code; last line of output)."""
    lines = answer.splitlines()
    marks = [number for number, line in enumerate(lines) if line.startswith("run: ")]
    if not marks:
        return "running", "no answer yet"
    return lines[marks[0]].removeprefix("run: "), "".join(lines[marks[0] + 1 :])


def output(follow: bool) -> str:
    """Print the end of the run's output; with `follow` also the lines that come later."""
    return f'{_HOME}; tail -n 100 {"-F " if follow else ""}"$home/run.log"'
