"""`Report`: what came of a campaign of faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One that was caused."""

    kind: str
    # Seconds until none of the leases that it struck was left; of a fault of Redis, from when that was back.
    recovery: float
    # Another fault of Redis or of all workers went on meanwhile.
    is_overlapped: bool


@dataclass(slots=True, kw_only=True)
class Report:
    """What came of a campaign."""

    faults: list[Fault] = field(default_factory=list)
    accepted: int = 0
    succeeded: int = 0
    dead_letters: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    again_after_loss: int = 0
    # Dead letters of innocent documents that lost as many workers as one may.
    exhausted: int = 0
    unjustified: list[str] = field(default_factory=list)
    poisons: dict[str, bool] = field(default_factory=dict)
    fenced: int = 0
    refused_calls: int = 0
    starts: int = 0
    # Whatever else was not as it should be, in words.
    surprises: list[str] = field(default_factory=list)

    def by_kind(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.faults)
