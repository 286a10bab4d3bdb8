"""python -m moe_jax.cli.keys > docs/configuration.md: the reference of every config key."""

import json
from typing import Any

from moe_jax.keys import Key, Section, sections

HEAD = """\
# Configuration

Every key of a config, made from the dataclasses that hold them by
`python -m moe_jax.cli.keys > docs/configuration.md`; edit the comments and bounds there.
`python -m moe_jax train --config=FILE --help` prints the same with the values of a config file, and
the knobs of the routers and dispatch paths that it registers.

A key is set

- in a config file: `config.train.steps = 400` after `config = default_config()`
  (`configs/tiny.py` is one);
- on a command line, which wins over the file: `--config.train.steps=400`,
  `--config.model.dense=true`; a mapping as JSON:
  `--config.data.mixture='{"web": {"files": "web/*.jsonl"}}'`;
- in a program: `moe_jax.load_config("configs/tiny.py", {"train.steps": 400})`
  ([library.md](library.md));
- for each run of a sweep: `hyper.sweep("config.train.steps", [200, 400])` (`configs/sweeps/`).

A value keeps the type of its key; a whole number is welcome where a float is asked for, numbers are
finite, and no whole number is larger than 2**40. What is unknown, of another type or out of bounds
is refused in one sentence before anything is compiled.

The column *decides* says what a key changes: the **weights** (what the parameters compute, and
their shapes), the **data** (the tokens that a step sees, and how they are grouped), the
**training** (how a step changes the parameters), or only the **run** (places, speed, what is
evaluated and kept). A run that resumes may change the last two and is told so; one that would
change the first two is refused.
"""
COLUMNS = ("key", "type", "default", "decides", "meaning", "constraint")


def main() -> None:
    """Prints the page."""
    print(page(), end="")


def page() -> str:
    """docs/configuration.md as it should be."""
    return "\n".join([HEAD, *map(_section, sections())])


def shown(value: Any) -> str:
    """A value as a config file writes it."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _section(section: Section) -> str:
    """A heading and a table."""
    level = "##" if section.name.count(".") < 2 else "###"
    head = [f"{level} `{section.name}`", "", _cell(section.meaning)]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(_row, section.keys)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*(head if section.name else ["## The whole run"]), "", *lines, ""])


def _row(key: Key) -> list[str]:
    default = f"`{shown(key.default)}`"
    return [
        f"`{key.name}`",
        key.type,
        default,
        key.decides,
        _cell(key.meaning),
        _cell(key.constraint),
    ]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")


if __name__ == "__main__":
    main()
