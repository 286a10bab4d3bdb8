"""Extracts the text from the value of a field, for every kind of file."""

from typing import Any

from moe_jax.data.bad_records import BadRecord

NO_VALUE = object()  # the value of a missing field
REPAIR = "fix or remove it"
JOIN = "\n"  # between the texts of a list


def text_of(value: Any, field: str, key: str) -> str | BadRecord:
    """Extract the text of a field.

    Args:
      value: a text, UTF-8 bytes, or a list of these, which newlines join.
      field: its name.
      key: config key that names the field, for the advice.

    Returns:
      The text, or a bad record with the reason.
    """
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, str | bytes) for part in parts):
        try:
            return JOIN.join(part if isinstance(part, str) else part.decode() for part in parts)
        except UnicodeDecodeError as error:
            return BadRecord(f"is not UTF-8 ({error})", REPAIR)
    what = "null" if value is None else "missing" if value is NO_VALUE else type(value).__name__
    advice = REPAIR if value is None else f"set {key} to one with text"
    return BadRecord(f"has no text in field {field!r} ({what})", advice)
