"""python -m moe_jax.cli.keys > docs/configuration.md: write the reference of every config key."""

import json
from typing import Any

from moe_jax.keys import Key, Section, sections

HEAD = """\
# Configuration

After this page you can set any key of a config. The page is made from the dataclasses that hold
the keys, by `python -m moe_jax.cli.keys > docs/configuration.md`: edit comments and bounds there.
`python -m moe_jax train --config=FILE --help` prints the same with the values of a config file, and
the knobs of the routers and dispatch paths that it registers.

Set a key

- in a config file: `config.train.steps = 400` after `config = default_config()`
  (`configs/tiny.py` is an example);
- on a command line, which overrides the file: `--config.train.steps=400`,
  `--config.model.dense=true`; a mapping as JSON:
  `--config.data.mixture='{"web": {"files": "web/*.jsonl"}}'`;
- in a program: `moe_jax.load_config("configs/tiny.py", {"train.steps": 400})`
  ([library.md](library.md));
- for each run of a sweep: `hyper.sweep("config.train.steps", [200, 400])` (`configs/sweeps/`).

A value must have the type of its key, but an integer is accepted for a float. Numbers must be
finite, and integers at most 2**40. A key that is unknown, or a value of the wrong type or out of
bounds, is refused in one sentence before anything is compiled.

The column *decides* says what a key changes: the **weights** (the function and the shapes of the
parameters), the **data** (the tokens of each step, and how they are grouped), the **training** (how
a step updates the parameters), or only the **run** (paths, speed, what is evaluated and kept). A
resumed run may change keys of training and run, and lists those that it changed; it is refused if
it changes keys of weights or data.
"""
COLUMNS = ("key", "type", "default", "decides", "meaning", "constraint")


def main() -> None:
    """Print the page."""
    print(page(), end="")


def page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([HEAD, *map(_section, sections())])


def shown(value: Any) -> str:
    """Format a value as a config file writes it."""
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
