"""Every mistake of a user gives one sentence and exit code 1; nothing is written or lost."""

import dataclasses
import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from small_run import ONE_LAYER, flags, small_config, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli.train import main
from moe_jax.config import to_json
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import DIVERGED
from moe_jax.record.lock import LOCK, lock_workdir
from moe_jax.record.provenance import write_run_record
from moe_jax.run.loop import save
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.resume import data_record
from moe_jax.run.setup import prepare


@dataclasses.dataclass(frozen=True)
class Place:
    """Files of a test case: good text files, the store folder, an empty folder, a saved run."""

    files: str
    stores: Path
    empty: Path
    saved: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    made = Place(write_corpus(root / "text"), root / "stores", root / "empty", root / "saved")
    made.empty.mkdir()
    config = small_config(made.files, **{"data.store": str(made.stores)})
    run = prepare(config, made.saved, lambda line: None)
    save(run, restore_or_init_state(run, "", lambda line: None), 1)
    run.checkpoints.close()
    text = data_record(run.store)
    write_run_record(str(made.saved), to_json(run.config), {}, run.store.fingerprint, text)
    return made


@pytest.fixture(autouse=True)
def sigterm():
    """Restore the SIGTERM handler, which the trainer replaces until its process ends."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, except the lock of a running run.

    That is taken before any checkpoint is touched, and stays.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def test_a_source_that_may_be_read_too_seldom_for_one_batch(place, tmp_path):
    """All sources together have enough text, but the mixture needs more of one than it has."""
    short = write_corpus(tmp_path / "short", 4)
    mixture = {"long": {"files": place.files}, "short": {"files": short, "weight": 3.0}}
    config = small_config("", **{"data.max_epochs": 1, "data.heldout_fraction": 0.3})
    data = dataclasses.replace(config.data, mixture=mixture)
    train = dataclasses.replace(config.train, batch_size=64)
    config = dataclasses.replace(config, data=data, train=train)
    with pytest.raises(
        UserError, match=r"max_epochs is 1: the text of data.mixture.short is too short .* of 64"
    ):
        prepare(config, tmp_path / "run", lambda line: None)


def arguments(place: Place, workdir: Path, overrides: dict[str, object]) -> list[str]:
    return flags(workdir, place.files, **{"data.store": str(place.stores)} | overrides)


# overrides of the small run on 8 devices -> pattern of the sentence
CONFIGS = {
    "unknown key": ({"train.stepz": 5}, r"config\.train\.stepz .*did you mean 'train.steps'"),
    "wrong type": ({"train.steps": "many"}, r"--config\.train\.steps=many .*type int"),
    "heads and kv heads": (
        {"model.num_heads": 3, "model.num_kv_heads": 2},
        r"model\.num_heads \(3\) is not divisible by model\.num_kv_heads \(2\)",
    ),
    "experts and expert axis": (
        {"model.moe.num_experts": 6, "mesh.expert": 4},
        r"model\.moe\.num_experts \(6\) is not divisible by mesh\.expert \(4\)",
    ),
    "mesh and devices": ({"mesh.data": 3}, r"data 3 .* does not multiply to the 8 devices"),
    "mesh and devices with a rest": ({"mesh.expert": 3}, r"does not multiply to the 8 devices"),
    "group split by the mesh": (
        {"model.moe.group_rows": 8},
        r"model\.moe\.group_rows \(8\) does not divide the 4 rows",
    ),
    "group split by accumulation": (
        {"model.moe.group_rows": 4, "train.accumulation": 2},
        r"model\.moe\.group_rows \(4\) does not divide the 2 rows",
    ),
    "rows and devices": ({"train.batch_size": 12}, r"train\.batch_size \(12\) is not divisible"),
    "K above E": (
        {"model.moe.top_k": 9},
        r"model\.moe\.top_k is 9 with 8 experts",
    ),
    "capacity factor": ({"model.moe.capacity_factor": 0.0}, r"capacity_factor is 0\.0: set it"),
    "eval capacity factor": (
        {"model.moe.eval_capacity_factor": -1.0},
        r"eval_capacity_factor is -1\.0: set it",
    ),
    "no limit to the capacity": (
        {"model.moe.capacity_factor": "inf"},
        r"model\.moe\.capacity_factor is inf: give a finite number",
    ),
    "a capacity beyond all numbers": (
        {"model.moe.eval_capacity_factor": 1e308},
        r"eval_capacity_factor is 1e\+308: .*at num_experts nothing is dropped",
    ),
    "a knob that is no number": (
        {"optimizer.weight_decay": "nan"},
        r"optimizer\.weight_decay is nan: give a finite number",
    ),
    "rope_theta": ({"model.rope_theta": 0.0}, r"model\.rope_theta is 0\.0: set it above 0"),
    "steps to trace": ({"train.profile_steps": "\u00b2:\u00b3"}, r"write FIRST:END"),
    "remat policy": ({"model.remat": "foo"}, r"model\.remat 'foo' is unknown \(known: dots, full"),
    "a sequence beyond all numbers": (
        {"data.sequence_length": 10**20},
        r"data\.sequence_length is 10{20}: give a number of at most",
    ),
    "a batch with too many divisors to try": (
        {"train.batch_size": 10**9, "model.moe.group_rows": 0},
        r"fewer than one batch of 1000000000",
    ),
    "attention of another platform": (
        {"model.attention": "cudnn"},
        r"model\.attention is 'cudnn', which runs on gpu only.*are cpu\. Set it to 'auto'",
    ),
    "sequence longer than the store": (
        {"data.sequence_length": 10_000_000},
        r"but data\.sequence_length 10000000 needs 10000001 or more",
    ),
    "sequence longer than the held-out text": (
        {"data.sequence_length": 5000, "train.batch_size": 8},
        r"held-out text has \d+ tokens, but data\.sequence_length 5000 needs 5001",
    ),
    "corpus smaller than a batch": (
        {"train.batch_size": 1 << 14},
        r"fewer than one batch of 16384",
    ),
    "token id beyond the vocabulary": (
        {"model.vocab_size": 100},
        r"config\.model\.vocab_size is 100: the tokenizer has 258 token ids",
    ),
    "no files named": ({"data.files": ""}, r"data\.files is empty"),
    "missing files": ({"data.files": "/nowhere/*.txt"}, r"no file matches '/nowhere/\*\.txt'"),
    "unknown router": ({"model.moe.router": "topk"}, r"model\.moe\.router .*'top_k'"),
    "unknown dispatch": ({"model.moe.dispatch": "droples"}, r"did you mean 'dropless'"),
    "heads and tensor axis": (
        {"mesh.tensor": 4, "mesh.data": 2},
        r"k_DJA has kv_heads = 2, which mesh tensor \(4\) does not divide",
    ),
    "absurdly many layers": (
        {"model.num_layers": 2**40},
        r"model\.num_layers is 1099511627776: set at most 2048",
    ),
    "precision": (
        {"precision": "float16"},
        r"precision 'float16' is unknown .did you mean 'bfloat16'",
    ),
}


def check_sentence(error: pytest.ExceptionInfo, pattern: str) -> None:
    assert error.match(pattern)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("name", CONFIGS)
def test_mistake_in_the_config(place, tmp_path, name):
    overrides, pattern = CONFIGS[name]
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / "run", overrides)])
    check_sentence(error, pattern)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"good text, then \xff\xfe", r"bad\.txt is not UTF-8 at byte offset 16"),
        (b"", r"bad\.txt is empty"),
    ],
)
def test_unreadable_text(place, tmp_path, content, pattern):
    write_corpus(tmp_path / "text", 4)
    (tmp_path / "text" / "bad.txt").write_bytes(content)
    overrides = {"data.files": str(tmp_path / "text" / "*.txt")}
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / "run", overrides)])
    check_sentence(error, pattern)
    assert not (tmp_path / "run").exists()


def test_stray_argument(place, tmp_path):
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / "run", {}), "steps=3"])
    check_sentence(error, "'steps=3' is not a flag")


@pytest.mark.parametrize("below", ["file", "file/deeper/run"])
def test_workdir_is_not_writable(place, tmp_path, below):
    """Root can write to every folder, so a file is in the place of the workdir."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / below, {})])
    check_sentence(error, "--workdir=.*file.* cannot be written")
    assert contents(tmp_path) == {"file": hashlib.sha256(b"mine").hexdigest()}


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        ({"model.moe.expert_width": 48}, r"config\.model\.moe\.expert_width is 48 .* has 32"),
        (
            {"model.width": 48, "model.num_layers": 4},
            r"model\.num_layers is 4 but .* has 2, config\.model\.width is 48 and was 32. Set",
        ),
        pytest.param(
            *({"optimizer.name": "adafactor"}, r": optimizer/.* is (absent|float32.*) in the "),
            marks=pytest.mark.lifecycle,
        ),
        ({"optimizer.moment_dtype": "bfloat16"}, r"optimizer/.* is float32.* and bfloat16"),
        (
            {"model.confine_attention": True},
            r"config\.model\.confine_attention is True .* has False",
        ),
        ({"seed": 7}, r"config\.seed is 7 but the run in this workdir has 0"),
        ({"train.batch_size": 64}, r"config\.train\.batch_size is 64 .* has 32"),
        ({"model.moe.group_rows": 2}, r"config\.model\.moe\.group_rows is 2 .* has 4"),
        ({"model.moe.router": "gshard"}, r"config\.model\.moe\.router is 'gshard' .* has 'top_k'"),
        ({"model.moe.top_k": 3}, r"config\.model\.moe\.top_k is 3 .* has 2"),
        ({"data.sequence_length": 64}, r"config\.data\.sequence_length is 64 .* has 32"),
    ],
)
def test_workdir_of_another_run(place, overrides, pattern):
    before = contents(place.saved)
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, place.saved, overrides)])
    check_sentence(error, pattern)
    assert contents(place.saved) == before


