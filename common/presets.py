"""`TIERS`: the tiers of service of the article that the project started from, by the names of its presets.

Source: "KV FP8 with Gemma4 26B", its decision matrix. What they promise of v6e-4 with Gemma 4 26B at 16k is judged by
`ingestq plan --article`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """How many documents a worker has in flight, and how soon they begin to be answered."""

    name: str
    # Documents in flight: what a worker doesn't give way below, and what it doesn't go above.
    floor: int
    ceiling: int
    # Milliseconds to the first token; None: no promise.
    ttft_sla_ms: float | None = None


TIERS = {
    tier.name: tier
    for tier in (
        Tier(name="interactive", floor=1, ceiling=8, ttft_sla_ms=1500),
        Tier(name="standard", floor=32, ceiling=64, ttft_sla_ms=2100),
        Tier(name="batch", floor=128, ceiling=1024),
        Tier(name="long-context", floor=16, ceiling=32),
    )
}
