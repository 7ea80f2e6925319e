"""`DrainController`: how many documents to take off the queue now. Arithmetic only; courier.py acts on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Documents waiting in the engine for each running sequence, so that a sequence that ends has a successor at once:
# continuous feeding at 1.1 x max_num_seqs takes as few steps as one big batch (simulated, 3,000 documents).
_LEAD = 1.1


def default_max_in_flight(max_num_seqs: int) -> int:
    """Leases that keep `max_num_seqs` sequences busy."""
    return math.ceil(max_num_seqs * _LEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainController:
    """Decides from counts; knows nothing of Redis or the engine. The fleet's bounds are checked in lease.lua."""

    # Documents that this worker may hold leases on.
    max_in_flight: int

    def admit(self, *, in_flight: int, jobs_left: int | None) -> int:
        """How many more documents to lease.

        Args:
            in_flight: leases held.
            jobs_left: what `--max-jobs` leaves to lease; None without it.
        """
        room = self.max_in_flight - in_flight
        return max(0, room if jobs_left is None else min(room, jobs_left))
