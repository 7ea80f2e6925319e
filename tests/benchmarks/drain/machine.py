"""How busy this machine is, and how fast the simulated clock may run for that."""

from __future__ import annotations

from pathlib import Path

# Simulated seconds in a real one, at most, and share of the machine's CPU beyond which real delays are no longer the
# project's own.
MAX_FACTOR, MAX_BUSY_SHARE = 20.0, 0.70

# What the next factor aims at: some way below the bound.
_AIM = 0.60


class BusyShare:
    """The share of all CPUs' time that was not idle, since the last look; whoever used it."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._read()

    def look(self, *, restart: bool = True) -> float:
        """0 to 1.

        Args:
            restart: whether the next look is about the time from now on.
        """
        now = self._read()
        idle, total = now[0] - self._before[0], now[1] - self._before[1]
        if restart:
            self._before = now
        return 1 - idle / total if total else 0.0

    def _read(self) -> tuple[int, int]:
        """Ticks idle, waiting for disks included, and all ticks but those that guests are counted twice by."""
        ticks = [int(value) for value in self._stat.read_text().split("\n", 1)[0].split()[1:]]
        return ticks[3] + ticks[4], sum(ticks[:8])


def next_factor(factor: float, busy_share: float) -> float:
    """A slower clock, after the machine was this busy at `factor`: work is done in proportion to it."""
    return factor * min(0.8, _AIM / busy_share)
