"""The corpus of Debian packages, from tiny packages and a stand-in for apt-get; no network."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest

from benchmarks.corpus import __main__ as command
from benchmarks.corpus import shards
from benchmarks.corpus.build import build
from benchmarks.corpus.markup import html_text, mallard_text
from benchmarks.corpus.packages import licence_names
from benchmarks.corpus.reading import decode
from benchmarks.corpus.sources import FULL, SMALL, Rule, Source, by_language, html
from benchmarks.corpus.split import PIECE, split_entries, split_metamath
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.errors import UserError

# Does for the packages in DEBS what apt-get does for those of a mirror.
APT_GET = """#!/bin/sh
for name; do :; done
echo "$@" >> DEBS/log
file=$(cd DEBS && ls "$name"_*.deb 2>/dev/null)
if [ -z "$file" ]; then echo "E: Unable to locate package $name" >&2; exit 100; fi
case "$*" in
*--print-uris*)
  [ -e "$file" ] && exit 0  # apt prints nothing for a file of the current folder
  sha=$(sha256sum "DEBS/$file")
  echo "'http://mirror/$file' $file $(wc -c < "DEBS/$file") SHA256:${sha%% *}" ;;
*) cp "DEBS/$file" . ;;
esac
"""
COPYRIGHT = "Format: dep-5\n\nFiles: *\nLicense: GPL-2\n text\n\nFiles: a\nLicense: Expat\n"
FREE = "see copyright/x.txt"  # of a copyright file in free form
CODE = Source("code", (Rule("c", r"\.c$"), Rule("notes", r"\.txt$")))
PAGES = Source("pages", (Rule("notes", r"\.html$", html),))


def text_of(name: str, words: int = 60) -> str:
    """A text of more than 200 bytes."""
    return " ".join(f"{name}{number}" for number in range(words)) + "\n"


class Mirror:
    """Debian packages in a folder, and the folder in which corpora are made of them."""

    def __init__(self, root: Path):
        self.root, self.debs = root, root / "debs"
        self.debs.mkdir()
        self.lines: list[str] = []

    def add(self, name: str, files: dict[str, str | bytes], version: str = "1.0-1") -> None:
        tree = self.root / "trees" / name
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nDescription: d\n"
        control += "Maintainer: A <a@b.c>\n"
        every = {"DEBIAN/control": control, f"usr/share/doc/{name}/copyright": COPYRIGHT}
        for path, content in (every | files).items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            raw = content.encode() if isinstance(content, str) else content
            (tree / path).write_bytes(raw)
        deb = self.debs / f"{name}_{version}_all.deb"
        make = ["dpkg-deb", "-Znone", "--root-owner-group", "--build", str(tree), str(deb)]
        subprocess.run(make, check=True, capture_output=True)

    def build(self, *sources: Source, name: str = "out", limit: int = 0) -> Path:
        out = self.root / name
        build(sources, out, self.root / "cache", limit, self.lines.append)
        return out


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Mirror:
    made = Mirror(tmp_path)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "apt-get"
    program.write_text(APT_GET.replace("DEBS", str(made.debs)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return made


def rows(out: Path, domain: str) -> list[dict[str, str]]:
    found = []
    for path in sorted(out.glob(f"{domain}-*.parquet")):
        found += pyarrow.parquet.read_table(path, partitioning=None).to_pylist()
    return found


def described(out: Path) -> dict:
    return json.loads((out / "corpus.json").read_text())


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_rows_have_their_domain_path_and_package(mirror):
    mirror.add("code", {"usr/src/b.c": text_of("b"), "usr/src/a.c": text_of("a")}, "1:2.0-3")
    out = mirror.build(CODE)
    common = {"domain": "c", "package": "code=1:2.0-3"}
    assert rows(out, "c") == [
        {"text": text_of("a"), "path": "usr/src/a.c", **common},
        {"text": text_of("b"), "path": "usr/src/b.c", **common},
    ]
    assert [path.name for path in out.glob("*.parquet")] == ["c-00000.parquet"]


@pytest.mark.parametrize("limit", [0, 5000])
def test_the_same_packages_give_the_same_bytes(mirror, limit):
    mirror.add("code", {f"usr/src/{i}.c": text_of(f"c{i}-") for i in range(30)})
    mirror.add("pages", {"usr/a.html": f"<p>{text_of('page')}</p>"})
    first = mirror.build(CODE, PAGES, name="first", limit=limit)
    second = mirror.build(CODE, PAGES, name="second", limit=limit)
    assert files_of(first) == files_of(second)
    for domain in described(first)["domains"].values():
        for name, digest in domain["shards"].items():
            assert hashlib.sha256((first / name).read_bytes()).hexdigest() == digest


def test_duplicates_short_documents_and_other_bytes_are_left_out_and_counted(mirror):
    first = {"usr/a.c": text_of("a"), "usr/b.c": text_of("a"), "usr/c.c": "int x;\n"}
    mirror.add("code", first | {"usr/d.c": b"\xff\xfe" * 200, "usr/e.c": text_of("e") + "\0"})
    mirror.add("pages", {"usr/a.html": f"<p>{text_of('a').strip()}\n</p>", "usr/a.txt": ""})
    again = Source("pages", (Rule("other", r"\.html$", lambda page: [text_of("a")]),))
    out = mirror.build(CODE, again)
    assert [row["path"] for row in rows(out, "c")] == ["usr/a.c"]
    left_out = {"not_text": 2, "shorter_than_200_bytes": 1, "duplicate": 2}
    assert described(out)["left_out"] == left_out
    assert list(described(out)["domains"]) == ["c"]
    assert any("duplicate 2" in line for line in mirror.lines)


def test_a_missing_package_is_named_and_the_rest_is_built(mirror):
    mirror.add("code", {"usr/a.c": text_of("a"), "usr/a.txt": text_of("t")})
    gone = Source("gone", (Rule("poems", r"\.poem$"), Rule("notes", r"\.txt$")))
    out = mirror.build(gone, CODE)
    sentence = next(line for line in mirror.lines if line.startswith("gone is missing"))
    assert sentence == (
        "gone is missing (Unable to locate package gone): the corpus is built without poems and "
        "with less of notes. Run apt-get update on a Debian 12 (bookworm) machine and repeat the "
        "command."
    )
    assert described(out)["missing"] == {"gone": "Unable to locate package gone"}
    assert sorted(described(out)["domains"]) == ["c", "notes"]


def test_no_domain_is_an_error_that_leaves_no_folder(mirror, monkeypatch, capsys):
    monkeypatch.setattr(command, "FULL", (CODE, PAGES))
    out = mirror.root / "out"
    flags = [f"--out={out}", f"--cache={mirror.root / 'cache'}"]
    assert command.main(flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("No domain has a document: code is missing (Unable to locate") and (
        "pages is missing" in err and "apt-get update" in err and err.count("\n") == 1
    )
    assert not out.exists() and not out.with_name("out.unfinished").exists()


def test_a_machine_without_apt_get_is_told_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main([f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("apt-get is not on this machine: run this on Debian 12")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_exists_is_refused_and_kept(mirror):
    mirror.add("code", {"usr/a.c": text_of("a")})
    before = files_of(mirror.build(CODE))
    with pytest.raises(UserError, match="out exists: name a new folder"):
        mirror.build(CODE)
    assert files_of(mirror.root / "out") == before


def test_a_package_in_the_cache_is_downloaded_again_only_if_it_is_damaged(mirror):
    mirror.add("code", {"usr/a.c": text_of("a")})

    def downloads() -> int:
        return (mirror.debs / "log").read_text().split("\n").count("download code")

    mirror.build(CODE, name="first")
    mirror.build(CODE, name="second")
    assert downloads() == 1
    cached = mirror.root / "cache" / "code_1.0-1_all.deb"
    raw = bytearray(cached.read_bytes())
    raw[-600] ^= 1
    cached.write_bytes(raw)
    mirror.build(CODE, name="third")
    assert downloads() == 2
    assert files_of(mirror.root / "third") == files_of(mirror.root / "first")


def test_our_reader_takes_each_domain_by_its_files(mirror):
    mirror.add("code", {"usr/a.c": text_of("a"), "usr/b.c": text_of("b"), "c.txt": text_of("c")})
    out = mirror.build(CODE)
    names = ("c", "notes")
    mixture = {name: {"files": f"{out}/{name}-*.parquet", "weight": 0.5} for name in names}
    streams = find_streams(DataConfig(mixture=mixture))
    found = {stream.name: [doc.text for doc in stream.documents()] for stream in streams}
    assert found == {"c": [text_of("a"), text_of("b")], "notes": [text_of("c")]}


def test_an_archive_in_a_package_is_read_member_by_member(mirror):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name in ("top/z.c", "top/a.c", "top/readme"):
            member = tarfile.TarInfo(name)
            member.size = len(text_of(name))
            archive.addfile(member, io.BytesIO(text_of(name).encode()))
        archive.addfile(_link("top/link.c", "a.c"))
    mirror.add("code", {"usr/src/top.tar.xz": packed.getvalue()})
    found = rows(mirror.build(CODE), "c")
    assert [row["path"] for row in found] == [f"usr/src/top.tar.xz/top/{n}.c" for n in "za"]
    assert found[1]["text"] == text_of("top/a.c")


def _link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_a_limit_keeps_the_documents_with_the_smallest_digests(mirror):
    texts = [text_of(f"w{i}-", 60 + 7 * (i % 9)) for i in range(40)]
    files: dict[str, str | bytes] = {f"usr/{i}.c": text for i, text in enumerate(texts)}
    # More than a quarter of the limit, so they are not taken.
    files |= {f"usr/large{i}.c": text_of(f"large{i}-", 200) for i in range(20)}
    mirror.add("code", files)
    kept, size = [], 0
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        size += len(text)
        if size > 6000:
            break
        kept.append(text)
    out = mirror.build(CODE, limit=6000)
    assert 5 < len(kept) < 30
    assert [row["text"] for row in rows(out, "c")] == kept
    assert described(out)["domains"]["c"]["bytes"] == sum(map(len, kept))


def test_a_domain_is_cut_into_shards_of_a_size(mirror, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1200)
    monkeypatch.setattr(shards, "GROUP_ROWS", 2)
    mirror.add("code", {f"usr/{i}.c": text_of(f"c{i}-") for i in range(9)})
    out = mirror.build(CODE)
    paths = sorted(out.glob("c-*.parquet"))
    sizes = [
        sum(len(text) for text in pyarrow.parquet.read_table(path)["text"].to_pylist())
        for path in paths
    ]
    assert len(sizes) > 2 and max(sizes) <= 1200
    assert [path.name for path in paths] == [f"c-{i:05d}.parquet" for i in range(len(sizes))]
    assert len(rows(out, "c")) == 9
    assert pyarrow.parquet.read_metadata(paths[0]).row_group(0).num_rows == 2


def test_what_is_not_translated_stays_in_english(mirror):
    both, german = f"<p>{text_of('page')}</p>", f"<p>{text_of('seite')}</p>"
    pages = {"usr/html/de-DE/a.html": both, "usr/html/en-US/a.html": both}
    pages |= {"usr/html/de-DE/b.html": both + german, "usr/html/ar-MA/b.html": german * 2}
    mirror.add("handbook", {**pages})
    out = mirror.build(Source("handbook", by_language("/html", r"\.html", html)))
    found = {name: domain["documents"] for name, domain in described(out)["domains"].items()}
    assert found == {"lang_de": 1, "lang_en": 1, "languages": 1}
    assert rows(out, "lang_en")[0]["path"] == "usr/html/en-US/a.html"
    assert rows(out, "lang_de")[0]["text"] == text_of("seite").strip()


def test_licences_bytes_and_documents_are_listed_per_package(mirror):
    mirror.add("code", {"usr/a.c": text_of("a"), "usr/b.c": text_of("b")})
    out = mirror.build(CODE)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (out / "LICENSES.md").read_text().splitlines()
        if line.startswith("| code")
    ]
    size = str(2 * len(text_of("a")))
    assert cells == [["code", "1.0-1", "Expat, GPL-2", "c", size, "2"]]
    assert (out / "copyright" / "code.txt").read_text() == COPYRIGHT
    package = described(out)["packages"]["code"]
    deb = (mirror.debs / "code_1.0-1_all.deb").read_bytes()
    assert package["sha256"] == hashlib.sha256(deb).hexdigest()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (COPYRIGHT, "Expat, GPL-2"),
        ("License: see below\n `/usr/share/common-licenses/GPL-2'.\n", FREE + " (refers to GPL-2)"),
        ("Public domain.\n", FREE),
    ],
)
def test_licences_are_fields_or_the_file(tmp_path, text, names):
    folder = tmp_path / "usr/share/doc/x"
    folder.mkdir(parents=True)
    (folder / "copyright").write_text(text)
    assert licence_names(tmp_path, "x") == names


def test_the_licence_of_a_package_without_a_file_is_that_of_another(tmp_path):
    folder = tmp_path / "usr/share/doc/x"
    folder.parent.mkdir(parents=True)
    folder.symlink_to("../doc/libx-common")
    assert licence_names(tmp_path, "x") == "that of libx-common"


PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p {}</style>
<body><nav><ul><li>Menu</ul></nav><div class="related"><div>Up</div>next</div>
<div role="main"><h1>Title<a class="headerlink" href="#x">&para;</a></h1>
<p>One &amp;
 <b>two</b>.<p>Three<br>four
<pre>def f():
    return  1
</pre><table><tr><td>a</td><td>b</td></tr></table><script>x()</script></div>
<div>after</div><footer>Copyright</footer></body></html>"""


