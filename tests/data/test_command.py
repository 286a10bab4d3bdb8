"""Runs `python -m moe_jax data` as a user does."""

import json
import re

import pytest
from ml_collections import ConfigDict

from moe_jax.cli.mixture import add_mixture_keys
from moe_jax.errors import UserError


def write_config(tmp_path, corpus):
    (tmp_path / "run.py").write_text(f"""
from moe_jax.config import default_config

def get_config():
    config = default_config()
    config.data.source = "text"
    config.data.files = "{corpus}/*/*.txt"
    return config
""")


def test_builds_and_describes_a_store_with_a_new_tokenizer(run_cli, corpus, tmp_path):
    write_config(tmp_path, corpus)
    command = ["moe_jax", "data", "--config=run.py"]
    trained = run_cli(
        [*command[:2], "train-bpe", command[2], "--vocab_size=270", "--output=t.json"]
    )
    assert (trained.code, trained.err) == (0, "")
    assert json.loads((tmp_path / "t.json").read_text())["model"]["type"] == "BPE"
    done = run_cli([*command, "--workdir=runs/a", "--config.data.tokenizer=t.json"])
    assert (done.code, done.err) == (0, "")
    (path,) = re.findall(r"^store +(\S+)$", done.out, re.M)
    assert path.startswith(str(tmp_path / "runs" / "stores"))
    (fingerprint,) = re.findall(r"^fingerprint +([0-9a-f]{64})$", done.out, re.M)
    assert path.endswith(fingerprint[:16])
    pattern = r"^train +[\d,]+ tokens, \d+ documents, [\d.]+ bytes per token$"
    assert re.search(pattern, done.out, re.M)
    assert re.search(r"^a/01 +[\d,]+ +[\d,]+$", done.out, re.M)
    assert len(done.out.split("10 samples")[1].splitlines()) == 11


def test_entries_of_a_mixture_are_set_on_the_command_line():
    """Flags set keys of the file's entries, keys that it leaves out, and new entries."""

    def mixture(there: dict, *flags: str) -> dict:
        config = ConfigDict({"data": {"mixture": there}})
        config.lock()
        arguments = [f"--config.data.mixture.{flag}" for flag in flags]
        add_mixture_keys(config, arguments)
        return config.data.mixture.to_dict()

    web = {"web": {"files": "w/*", "weight": 1}}
    assert mixture(web) == web
    assert mixture(web, "web.field=body") == {"web": web["web"] | {"field": "text"}}
    assert mixture(web, "web.weight=0.5") == {"web": {"files": "w/*", "weight": 1.0}}
    assert isinstance(mixture(web, "web.weight=0.5")["web"]["weight"], float)
    assert mixture(web, "code.files=c/*", "code.weight", "2") == web | {
        "code": {"files": "", "weight": 1.0}
    }
    with pytest.raises(UserError, match=r"mixture\.web key 'wieght' is unknown .*'weight'"):
        mixture(web, "web.wieght=3")
    with pytest.raises(UserError, match=r"mixture\.my-code cannot be set by a flag"):
        mixture(web, "my-code.weight=3")


def test_a_mixture_of_the_command_line_alone(run_cli, corpus, tmp_path):
    write_config(tmp_path, corpus)
    (tmp_path / "run.py").write_text(
        (tmp_path / "run.py").read_text().replace("config.data.f", "#")
    )
    flags = [f"--config.data.mixture.{n}.files={corpus}/{n}/*.txt" for n in "ab"]
    flags += ["--config.data.mixture.a.weight=3"]
    done = run_cli(["moe_jax", "data", "--config=run.py", "--workdir=runs/a", *flags])
    assert (done.code, done.err) == (0, "")
    assert "mixture      a 75.0%, b 25.0%" in done.out


def test_a_users_mistake_is_one_line(run_cli, corpus, tmp_path):
    write_config(tmp_path, corpus)
    (corpus / "a" / "01.txt").write_bytes(b"abc\xff")
    done = run_cli(["moe_jax", "data", "--config=run.py"])
    assert done.code == 1
    assert done.err.count("\n") == 1 and "01.txt is not UTF-8 at byte offset 3" in done.err
