"""Fixtures of the fault tests: a corpus, and trainers that are killed when their test ends."""

import pytest
from small_run import write_corpus
from trainer import Trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def trainers(cli_env):
    """`trainers(arguments, ...)` starts a Trainer; all are killed when the test ends."""
    started: list[Trainer] = []

    def start(*given, **named) -> Trainer:
        started.append(Trainer(*given, **{"env": cli_env} | named))
        return started[-1]

    yield start
    for one in started:
        one.kill()
