"""A lost peer is recognised, also if a save is the first to fail because of it."""

import jax
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import lost_peer

GLOO = "Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:1943: Connection reset by peer"


@pytest.mark.parametrize(("why", "lost"), [(GLOO, True), ("No space left on device", False)])
def test_a_save_in_which_a_peer_is_lost_is_not_a_fault_of_the_disk(
    tmp_path, monkeypatch, why, lost
):
    """Found by the soak: the survivor ended with 1, "make room", and was not restarted."""
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(1, {"w": np.zeros(3)})
    finished = checkpoints._orbax.wait_until_finished

    def fails():
        finished()  # otherwise its threads log errors after the folder is deleted
        raise ValueError("Orbax: 1 error(s) while saving") from RuntimeError(why)

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fails)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError if lost else UserError) as raised:
        checkpoints.wait()
    assert lost_peer(raised.value) == lost
