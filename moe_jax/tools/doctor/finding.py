"""The result of one check."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report, and how to fix a failure."""

    ok: bool
    figure: str  # the measurement
    fix: str = ""  # one sentence that says what to change; printed if `ok` is False
