"""Tags of trackers: five groups, no losses of weight 0, texts and the picture of the load."""

import io
import json
import zlib
from contextlib import redirect_stdout

import numpy as np
import pytest
from small_run import small_config
from test_report import events

from moe_jax.config import to_dict
from moe_jax.record.heat_map import expert_load, heat_map
from moe_jax.record.report import Reporter
from moe_jax.record.tags import scalars, unused
from moe_jax.train.metrics import moe_row

ROW = {
    "step": 3,
    "loss": 2.0,
    "lm_loss": 1.5,
    "balance_loss": 1.0,
    "z_loss": 0.1,
    "logits_z_loss": 0.2,
    "spike": 0,
    "skipped_spikes": 0,
    "tokens": 64,
    "epochs": {"web": 1},
    "mfu": "nan",
    "drop_fraction": 0.5,
    "router_entropy": 1.25,
    "eval_loss": 1.75,
    "eval_loss_by_source": {"web": 1.5},
    "layers": {"balance_loss": [1.0, 2.0], "z_loss": [0.1, 0.1], "load_cv": [0.5, 0.25]},
}


def tags(**overrides):
    return dict(scalars(ROW, unused(small_config("*", **overrides))))


def test_every_tag_is_in_one_of_five_groups():
    found = dict(scalars(ROW, ()))
    assert {tag.partition("/")[0] for tag in found} == {"train", "eval", "router", "speed", "data"}
    assert found["train/lm_loss"] == 1.5 and found["eval/loss_by_source/web"] == 1.5
    assert found["router/load_cv/layer_01"] == 0.25 and found["router/entropy"] == 1.25
    assert found["data/epochs/web"] == 1 and np.isnan(found["speed/mfu"])
    assert len(found) == 14 + 6  # fields except `step` and `layers`, plus those of two layers


@pytest.mark.parametrize(
    ("overrides", "gone"),
    [
        ({}, {"train/logits_z_loss"}),
        ({"model.logits_z_weight": 0.1}, set()),
        ({"model.moe.balance_weight": 0.0}, {"train/balance_loss", "router/balance_loss"}),
        ({"model.moe.z_weight": 0.0}, {"train/z_loss", "router/z_loss"}),
        ({"train.spike_factor": 0.0}, {"train/spike", "train/skipped_spikes"}),
        ({"model.dense": True}, {"train/z_loss", "train/balance_loss", "router"}),
    ],
)
def test_what_has_weight_0_has_no_tag(overrides, gone):
    hidden = {"train/logits_z_loss"} if "model.logits_z_weight" not in overrides else set()
    hidden |= gone | {"eval/loss_by_source"}  # the data has one source
    found, every = set(tags(**overrides)), set(dict(scalars(ROW, ())))
    assert found == {tag for tag in every if not tag.startswith(tuple(hidden))}


def test_a_dense_row_has_no_router_tags():
    row = {"step": 1, "loss": 1.0, **moe_row(None)}
    config = small_config("*", **{"model.dense": True})
    assert [tag for tag, _ in scalars(row, unused(config))] == ["train/loss"]


def pixels(png: bytes) -> np.ndarray:
    """Decode an 8-bit RGB PNG without filters to [height, width, 3], and check its checksums."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(png):
        size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        parts[kind] = png[at + 8 : at + 8 + size]
        checksum = int.from_bytes(png[at + 8 + size : at + 12 + size], "big")
        assert checksum == zlib.crc32(kind + parts[kind])
        at += size + 12
    header = parts[b"IHDR"]
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (0, 4))
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_the_heat_map_shows_each_expert_of_each_layer():
    load_LE = np.array([[4.0, 4.0, 4.0, 4.0], [0.0, 1.0, 2.0, 13.0]])
    picture = heat_map(load_LE)
    image = pixels(picture.png)
    assert image.shape == (picture.height, picture.width, 3)
    cell = picture.height // 2
    assert picture.width == 4 * cell
    colour_LE3 = image[cell // 2 :: cell, cell // 2 :: cell].astype(int)
    assert (colour_LE3[0] == 255).all()  # balanced
    dead, quarter, half, hot = colour_LE3[1]
    assert (dead == 0).all()
    assert quarter[2] > quarter[0] and half[2] > half[0] > quarter[0]  # blue, and paler
    assert hot[0] > hot[2] and hot[0] > hot[1]


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (4, 8), (48, 128), (60, 2048)])
def test_a_heat_map_is_small(layers, experts):
    load_LE = np.random.default_rng(0).poisson(50, (layers, experts)).astype(float)
    picture = heat_map(load_LE)
    assert (
        picture.width <= max(1024, 4 * experts) and len(picture.png) < 4 * layers * experts + 4000
    )


def test_the_load_of_a_ledger_row_is_what_was_sampled():
    row = {"expert": {"kept": [[1, 2]], "dropped_capacity": [[3, 0]], "padding": [[9, 9]]}}
    assert expert_load(row).tolist() == [[4.0, 2.0]]
    assert expert_load({"step": 3}) is None


def test_tensorboard_has_the_config_samples_and_the_load(tmp_path):
    config = small_config("*")
    with redirect_stdout(io.StringIO()), Reporter(tmp_path, 9, None, config) as reporter:
        reporter.log(ROW)
        reporter.ledger({"step": 3, "expert": {"kept": [[1, 2], [2, 1]]}})
        reporter.text(9, "samples", "# a text\n\n| of | lines |")
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {value.tag: (e, value) for e in events(path) for value in e.summary.value}
    event, text = found["train/config"]
    assert event.step == 0 and text.metadata.plugin_data.plugin_name == "text"
    assert json.loads(text.tensor.string_val[0]) == to_dict(config)
    event, samples = found["eval/samples"]
    assert event.step == 9
    assert samples.tensor.string_val[0].decode().splitlines() == [
        "    # a text",
        "    ",
        "    | of | lines |",
    ]
    event, load = found["router/load"]
    assert event.step == 3 and load.image.colorspace == 3
    assert pixels(load.image.encoded_image_string).shape[1] == load.image.width
    assert "balanced" in load.metadata.summary_description
