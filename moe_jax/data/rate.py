"""Measures the amount of text read, and the rate."""

import time


class Rate:
    """Bytes since its creation, printed as `812 MB, 41 MB/s`."""

    def __init__(self):
        self._bytes, self._begin = 0, time.monotonic()

    def add(self, amount: int) -> None:
        """Add bytes to the amount."""
        self._bytes += amount

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-3)
        speed = self._bytes / 1e6 / seconds
        return f"{self._bytes / 1e6:,.0f} MB, {speed:,.{0 if speed >= 10 else 1}f} MB/s"
