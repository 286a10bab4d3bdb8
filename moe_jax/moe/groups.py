"""Chooses the number of rows per routing group."""

import math

TOKENS_PER_EXPERT = 64  # per routing group, on average: with fewer, the drop rate jumps


def fewest_rows(rows: int, length: int, choices: int, num_experts: int) -> int:
    """The smallest divisor of `rows` that gives TOKENS_PER_EXPERT on average; else `rows`.

    Args:
      rows: held by one device.
      length: T, tokens per row.
      choices: K, assignments per token.
      num_experts: E.
    """
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    for n in (*small, *(rows // n for n in reversed(small))):
        if n * length * choices / num_experts >= TOKENS_PER_EXPERT:
            return n
    return rows