@pytest.mark.parametrize("damage", [None, b"\xff\xfe", b"{"])
def test_without_its_config_a_run_is_not_resumed(place, damage):
    """Without the config, changes of the data and the routing groups cannot be detected."""
    path = place.saved / "config.json"
    good = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, place.saved, {})])
    check_sentence(error, r"config\.json, which describes .* cannot be used .*restore the file")
    path.write_bytes(good)


def test_checkpoints_that_are_no_folder(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("mine")
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / "run", {})])
    check_sentence(error, "checkpoints is not a folder")


def test_init_from_a_folder_without_checkpoint(place, tmp_path):
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / "run", {}), f"--init_from={place.empty}"])
    check_sentence(error, "--init_from=.*empty holds no checkpoint")
    assert not (tmp_path / "run").exists() and not list(place.empty.iterdir())


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        ({"model.rope_theta": 1.0}, r"model\.rope_theta is 1\.0 but the run there has 10000\.0"),
        ({"model.norm_eps": 1e-6}, r"model\.norm_eps is 1e-06 but the run there has 1e-05"),
        ({"model.moe.top_k": 3}, r"model\.moe\.top_k is 3 but the run there has 2"),
        ({"model.width": 48}, r"model\.width is 48 but the run there has 32"),
        (
            {"model.moe.first_dense": 2, "model.rope_theta": 1.0},
            r"model\.rope_theta is 1\.0 .*, config\.model\.moe\.first_dense is 2 and was 0",
        ),
    ],
)
def test_weights_of_another_function(place, tmp_path, overrides, pattern):
    """The error comes before the text is tokenised for this run."""
    given = arguments(place, tmp_path / "run", overrides | {"data.store": str(tmp_path / "stores")})
    with pytest.raises(UserError) as error:
        main(["train", *given, f"--init_from={place.saved}"])
    check_sentence(error, f"--init_from=.*saved: config.{pattern}.* Set the values of that run")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_one_line(place, tmp_path, run_cli):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9 " * 10)
    for overrides in ({"data.files": str(bad)}, {"mesh.expert": 2}):
        done = run_cli(["moe_jax", "train", *arguments(place, tmp_path / "run", overrides)])
        assert done.code == 1
        assert done.err.startswith("Error: ") and done.err.endswith(".\n"), done.err
        assert done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run").exists()


