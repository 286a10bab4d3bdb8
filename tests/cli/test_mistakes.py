"""Every wrong command line of every command gives one sentence, and nothing is written."""

import importlib
import io
import shlex
from pathlib import Path

import pytest
from old_workdir import unpack

from moe_jax.cli import commands
from moe_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"
GSHARD = f"--config={ROOT / 'configs' / 'gshard.py'}"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Make `run/`, a workdir with the record of a run, without starting devices."""
    return unpack(tmp_path_factory.mktemp("old"))


@pytest.fixture
def place(tmp_path, old, monkeypatch):
    """Make an empty folder, a file, and the workdir `run` in the current folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").symlink_to(old / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main(line: str) -> int | None:
    name, *arguments = shlex.split(line)
    module = importlib.import_module(f"moe_jax.cli.{name}")
    return module.main([f"moe_jax {name}", *arguments])


MISTAKES = [
    # ---- the config file
    ("train --workdir=w", "--config is missing"),
    ("train --confg=c.py --workdir=w", r"--confg is not a flag \(did you mean 'config'"),
    ("plan --confg c.py --topology=h200:1", r"--confg is not a flag \(did you mean 'config'"),
    ("train --config=folder --workdir=w", "'folder' is a folder"),
    ("bench --config=file", r"'file' must end in \.py"),
    ("doctor --config=~/c.py", "no file '.*/c.py'"),
    (f"train {TINY}:moe --workdir=w", "'dense' or none, not 'moe'"),
    (f"train {GSHARD}:moe --workdir=w", "ignores its argument: leave out ':moe'"),
    # ---- overrides
    (f"data {TINY} --config.model=3", r"config\.model is a group of keys"),
    (f"data {TINY} --config.model.moe={{}}", r"config\.model\.moe is a group of keys"),
    (f"data {TINY} --noconfig.model", r"config\.model is a group of keys"),
    (f"plan {TINY} --config.learning_rate=1", r"did you mean 'optimizer\.learning_rate'"),
    (f"bench {TINY} --config.model.num_experts=1", r"did you mean 'model\.moe\.num_experts'"),
    (f"train {TINY} --config.=3", r"config\. is not a config key"),
    (f"train {TINY} --config.train.steps[0]=3", r"did you mean 'train\.steps'"),
    (f"train {TINY} --noconfig.train.steps", r"did you mean 'config\.train\.steps'"),
    (f"train {TINY} --config.train.steps=1e3", r"--config\.train\.steps=1e3 .* type int"),
    (f"train {TINY} --config.seed=-1 --workdir=w", "seed is -1"),
    # ---- JSON
    (f"data {TINY} --config.data.mixture=", "is not JSON .*at character 0"),
    (f"data {TINY} --config.data.mixture", "is not JSON .*at character 0"),
    (f"data {TINY} --config.data.mixture='{{\"a\": }}'", "is not JSON .*at character 6"),
    (f"data {TINY} --config.data.mixture '{{\"a\": }}'", "is not JSON .*at character 6"),
    (f"data {TINY} --config.optimizer.options='{{b1: 2}}'", "is not JSON .*at character 1"),
    (f"data {TINY} --config.data.mixture=[1]", "is not a JSON object"),
    (f"data {TINY} --config.model.moe.options.gshard=3", "is not a JSON object"),
    (f"data {TINY} --config.data.mixture='{{\"a\": NaN}}'", "finite numbers"),
    (f"data {TINY} --config.data.mixture='{{\"a.b\": {{}}}}'", "without dots"),
    (f"data {TINY} --config.data.mixture=\"{{'a': 1, 2: 3}}\"", "use strings as keys"),
    (f'data {TINY} --config.data.mixture=\'{{"a": {{"files": true}}}}\'', r"a\.files is True"),
    (f"data {TINY} --config.data.mixture='{'[' * 5000}'", "is not JSON"),
    # ---- flags of all commands
    (f"train {TINY} --workdir=w --learning_rate=1", r"mean 'config\.optimizer\.learning_rate'"),
    (f"train {TINY} --workdir=w --steps=1", r"mean 'config\.train\.steps'"),
    (f"train {TINY} --workdir=w --init-from=x", "mean 'init_from'"),
    (f"train {TINY} --workdir=w --config-train-steps=1", r"mean 'config\.train\.steps'"),
    (f"train {TINY}", "--workdir is missing"),
    (f"train {TINY} --workdir", "Missing value for flag --workdir"),
    (f"train {TINY} --workdir=~no_such_user/w", "there is no such user"),
    (f"train {TINY} --workdir=w more", "'more' is not a flag"),
    (f"train {TINY} --workdir=w --flagfile=no", "--flagfile: .*no"),
    (f"train {TINY} --workdir=w --flagfile=folder", "--flagfile: .*folder"),
    ("results --workdir=run --devices=1.5", r"--devices=1\.5 .* type int"),
    ("results --workdir=run --devices=-1", "--devices=-1: give 1 to"),
    ("results --workdir=run --devices=99999999999999999999", "give 1 to 65536"),
    # ---- several processes
    (f"train {TINY} --workdir=w --process_id=2", "do not define a process"),
    (f"train {TINY} --workdir=w --process_count=-2", "do not define a process"),
    (
        f"train {TINY} --workdir=w --coordinator=a:99999 --process_count=2 --process_id=0",
        "no port from 1 to 65535",
    ),
    (
        f"train {TINY} --workdir=w --coordinator=a:0 --process_count=2 --process_id=0",
        "no port from 1 to 65535",
    ),
    (
        f"train {TINY} --workdir=w --coordinator=a:1 --process_count=2 --process_id=2",
        "--process_id=2 is not below",
    ),
    # ---- workdirs
    (f"train {TINY} --workdir=file", "cannot be written .*file is not a folder"),
    (f"train {TINY} --workdir=file/w", "cannot be written .*file is not a folder"),
    ("checkpoint", "--workdir is missing"),
    ("checkpoint --workdir=no", "has no checkpoints"),
    ("checkpoint --workdir=file", "has no checkpoints"),
    ("results --workdir=no", "is not a folder"),
    ("results --workdir=file", "is not a folder"),
    ("results --workdir=folder", "has no runs"),
    ("goodput --workdir=no", r"There is no no/goodput\.jsonl"),
    ("goodput --workdir=file", r"file/goodput\.jsonl cannot be read"),
    ("ledger --workdir=folder", r"ledger\.jsonl cannot be read \(no such file\)"),
    ("ledger --workdir=file", r"ledger\.jsonl cannot be read"),
    ("replay --workdir=folder --step=1", r"There is no folder/settings\.jsonl"),
    ("replay --workdir=file --step=1", r"settings\.jsonl cannot be read"),
    # ---- files that are written
    ("results --workdir=run --csv=folder", "--csv=folder cannot be written"),
    ("results --workdir=run --csv=no/a.csv", r"--csv=no/a\.csv cannot be written"),
    ("results --workdir=run --plot=folder", "--plot=folder cannot be written"),
    ("results --workdir=run --plot=no/a.png", r"--plot=no/a\.png cannot be written"),
    ("results --workdir=run --plot=a.foo", r"--plot=a\.foo cannot be written"),
    ("goodput --workdir=run --plot=folder", "--plot=folder cannot be written"),
    ("goodput --workdir=run --plot=file/a.png", r"--plot=file/a\.png cannot be written"),
    ("ledger --workdir=run --csv=folder", "--csv=folder cannot be written"),
    (f"plan {TINY} --topology=h200:1 --save=folder", "--save=folder cannot be written"),
    (f"plan {TINY} --topology=h200:1 --save=file/a", "--save=file/a cannot be written"),
    (f"data train-bpe {TINY}", "--output is missing"),
    (f"data train-bpe {TINY} --vocab_size=300 --output=a.txt", r"a\.txt must end in \.json"),
    (f"data train-bpe {TINY} --vocab_size=300 --output=file/a.json", "cannot be written"),
    # ---- values of single commands
    (f"data train-bpe {TINY} --vocab_size=-1 --output=a.json", "vocab_size is -1"),
    (f"data {TINY} trian-bpe", "'trian-bpe' is not a flag"),
    ("checkpoint --workdir=run --verify=maybe", "--verify=maybe .* type bool"),
    ("goodput --workdir=run --json=3", "--json=3 .* type bool"),
    ("ledger --workdir=run --layer=9", "--layer=9: .* has MoE layers 0 to 0"),
    ("ledger --workdir=run --layer=-2", "--layer=-2: .* has MoE layers 0 to 0"),
    ("ledger --workdir=run --from_step=-1", "--from_step=-1: give 0 or more"),
    ("ledger --workdir=run --from_step=99", "no step from 99 on"),
    ("replay --workdir=run", "--step=0: steps are counted from 1"),
    ("replay --workdir=run --step=x", "--step=x .* type int"),
    (f"bench {TINY} --steps=0", "--steps=0: give 1 or more"),
    (f"plan {TINY}", "--topology is missing"),
    (f"plan {TINY} --topology=h201:8", "--topology 'h201' is unknown .did you mean 'h200'"),
    (f"plan {TINY} --topology=v5p:4x4", "is not a size of v5p"),
    (f"plan {TINY} --topology=h200:0", "is not a size of h200"),
    (f"plan {TINY} --topology=h200:{'9' * 20} --search", "is not a size of h200"),
    (f"plan {TINY} --topology=v5p:999x999x999 --search", "more than 1,048,576 chips"),
    (f"plan {TINY} --topology=h200:1 --tokens=-1", "--tokens=-1: give a finite number above 0"),
    (f"plan {TINY} --topology=h200:1 --tokens=inf", "--tokens=inf: give a finite number above 0"),
    (f"plan {TINY} --topology=h200:1 --tokens=nan", "--tokens=nan: give a finite number above 0"),
    (f"plan {TINY} --topology=h200:1 --mesh=data", "--mesh=data: write AXIS=SIZE"),
    (f"plan {TINY} --topology=h200:1 --mesh=data=\u00b2", "write AXIS=SIZE"),
    (f"plan {TINY} --topology=h200:1 --mesh=data={'9' * 5000}", "write AXIS=SIZE"),
    (f"plan {TINY} --topology=h200:1 --mesh=data=0 --nocompile", r"mesh\.data is 0"),
    (f"doctor {TINY} --conformance=maybe", "--conformance=maybe .* type bool"),
    (f"doctor {TINY} --steps=-1", "--steps=-1: give a number of steps such as 30"),
    ("doctor --conformance --steps=30", "remove --steps or --conformance"),
    ("check more", "'more' is not a flag"),
]


