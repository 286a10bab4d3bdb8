"""Only one live run may use a workdir, and a dead run never blocks it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from etils import epath

from moe_jax.errors import UserError
from moe_jax.record import lock as lock_module
from moe_jax.record.lock import LOCK, lock_workdir

HOLDER = """
import pathlib, signal, sys
from moe_jax.record.lock import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    workdir = tmp_path / "made" / "on demand"
    with lock_workdir(workdir):
        with pytest.raises(UserError, match="is in use by ") as error, lock_workdir(workdir):
            pass
        assert f" process {os.getpid()} on " in str(error.value) and "\n" not in str(error.value)
        with lock_workdir(tmp_path / "another"):
            pass
    with lock_workdir(workdir):
        pass


def test_a_killed_process_leaves_the_workdir_free(tmp_path, cli_env):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=cli_env, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on "), lock_workdir(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock_workdir(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        lock_workdir(tmp_path / "file" / "run"),
    ):
        pass


def test_an_object_store_has_no_locks():
    """An object store is not touched: no client for one is installed here."""
    workdir = epath.Path("gs://bucket/run")
    with lock_workdir(workdir), lock_workdir(workdir):
        entered = True
    assert entered


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_and_the_run_goes_on(tmp_path, monkeypatch, number):
    def no_locks(file, operation):
        raise OSError(number, os.strerror(number))

    said = []
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_workdir(tmp_path, said.append):
        entered = True
    assert entered and len(said) == 1
    assert f"{tmp_path} is on a file system without locks ({os.strerror(number)})" in said[0]


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path):
    """Only a folder that the lock created and that holds no other file is removed."""
    workdir = tmp_path / "made" / "run"
    with pytest.raises(UserError, match="mistake"), lock_workdir(workdir):
        assert (workdir / LOCK).exists()
        raise UserError("A mistake.")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="mistake"), lock_workdir(workdir):
        (workdir / "config.json").touch()
        raise UserError("A mistake.")
    for _ in range(2):
        with pytest.raises(UserError, match="mistake"), lock_workdir(workdir):
            raise UserError("A mistake.")
        assert sorted(os.listdir(workdir)) == ["config.json", LOCK]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_without_its_file_is_noticed(tmp_path, replaced):
    with lock_workdir(tmp_path / "run") as lock:
        lock.check()
        (tmp_path / "run" / LOCK).unlink()
        if replaced:
            (tmp_path / "run" / LOCK).touch()
        with pytest.raises(UserError, match="lock was removed or replaced while this run held it"):
            lock.check()


def test_the_lock_on_a_file_that_has_lost_its_name_is_not_enough(tmp_path, monkeypatch):
    """The previous holder may have removed the file between our opening and locking it."""
    take, files = lock_module._take, []

    def late(file, workdir, say):
        files.append(os.fstat(file.fileno()).st_ino)
        if len(files) == 1:
            (tmp_path / LOCK).rename(tmp_path / "away")  # a rename, so that the inode is not reused
        take(file, workdir, say)

    monkeypatch.setattr(lock_module, "_take", late)
    with lock_workdir(tmp_path) as lock:
        lock.check()
        assert len(files) == 2 and (tmp_path / LOCK).stat().st_ino == files[1] != files[0]
