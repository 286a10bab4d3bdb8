"""`python -m moe_jax plan`: a real compilation for TPUs in a separate process, and refusals."""

import re
from pathlib import Path

import pytest

from moe_jax.cli.plan import main
from moe_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
CONFIG = f"--config={ROOT / 'configs' / 'tiny.py'}"
SMALL = (
    "--config.precision=bfloat16",
    "--config.model.scan_layers=True",
    "--config.model.remat=full",
    "--config.model.attention=xla",
)


@pytest.mark.lifecycle
def test_a_step_is_compiled_for_a_tpu_that_is_not_here(run_cli):
    """Four v5e chips: XLA's figures against ours, and the bytes of the all-to-all."""
    done = run_cli(
        ["moe_jax", "plan", CONFIG, *SMALL, "--topology=v5e:2x2", "--mesh=fsdp=2,expert=2"],
        timeout=120,
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[-1] == "fits: yes"
    assert "compiled for this topology by libtpu" in done.out
    # The arguments of XLA are what we count: parameters, moments and the batch.
    sizes = dict(re.findall(r"^  (parameters|optimizer) +([\d.]+) MiB", done.out, re.M))
    given = re.search(r"state and batch ([\d.]+) MiB", done.out)
    batch = (7 * 4 + 1) * 32 * 128 / 4 / 2**20
    assert given is not None
    assert float(given[1]) == pytest.approx(sum(map(float, sizes.values())) + batch, rel=0.01)
    # In each of 4 layers 8 experts' 40 slots for each of 8 rows: 5 times 256 wide in bfloat16 and
    # 3 times a float32 weight, of which half leaves the device.
    found = re.search(r"all-to-all +([\d.]+) MiB +\(.* over expert\)", done.out)
    assert found is not None
    assert float(found[1]) == round(4 * 8 * 8 * 40 * (5 * 256 * 2 + 3 * 4) / 2 / 2**20, 2)


@pytest.mark.full
def test_mixtral_on_1024_chips(run_cli):
    """It takes a few seconds, and the analytic memory is within a tenth of XLA's."""
    config = f"--config={ROOT / 'configs' / 'mixtral_8x7b.py'}"
    done = run_cli(["moe_jax", "plan", config, "--topology=v5p:8x8x16"], timeout=180)
    assert done.code == 0, done.err
    gap = re.search(r"the analytic total is ([+-][\d.]+)%", done.out)
    assert gap is not None and abs(float(gap[1])) < 10
    assert done.out.endswith("fits: yes\n")


@pytest.mark.lifecycle
def test_gpus_that_are_not_here_are_estimated(run_cli):
    done = run_cli(["moe_jax", "plan", CONFIG, "--topology=h200:8", "--tokens=1e9"])
    assert done.code == 0, done.err
    assert "not compiled (XLA compiles only for GPUs of this machine" in done.out
    assert "chip-hours for 1e+09 tokens" in done.out
    assert done.out.endswith("fits: yes\n")


def test_what_does_not_fit_says_no_and_exits_0(run_cli):
    config = f"--config={ROOT / 'configs' / 'mixtral_8x7b.py'}"
    done = run_cli(["moe_jax", "plan", config, "--nocompile", "--topology=v5e:2x4"])
    assert done.code == 0, done.err
    assert done.out.endswith("fits: no\n")


def test_search_prints_a_ranking_and_reasons(run_cli):
    done = run_cli(["moe_jax", "plan", CONFIG, "--topology=v5e:2x4", "--search", "--nocompile"])
    assert done.code == 0, done.err
    assert re.search(r"^ *1\. ", done.out, re.M)
    assert "rejected:" in done.out
    assert done.out.splitlines()[-1] == "fits: yes"


def test_a_mistake_is_one_line(run_cli):
    done = run_cli(["moe_jax", "plan", CONFIG])
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: --topology is missing") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--topology=v5p:8x8"], "is not a size of v5p"),
        (["--topology=v5e:2x2", "--mesh=exprt=2"], "write AXIS=SIZE"),
        (["--topology=v5e:2x2", "--mesh=expert=2,expert=4"], "Give it once"),
        (["--topology=v5e:2x2", "--mesh=expert=4", "--search"], "give one"),
        (["--topology=v5e:2x2", "--tokens=-1"], "give a finite number above 0"),
        (
            ["--topology=v5e:2x2", "--save=/nonexistent/x"],
            "--save=/nonexistent/x cannot be written",
        ),
        (["--topology=v5e:2x2", "--save=x", "--nocompile"], "--save needs one compiled plan"),
        (["--topology=v5e:2x2", "--mesh=expert=3"], "does not multiply to the 4 devices"),
    ],
)
def test_mistakes_are_one_sentence(arguments, expected):
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        main(["plan", CONFIG, *arguments])
    assert "\n" not in str(error.value)
