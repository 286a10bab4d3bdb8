"""How many rows a routing group holds."""

import math

TOKENS_PER_EXPERT = 64  # of a routing group, on average: fewer make the drop rate jump


def fewest_rows(rows: int, length: int, choices: int, num_experts: int) -> int:
    """The fewest rows that divide `rows` and give TOKENS_PER_EXPERT on average, else all of them.

    Args:
      rows: that one device holds.
      length: tokens of a row.
      choices: K.
      num_experts: E.
    """
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    for n in (*small, *(rows // n for n in reversed(small))):
        if n * length * choices / num_experts >= TOKENS_PER_EXPERT:
            return n
    return rows
