"""What a check says."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report, and what to do about it."""

    ok: bool
    figure: str  # what was measured
    fix: str = ""  # one sentence that says what to change; printed where `ok` is False