@pytest.mark.parametrize(
    ("line", "sentence"), MISTAKES, ids=[line.replace(TINY, "TINY")[:60] for line, _ in MISTAKES]
)
def test_a_mistake_is_one_sentence(place, capsys, line, sentence):
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(UserError, match=sentence) as error:
        main(line)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert sorted(path.name for path in place.iterdir()) == before
    assert (place / "file").read_text() == "mine" and not list((place / "folder").iterdir())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]\nx\n", r"Line 2 of standard input is not a JSON list .*at character 0"),
        ('{"a": 1}\n', "Line 1 .*it is not a list"),
        ("[1]\n", "Line 1 .*it is not a string"),
    ],
)
def test_check_is_given_something_else(monkeypatch, text, sentence):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(UserError, match=sentence):
        main("check")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "'trian' is not a command of moe_jax (did you mean 'train'?)"),
        (["train-bpe"], "did you mean 'data train-bpe'?"),
        ([TINY], f"There is no command before {TINY}: use one of train, data,"),
        (["foo", "--help"], "'foo' is not a command"),
    ],
)
def test_no_such_command(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr("sys.argv", ["moe_jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("Error: ") and sentence in told and told.endswith(".\n")


def test_an_exit_in_the_config_file_is_not_ours(place, run_cli):
    (place / "c.py").write_text("import sys\n\ndef get_config():\n    sys.exit(0)\n")
    done = run_cli(["moe_jax", "data", "--config=c.py"], cwd=place)
    assert done.code == 1 and done.out == ""
    assert done.err == (
        "Error: --config=c.py: line 4 exits with 0: return instead, or raise an error.\n"
    )


def test_every_path_flag_knows_the_home_folder(place, monkeypatch):
    """The shell does not expand the `~` of --workdir=~/w."""
    monkeypatch.setenv("HOME", str(place))
    main("results --workdir=~/run --csv=~/a.csv --plot=~/a.svg")
    main("ledger --workdir=~/run --csv=~/b.csv")
    main("goodput --workdir=~/run --plot=~/b.svg")
    assert {p.name for p in place.iterdir()} >= {"a.csv", "a.svg", "b.csv", "b.svg"}
    names = {"workdir", "init_from", "save", "csv", "plot", "output", "compare"}
    every = [*commands.COMMON_FLAGS, *commands.TRAIN_BPE.flags]
    every += [flag for command in commands.COMMANDS.values() for flag in command.flags]
    assert {flag.name for flag in every if flag.path} == names


def test_a_bare_name_is_the_plots_own(place):
    main("goodput --workdir=run --plot=chart")
    assert (place / "chart").read_bytes().startswith(b"\x89PNG")
