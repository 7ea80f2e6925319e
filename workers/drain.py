"""`DrainController`: how many documents to take off the queue now. Arithmetic only; courier.py acts on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Documents waiting in the engine for each running sequence, so that a sequence that ends has a successor at once:
# continuous feeding at 1.1 x max_num_seqs takes as few steps as one big batch (simulated, 3,000 documents).
_LEAD = 1.1


def default_max_in_flight(max_num_seqs: int) -> int:
    """Leases that keep `max_num_seqs` sequences busy."""
    return math.ceil(max_num_seqs * _LEAD)


def companies(max_in_flight: int, max_crashes: int) -> list[int]:
    """Of how many documents in flight one may be that lost 1, 2, ... workers; the last before it is failed runs alone.

    ceil(B / F**n) with the smallest whole F that makes the last one 1: with 256 in flight and 3 crashes, one document
    that kills every worker takes down 256, then 16, then itself, and nothing else is failed (measured with kill -9).
    """
    last = max_crashes - 1
    if last < 1:
        return []
    factor = next(factor for factor in range(1, max_in_flight + 1) if factor**last >= max_in_flight)
    return [*(math.ceil(max_in_flight / factor**crashes) for crashes in range(1, last)), 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainController:
    """Decides from counts; knows nothing of Redis or the engine. The fleet's bounds are checked in lease.lua."""

    # Documents that this worker may hold leases on.
    max_in_flight: int
    # See `companies`.
    companies: Sequence[int] = ()

    def admit(self, *, in_flight: int, jobs_left: int | None) -> int:
        """How many more documents to lease.

        Args:
            in_flight: leases held.
            jobs_left: what `--max-jobs` leaves to lease; None without it.
        """
        room = self.max_in_flight - in_flight
        return max(0, room if jobs_left is None else min(room, jobs_left))

    def company(self, crashes: Iterable[int]) -> int:
        """The smallest company that jobs which lost so many workers are bound to; 0: none is."""
        suspicion = min(max(crashes, default=0), len(self.companies))
        return self.companies[suspicion - 1] if suspicion else 0