def test_html_is_stripped_to_the_text_of_its_main_part():
    text = "Title\n\nOne & two.\n\nThree\nfour\n\ndef f():\n    return  1\n\na b"
    assert html_text(PAGE) == text


def test_html_without_a_main_part_keeps_its_body():
    page = PAGE.replace(' role="main"', "")
    assert html_text(page) == f"{html_text(PAGE)}\n\nafter"


def test_mallard_keeps_titles_and_leaves_out_what_is_about_the_page():
    page = """<page xmlns="x" id="a"><info><desc>no</desc><license><p>no</p></license></info>
    <title>Use <gui>Files</gui></title><p>First   line.</p>
    <list><item><p>one</p></item></list><screen>a  b
c</screen></page>"""
    assert mallard_text(page) == "Use Files\n\nFirst line.\n\none\n\na  b\nc"


def test_dictionaries_are_cut_before_a_headword():
    entries = [f"word{i}\n   n 1: {'meaning ' * 30}\n\n   2: other\n" for i in range(200)]
    parts = list(split_entries("".join(entries)))
    assert "".join(parts) == "".join(entries) and len(parts) > 3
    assert all(part.startswith("word") for part in parts)
    assert all(PIECE <= len(part) < 2 * PIECE for part in parts[:-1])


def test_metamath_is_cut_before_comments_outside_blocks_and_statements():
    text = ""
    for length in range(10, 90):  # so that every line is once the first after PIECE characters
        proof = "( a b c ) ABC " * length
        text += f"$( Says $p it. $)\nt1 $p |- x $= {proof}\n$( In proof. $)\n{proof} $.\n"
        text += f"${{\nh $e |- y $.\n$( In block. $)\nt2 $p |- z $= {proof} $.\n$}}\n"
    parts = list(split_metamath(text))
    assert "".join(parts) == text and len(parts) > 3
    assert all(part.startswith("$( Says") for part in parts)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xef\xbb\xbfgr\xc3\xbcn", "grün"),
        (b'<meta charset="iso-8859-1"> gr\xfcn', '<meta charset="iso-8859-1"> grün'),
        (b"# -*- coding: latin-1 -*-\n# gr\xfcn", "# -*- coding: latin-1 -*-\n# grün"),
        (b"=encoding latin1\n\ngr\xfcn", "=encoding latin1\n\ngrün"),
        (b"gr\xfcn", None),
        (b"# coding: rot13\n\xfc", None),
        (b"# coding: unicode_escape\n\xfc", None),
        (b"# coding: nothing\n\xfc", None),
        (b"a\0b", None),
        (b"\xc3\xbc " * 9000 + b"it\x92s", "ü " * 9000 + "it\u2019s"),
        (b"\xc3\xbc " * 900 + b"it\x92s", None),
    ],
)
def test_a_file_is_utf_8_or_what_it_declares(raw, text):
    assert decode(raw) == text


def test_the_small_corpus_has_domains_of_the_full_one():
    full, small = ({d for source in plan for d in source.domains} for plan in (FULL, SMALL))
    assert small < full
    assert {"kernel_c", "proofs", "dictionaries", "lang_de"} < small
