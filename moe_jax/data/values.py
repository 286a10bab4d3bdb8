"""The text in a value of a field, whatever kind of file the value comes from."""

from typing import Any

from moe_jax.data.bad_records import BadRecord

NO_VALUE = object()  # in the place of the value of a field that is not there
REPAIR = "fix or remove it"
JOIN = "\n"  # between the texts of a list


def text_of(value: Any, field: str, key: str) -> str | BadRecord:
    """The text of a field.

    Args:
      value: a text, bytes that are UTF-8, or a list of texts, which newlines join.
      field: its name.
      key: of the config, that names the field.

    Returns:
      The text, or why there is none.
    """
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, str | bytes) for part in parts):
        try:
            return JOIN.join(part if isinstance(part, str) else part.decode() for part in parts)
        except UnicodeDecodeError as error:
            return BadRecord(f"is not UTF-8 ({error})", REPAIR)
    what = "null" if value is None else "missing" if value is NO_VALUE else type(value).__name__
    advice = REPAIR if value is None else f"set {key} to one that has"
    return BadRecord(f"has no text in field {field!r} ({what})", advice)