def test_the_good_run_is_good(place, tmp_path):
    """The control: a run without overrides is accepted."""
    run = prepare(
        small_config(place.files, **{"data.store": str(place.stores)}),
        tmp_path / "run",
        lambda line: None,
        jax.devices(),
    )
    assert run.mesh.size == 8


def test_text_that_changed_since_the_run_began(place, tmp_path):
    files = write_corpus(tmp_path / "text", documents=70)
    before, record = contents(place.saved), place.saved / "data.json"
    good = record.read_bytes()

    def refused(pattern: str, **overrides: object) -> None:
        with pytest.raises(UserError) as error:
            main(["train", *arguments(place, place.saved, overrides)])
        check_sentence(error, pattern)

    changed = "The text or the tokenizer of the run in .* has changed since it began"
    refused(f"{changed} .*data.json there: documents was 64, is 70", data__files=files)
    record.write_text('{"fingerprint": "of other text"}')  # as an older version wrote it
    refused(f"{changed} .*the fingerprint differs")
    record.write_bytes(good.replace(b"64", b"65"))
    refused(r"data\.json, which describes .* cannot be used .*differs from what was written")
    record.unlink()
    refused(r"data\.json, which describes .* cannot be used \(it is missing\): restore the file")
    record.write_bytes(good)
    assert contents(place.saved) == before


