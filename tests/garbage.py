"""Nearly valid garbage: valid files in which bytes or JSON values were changed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

# JSON texts, not values: they include numbers beyond any float, and duplicate keys.
ODD = (
    *("null", "true", "false", "0", "-1", "1.5", "-0.0", "1e400", "-1e400", "NaN", "-Infinity"),
    *(str(2**n) for n in (31, 32, 40, 53, 63, 64)),
    *("9" * 400, "9" * 5000, "-" + "9" * 400),
    *('""', '"a"', r'"\ud800"', r'"\u0000"', r'"a\nb\u001b[2J"', f'"{"x" * 50_000}"'),
    *('"../../x"', '"/etc/hostname"', '"~"', '"."', r'"..\\x"'),
    *("[]", "{}", "[null]", "[[1]]", '{"": 1}', '{"a": 1, "a": 2}', '["a", 1]'),
    *("[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300, "[" * 100_000, '{"a":' * 100_000),
    *("", "{", "]", ",", "'a'"),
)


def paths(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside a JSON value."""
    yield above
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*above, key))


def _like(valid: Any, place: tuple) -> list[str]:
    """Texts of the same type as the value at `place`: odd ones, and values of other places."""
    values = [at(valid, other) for other in paths(valid)]
    old = at(valid, place)
    if isinstance(old, int | float):
        return [text for text in ODD if text[:1].isdigit() or text[:1] == "-" or text == "NaN"]
    first = '"' if isinstance(old, str) else "[" if isinstance(old, list) else "{"
    odd = [text for text in ODD if text.startswith(first)]
    return odd + [json.dumps(value) for value in values if type(value) is type(old)]


def at(value: Any, place: tuple) -> Any:
    """The value at one of `paths(value)`."""
    for key in place:
        value = value[key]
    return value


@st.composite
def changed_json(draw: st.DrawFn, valid: Any) -> bytes:
    """Draw `valid` with a few values replaced, or with keys removed or duplicated."""
    texts = {}
    for number in range(draw(st.integers(1, 3))):
        places = list(paths(valid))
        place = draw(st.sampled_from(places))
        how = draw(st.sampled_from(("like", "like", "exchange", "remove", "repeat")))
        text = draw(st.sampled_from(_like(valid, place) if how == "like" else ODD))
        mark = f"<<{number}>>"
        if not place:
            if how == "exchange" and draw(st.integers(0, 9)) == 0:
                return text.encode()
            continue
        valid = json.loads(json.dumps(valid))
        node = valid
        for key in place[:-1]:
            node = node[key]
        if how == "remove":
            del node[place[-1]]
        elif how in ("like", "exchange") or isinstance(node, list):
            node[place[-1]] = mark
        else:
            node[mark] = None
            texts[f"{json.dumps(mark)}: null"] = f"{json.dumps(place[-1])}: {text}"
        texts[json.dumps(mark)] = text
    found = json.dumps(valid)
    for mark, text in texts.items():
        found = found.replace(mark, text)
    return found.encode()


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw `valid` with bytes flipped, replaced, removed or inserted, most of them near its end."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        last = max(0, len(raw) - 1)
        place = draw(st.integers(0, last) | st.integers(max(0, last - 600), last))
        how = draw(st.sampled_from(("flip", "byte", "ones", "cut", "end", "insert", "copy")))
        if how == "flip" and raw:
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and raw:
            raw[place] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFE, 0xFF)))
        elif how == "ones":
            raw[place : place + 8] = b"\xff" * draw(st.sampled_from((1, 4, 8)))
        elif how == "cut":
            del raw[place : place + draw(st.sampled_from((1, 8, 100)))]
        elif how == "end":
            del raw[place:]
        elif how == "insert":
            raw[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif how == "copy":
            start = draw(st.integers(0, last))
            raw[place : place + 20] = raw[start : start + 20]
    return bytes(raw)


def json_file(valid: Any) -> st.SearchStrategy[bytes]:
    """A file with one JSON value that is nearly `valid`."""
    return changed_json(valid) | changed_bytes(json.dumps(valid).encode())


def lines_file(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """A file of JSON lines: some of the `rows`, and lines that are nearly rows."""
    right = [st.just(json.dumps(row).encode()) for row in rows]
    wrong = [json_file(row) for row in rows] + [st.binary(max_size=40)]
    lines = st.lists(st.one_of(*right, *wrong), max_size=5)
    return st.builds(
        lambda lines, end: b"\n".join(lines) + end, lines, st.sampled_from((b"\n", b""))
    )


def corpus_with_a_bad_record(folder: Path, kind: str) -> str:
    """Write two good files and one with a bad record; returns their glob."""
    folder.mkdir()
    for name in "abc":
        path, texts = folder / f"{name}.{kind}", [f"{name} {i} words" for i in range(300)]
        if kind == "jsonl":
            lines = [json.dumps({"text": text}) for text in texts]
            if name == "b":
                lines[41] = lines[41][:-1]
            path.write_text("\n".join(lines))
        else:
            more = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
            table = pyarrow.table({"text": texts})
            pyarrow.parquet.write_table(table, path, row_group_size=50, **more)
            if name == "b":
                raw = path.read_bytes()
                path.write_bytes(raw.replace(b"b 142 words", b"b 142 wOrds"))
    return f"{folder}/*.{kind}"
