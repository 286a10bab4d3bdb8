"""Standard output that is closed, full or without a reader, or cannot encode a character."""

import json
import os
import subprocess
import sys

import pytest
from small_run import ONE_LAYER, flags, rows, write_corpus

from moe_jax.cli import streams
from moe_jax.errors import UserError

# A minimal command; its arguments set its output, the way of printing, and `go_on_without_output`.
PROGRAM = """
import sys
from moe_jax.cli import streams
streams.guard()
how, size, go_on = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "go_on"
if go_on:
    streams.go_on_without_output()
try:
    for _ in range(3):
        print("a line of text " * size, flush=how == "flush")
    streams.finish()
    code = 0
except streams.OutputLostError as lost:
    code = lost.tell()
streams.abandon()
sys.exit(code)
"""
# redirection -> exit code of a command that needs its output, and the reason of the loss
BROKEN = {
    "without a reader": (141, "Broken pipe"),
    "> /dev/full": (1, "No space left on device"),
    ">&-": (1, "it is closed"),
}


def shell(command, arguments, env, redirect="", **more):
    """Run `python COMMAND ARGUMENTS REDIRECT` in bash; in a pipeline, return its own exit code."""
    script = f'set -o pipefail; "$@" {redirect}'
    return subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, *command, *arguments],
        env=env,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 240} | more,
    )


def broken(command, arguments, env, redirect):
    """Run `shell` with one of BROKEN."""
    if redirect != "without a reader":
        return shell(command, arguments, env, redirect)
    read, write = os.pipe()
    os.close(read)
    try:
        return shell(command, arguments, env, stdout=write)
    finally:
        os.close(write)


@pytest.mark.parametrize("how", ["flush", "held"])  # found by the first line, or by the last flush
@pytest.mark.parametrize("size", [1, 20_000])  # less, and more, than a buffer and a pipe hold
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirect", BROKEN)
def test_lost_output_is_one_sentence_or_none(cli_env, redirect, how, size, unbuffered):
    code, why = BROKEN[redirect]
    env = cli_env | {"PYTHONUNBUFFERED": unbuffered}
    done = broken(["-c", PROGRAM], [how, str(size), ""], env, redirect)
    sentence = f"Error: standard output cannot be written ({why}).\n" if code == 1 else ""
    assert (done.returncode, done.stderr.decode()) == (code, sentence)


@pytest.mark.parametrize("redirect", BROKEN)
def test_what_goes_on_without_output_says_so_once(cli_env, redirect):
    _, why = BROKEN[redirect]
    done = broken(["-c", PROGRAM], ["flush", "20000", "go_on"], cli_env, redirect)
    assert done.returncode == 0
    line = f"Standard output is lost ({why}): the run continues, see its metrics.jsonl.\n"
    assert done.stderr.decode() == line


@pytest.mark.parametrize("redirect", [">&- 2>&-", "> /dev/full 2>&1", "2>&1 | true"])
@pytest.mark.parametrize("go_on", ["", "go_on"])
def test_standard_error_may_be_lost_too(cli_env, redirect, go_on):
    done = shell(["-c", PROGRAM], ["flush", "20000", go_on], cli_env, redirect)
    assert (done.returncode == 0) == bool(go_on)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_closed_stream_is_no_file_that_is_opened_later(cli_env, tmp_path):
    """Otherwise the output of a C library would go into the first file that the run opens."""
    program = (
        "import os; from moe_jax.cli import streams; streams.guard()\n"
        "file = open('file', 'wb', buffering=0); os.write(1, b'x'); os.write(2, b'y')\n"
        "assert file.fileno() > 2, file.fileno()\n"
    )
    done = shell(["-c", program], [], cli_env, "<&- >&- 2>&-", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""


def test_output_that_another_program_made_non_blocking_is_waited_for(cli_env):
    program = (
        "import os; os.set_blocking(1, False)\n"
        "from moe_jax.cli import streams; streams.guard()\n"
        "print('x' * 1_000_000); streams.finish()\n"
    )
    done = shell(["-c", program], [], cli_env, "| cat")
    assert done.returncode == 0 and len(done.stdout) == 1_000_001


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]])
def test_help(cli_env, arguments):
    for redirect, (code, _) in BROKEN.items():
        done = broken(["-m", "moe_jax"], arguments, cli_env, redirect)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, code == 1)


NARROW = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}


@pytest.mark.lifecycle
def test_a_run_outlives_its_screen_and_any_locale(cli_env, tmp_path):
    """Paths, prompt and samples are not ASCII, and the reader ends after the first line."""
    folder, workdir = tmp_path / "Größe ≈ 日本", tmp_path / "läuft"
    prompt = {"eval.sample_prompt": "é≈日", "eval.sample_tokens": 4, "train.steps": 3}
    given = flags(workdir, write_corpus(folder), **ONE_LAYER | prompt)
    command = ["-m", "moe_jax"]
    done = shell(command, ["train", *given], cli_env | NARROW, "| head -n 1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("Standard output is lost (Broken pipe)")
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 3]
    assert "é≈日" in (workdir / "samples.txt").read_text(encoding="utf-8")
    assert len(json.loads((workdir / "data.json").read_text())["fingerprint"]) >= 8

    done = shell(command, ["results", f"--workdir={tmp_path}"], cli_env | NARROW)
    assert (done.returncode, done.stderr) == (0, b"") and b"| l\\xe4uft " in done.stdout


def test_names_that_libraries_would_read_otherwise_are_refused(cli_env, tmp_path):
    ascii_names = NARROW | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ["results", f"--workdir={tmp_path / 'läuft'}"]
    done = shell(["-m", "moe_jax"], arguments, cli_env | ascii_names)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert "the locale's encoding is ascii: set PYTHONUTF8=1." in line
    with pytest.raises(UserError, match=r"\\udcff' is not valid UTF-8: rename it"):
        streams.check_names(["results", os.fsdecode(b"--workdir=\xff")])
    streams.check_names(["results", "--workdir=läuft"])


ASYNCIO = """
import asyncio, sys
from moe_jax.cli.exit import run
from moe_jax.errors import UserError

async def write(number):
    raise OSError(28, "No space left on device")

async def save():
    first, *others = [asyncio.ensure_future(write(n)) for n in range(3)]
    await asyncio.sleep(0)
    await first

def main(argv):
    try:
        asyncio.run(save())
    except OSError as error:
        raise UserError(f"The checkpoint cannot be written ({error.strerror}).") from None

run(main)
"""


def test_errors_that_asyncio_tells_once_more_are_not_shown(cli_env):
    done = shell(["-c", ASYNCIO], [], cli_env)
    assert done.returncode == 1
    sentence = "Error: The checkpoint cannot be written (No space left on device).\n"
    assert done.stderr.decode() == sentence