def test_the_first_run_of_two_that_start_at_once_is_seen_by_the_second(
    place, tmp_path, monkeypatch
):
    """The second run checks the files of the workdir only after it holds the lock."""
    workdir = tmp_path / "run"

    def after_the_first_run(folder: Path, say: Callable[[str], None]):
        shutil.copytree(place.saved, workdir)
        return lock_workdir(folder, say)

    monkeypatch.setattr("moe_jax.cli.train.lock_workdir", after_the_first_run)
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, workdir, {"seed": 7})])
    check_sentence(error, r"config\.seed is 7 but the run in this workdir has 0")
    assert contents(workdir) == contents(place.saved)


def test_a_workdir_in_use_is_not_looked_into(place):
    with lock_workdir(place.saved), pytest.raises(UserError) as error:
        main(["train", *arguments(place, place.saved, {"seed": 7})])
    check_sentence(error, "is in use by process")


@pytest.mark.lifecycle
def test_divergence_ends_the_run_and_is_never_saved(place, tmp_path, capsys):
    hot = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "train.steps": 12}
    often = {"checkpoint.every_steps": 1, "optimizer.warmup_steps": 0}
    code = main(["train", *arguments(place, tmp_path / "run", hot | often | ONE_LAYER)])
    assert code == DIVERGED
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {rows[-1]["loss"], rows[-1]["grad_norm"]} & {"nan", "inf"}
    assert rows[-1]["step"] not in (saved := Checkpoints(tmp_path / "run/checkpoints").steps())
    *_, advice, last = capsys.readouterr().out.splitlines()
    assert "diverged (" in advice and f"move {saved[0]}, " in advice and "samples" not in last


def test_adafactor_refuses_a_moment_dtype(place, tmp_path):
    given = {"optimizer.name": "adafactor", "optimizer.moment_dtype": "bfloat16"}
    with pytest.raises(UserError) as error:
        main(["train", *arguments(place, tmp_path / "run", given)])
    check_sentence(error, "optimizer.moment_dtype is 'bfloat16': adafactor does not support it")
