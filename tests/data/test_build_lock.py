"""Checks that a process waiting for a store counts as alive only while the builder progresses."""

import fcntl
import os
import threading

from etils import epath

from moe_jax.data.build import build_store
from moe_jax.data.build_lock import LOOK_INTERVAL, BuildLock
from moe_jax.data.config import DataConfig


def test_who_waits_is_alive_when_the_builder_is(tmp_path):
    root, told, held = epath.Path(tmp_path), threading.Event(), threading.Event()

    def wait():
        with BuildLock(told.set)(root, "store"):
            held.set()

    with open(tmp_path / "store.lock", "wb") as builder:
        fcntl.flock(builder, fcntl.LOCK_EX)
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not told.wait(3 * LOOK_INTERVAL)  # a builder that hangs
        seconds = 0
        while not told.wait(LOOK_INTERVAL):  # the waiter's first look may follow the first update
            seconds += 1
            os.utime(builder.fileno(), (seconds, seconds))
        assert not held.is_set()
    waiter.join()
    assert held.is_set()


def test_a_builder_says_so_in_the_time_of_its_lock(tmp_path):
    told = []
    turn = BuildLock(lambda: told.append(1))
    turn.on_progress()
    with turn(epath.Path(tmp_path), "store"):
        lock = tmp_path / "store.lock"
        os.utime(lock, (1, 1))
        turn.on_progress()
        assert len(told) == 2 and lock.stat().st_mtime > 1
    turn.on_progress()
    assert len(told) == 3 and not lock.exists()


def test_a_build_gets_on_with_every_document_it_reads(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    config, told = DataConfig(source="text", files=f"{tmp_path}/*.txt"), []
    build_store(config, tmp_path / "stores", on_progress=lambda: told.append(1))
    assert len(told) >= 4 * (1 + 1 + 2)  # hashed, looked through, written in two splits
    built = len(told)
    build_store(config, tmp_path / "stores", on_progress=lambda: told.append(1))
    assert len(told) == built + 4
