"""Refuses habits of wording that readers had to read twice: CONTRIBUTING.md has the rules."""

import bisect
import dataclasses
import functools
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("moe_jax", "launch", "configs", "benchmarks", "tests", "docs", ".ci")
PLACES += ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "setup.cfg", "pyproject.toml")
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".yml", ".cfg", ".toml")
EXCLUDED = ("tests/test_plain_words.py", "docs/log/")  # the patterns; what was written then

COUNTED = (
    r"tokens?|rows?|bytes|seconds|steps|slots|FLOPs|[KMG]i?B|ms|words|lines|documents|files|times"
    r"|parameters|matrices|copies|rates?|programs?|sends?|chips?|GPUs?"
)
UNIT = (
    r"token|step|second|minute|hour|day|week|expert|group|row|device|layer|process|host|chip|GPU"
    r"|worker|shard|position|batch|run|microbatch|matrix"
)


@dataclasses.dataclass(frozen=True)
class Habit:
    """A pattern (a space in it is any white space), what to write instead, one example of each."""

    pattern: str
    instead: str
    bad: str
    good: str

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern.replace(" ", r"\s+"), re.IGNORECASE)


HABITS = (
    Habit(
        r"\bnobody\b",
        "name the thing: 'padding rows', 'no process', 'not used'",
        "These rows are nobody's.",
        "These rows are padding.",
    ),
    Habit(
        r"\bno one'?s?\b",
        "name the thing: 'no process', 'no gradient'",
        "The sums are in no one's derivative.",
        "No backward rule needs the sums.",
    ),
    Habit(
        r"\bwhoever\b",
        "name who: 'the lead process', 'the caller'",
        "Whoever decides writes the file.",
        "The lead process writes the file.",
    ),
    Habit(
        r"\b(way|sent|goes|brought|travels?) home\b",
        "'combine', 'returned to its source'",
        "The weights are applied on the way home.",
        "The weights are applied in the combine.",
    ),
    Habit(
        r"\banew\b",
        "'again', 'from step 0', 'reset'",
        "The count starts anew.",
        "The count is reset.",
    ),
    Habit(
        r"\bmend(s|ed|ing)?\b",
        "'fix', 'repair', 'correct'",
        "Mend the config and run this again.",
        "Fix the config and run this again.",
    ),
    Habit(
        r"\bthere and back\b",
        "'dispatch and combine', 'round trip'",
        "All-to-alls: there and back.",
        "All-to-alls: dispatch and combine.",
    ),
    Habit(
        r"\b(hears?|heard) of\b",
        "'knows', 'is told', 'receives'",
        "The process hears of the loss.",
        "The process is told about the loss.",
    ),
    Habit(
        r"\bso (many|few|often)\b(?![^.;:]*\bthat\b)",
        "the number, or the name of the quantity: 'up to N', '`rows` rows'",
        "The kernel multiplies so many rows.",
        "There are so many experts that the router dominates.",
    ),
    Habit(
        r"\bas yet\b",
        "'yet', 'so far', 'not implemented'",
        "It is not measured as yet.",
        "It is not measured yet.",
    ),
    Habit(
        rf"\b({COUNTED}) an? ({UNIT})\b",
        "'per'",
        "It sees 40 tokens\n  an expert.",
        "It sees 40 tokens per expert.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Passage:
    """Text that is read as one: a file, a comment of several lines, strings beside each other."""

    text: str
    starts: tuple[int, ...]  # where in `text` each of its lines begins
    numbers: tuple[int, ...]  # the number of that line in the file

    def line(self, position: int) -> int:
        """The line of the file at a position of the text."""
        return self.numbers[bisect.bisect_right(self.starts, position) - 1]


def joined(lines: list[tuple[int, str]]) -> Passage:
    """A passage of (number of its line, text) pairs; each text keeps its own line breaks."""
    split = [(first + i, s) for first, text in lines for i, s in enumerate(text.split("\n"))]
    lengths = [len(text) + 1 for _, text in split]
    starts = tuple(itertools.accumulate(lengths, initial=0))[:-1]
    return Passage("\n".join(t for _, t in split), starts, tuple(number for number, _ in split))


def python_passages(source: str) -> Iterator[Passage]:
    """Comments and strings of Python code; names and other code are left out."""
    literal: list[tuple[int, str]] = []
    comment: list[tuple[int, str]] = []
    inside = 0  # f-strings, in each other: Python 3.12 and later cut them into parts
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, line = tokenize.tok_name[token.type], token.start[0]
        inside += {"FSTRING_START": 1, "FSTRING_END": -1}.get(kind, 0)
        if kind == "COMMENT":
            # One that stands alone goes on in the next line; one behind code does not.
            alone = not token.line[: token.start[1]].strip()
            if comment and not (alone and comment[-1][0] == line - 1):
                yield joined(comment)
                comment = []
            comment.append((line, token.string.lstrip("# ")))
        elif kind in ("STRING", "FSTRING_MIDDLE"):
            text = re.sub(r"\\[nt]", "  ", token.string)
            quoted = re.fullmatch(r"(\w*)(\"\"\"|'''|\"|')(.*)\2", text, re.DOTALL)
            if quoted:
                text = quoted[3]
                if "f" in quoted[1].lower():  # Python 3.11 has code and all in one token
                    text = re.sub(r"\{[^{}]+\}", "{}", text)
            literal.append((line, text))
        elif inside and token.string == "{":
            literal.append((line, "{}"))
        elif not inside and kind not in ("NL", "COMMENT", "FSTRING_END") and literal:
            yield joined(literal)
            literal = []
    yield from (joined(lines) for lines in (literal, comment) if lines)


def passages(path: Path) -> Iterator[Passage]:
    """Python: strings and comments. Any other file: all of it, as one."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_passages(source)
        return
    lines = source.split("\n")
    if path.name == "CONTRIBUTING.md":  # the rows of its table of pairs show the habits
        lines = ["" if line.startswith("|") else line for line in lines]
    yield joined([(number, re.sub(r"^\s*[#>] ?", "", s)) for number, s in enumerate(lines, 1)])


def habits_in(passages: Iterator[Passage]) -> Iterator[str]:
    """A sentence for each habit in some passages: the line, the words, what to write instead."""
    hits = [
        (passage.line(match.start()), " ".join(match[0].split()), habit.instead)
        for passage in passages
        for habit in HABITS
        for match in habit.regex.finditer(passage.text)
    ]
    yield from (f"{line}: {words!r}: write {instead}" for line, words, instead in sorted(hits))


def read_files(place: str) -> list[Path]:
    """The files of a place, which is a folder or one file."""
    root = ROOT / place
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES)
    return [p for p in files if not p.relative_to(ROOT).as_posix().startswith(EXCLUDED)]


@pytest.mark.parametrize("place", PLACES)
def test_text_is_free_of_the_habits(place):
    files = read_files(place)
    found = [f"{p.relative_to(ROOT)}:{hit}" for p in files for hit in habits_in(passages(p))]
    assert files
    assert not found, "\n".join([f"{len(found)} in {place}:", *found])


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.bad.split()[-1].strip("."))
def test_each_habit_is_found_and_its_replacement_is_not(habit):
    hits = list(habits_in(iter([joined([(7, habit.bad)])])))
    assert len(hits) == 1 and hits[0].startswith("7: ") and habit.instead in hits[0]
    assert not list(habits_in(iter([joined([(7, habit.good)])])))


PLANTED = '''
"""Sees 40 tokens
an expert."""
anew = home = 1
FIRST = f"{anew} slots " f"an expert, tokens {anew} a step"
SECOND = "three words" ", " 'a "week" of rows\\na step'
# A comment of which the rows
# a step stand in two lines.
THIRD = {"rows": "a step"}  # rows
FOURTH = 1  # a step
'''


def test_python_strings_and_comments_are_read_and_code_is_not():
    hits = list(habits_in(python_passages(PLANTED)))
    assert [hit.partition(": write")[0] for hit in hits] == [
        "2: 'tokens an expert'",
        "5: 'slots an expert'",
        "6: 'rows a step'",
        "7: 'rows a step'",
    ]


@pytest.mark.parametrize("name", ["page.md", "script.sh", "job.yaml", "setup.cfg", "project.toml"])
def test_other_files_are_read_across_their_line_breaks(tmp_path, name):
    (tmp_path / name).write_text("# It takes 3 ms\n# a step.\n\nfast, then slow anew\n")
    hits = list(habits_in(passages(tmp_path / name)))
    assert [hit.split(":")[0] for hit in hits] == ["1", "4"]


def test_pairs_in_contributing_may_show_the_habits(tmp_path):
    path = tmp_path / "CONTRIBUTING.md"
    path.write_text("| before | after |\n| rows of nobody | padding rows |\n\nRows of nobody.\n")
    assert [hit.split(":")[0] for hit in habits_in(passages(path))] == ["4"]
