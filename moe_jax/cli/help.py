"""python -m moe_jax train --config=FILE --help: list the keys of a config and their values."""

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.text

from moe_jax.cli.commands import Command
from moe_jax.cli.keys import shown
from moe_jax.cli.parse import parse
from moe_jax.config import from_config_dict, to_dict
from moe_jax.keys import Key, sections

COLUMNS = 110  # terminals at least this wide show a key and its meaning on one line,
LEFT = 50  # with the meaning in this column
BELOW = 6  # column of the meaning on narrower terminals, on the line below the key


def main(text: str, command: Command, argv: Sequence[str]) -> None:
    """Print the help text of a command, then the keys of the config that its arguments name.

    Args:
      text: the help text of the command and its flags.
      command: its entry in the table of commands, with --workdir optional.
      argv: the program's name and its arguments, without --help.

    Raises:
      UserError: anything wrong with the arguments or with the config file.
    """
    parsed = parse(argv, command)
    values = to_dict(from_config_dict(parsed.config))
    mixture = values["data"]["mixture"]
    console = rich.console.Console(file=sys.stdout, highlight=False)
    width = console.width if console.is_terminal else 0
    console.print(text, markup=False, soft_wrap=True)
    console.print(
        f"\nKeys of {parsed.flags.config}, as --config.KEY=VALUE sets them:", markup=False
    )
    for section in sections(mixture or ("NAME",)):
        title = f"{section.name}: {section.meaning}" if section.name else "The whole run:"
        console.print("\n" + textwrap.fill(title, width or sys.maxsize), style="bold", markup=False)
        for line in _lines([_entry(key, values) for key in section.keys], width):
            console.print(line, soft_wrap=True)


def _entry(key: Key, values: Mapping[str, Any]) -> tuple[str, str, str]:
    """A key with its value, its default if the value differs, and its type and meaning."""
    value = _value(key, values)
    kind = f"{key.type}, {key.constraint}" if key.constraint else key.type
    text = f"{kind}. {key.meaning}".strip()
    # Show only the names of a mapping of mappings: each inner mapping has its own section.
    if isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values()):
        return f"{key.name}={{{', '.join(value)}}}", "", text
    default = "" if value == key.default else f"  (default {shown(key.default)})"
    return f"{key.name}={shown(value)}", default, text


def _value(key: Key, values: Mapping[str, Any]) -> Any:
    """The value that the config sets, or the default if it leaves the key out."""
    found: Any = values
    for name in key.name.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return key.default
        found = found[name]
    return found


def _lines(entries: Sequence[tuple[str, str, str]], width: int) -> Iterator[rich.text.Text]:
    """The lines of a section on a terminal of `width` columns; 0: a file, so do not wrap."""
    indent = LEFT if width >= COLUMNS else BELOW
    for head, default, text in entries:
        first = rich.text.Text("  ").append(head, style="bold cyan").append(default, style="dim")
        wrapped = textwrap.wrap(text, width - indent) if width > 2 * BELOW else [text]
        if indent == LEFT and len(first) < LEFT:
            first.append(" " * (LEFT - len(first))).append(wrapped.pop(0))
        yield first
        yield from (rich.text.Text(" " * indent + line) for line in wrapped)
