"""`python -m moe_jax data` as a user runs it."""

import json
import re


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
    trained = run_cli([command[0], "train-bpe", command[1], "--vocab_size=270", "--output=t.json"])
    assert (trained.code, trained.err) == (0, "")
    assert json.loads((tmp_path / "t.json").read_text())["model"]["type"] == "BPE"
    done = run_cli([*command, "--workdir=runs/a", "--config.data.tokenizer=t.json"])
    assert (done.code, done.err) == (0, "")
    (path,) = re.findall(r"^store +(\S+)$", done.out, re.M)
    assert path.startswith(str(tmp_path / "runs" / "stores"))
    (fingerprint,) = re.findall(r"^fingerprint +([0-9a-f]{64})$", done.out, re.M)
    assert path.endswith(fingerprint[:16])
    assert re.search(
        r"^train +[\d,]+ tokens, \d+ documents, [1-9.]+ bytes a token$", done.out, re.M
    )
    assert re.search(r"^a/01 +[\d,]+ +[\d,]+$", done.out, re.M)
    assert len(done.out.split("10 samples")[1].splitlines()) == 11


def test_a_users_mistake_is_one_line(run_cli, corpus, tmp_path):
    write_config(tmp_path, corpus)
    (corpus / "a" / "01.txt").write_bytes(b"abc\xff")
    done = run_cli(["moe_jax", "data", "--config=run.py"])
    assert done.code == 1
    assert done.err.count("\n") == 1 and "01.txt is not UTF-8 at byte offset 3" in done.err
