"""`drain_controller`: the controller of one worker, from its settings, its preset and its engine."""

from __future__ import annotations

import math

from ..common.presets import TIERS
from ..common.settings import Settings
from .drain import DrainBounds, DrainController, companies
from .engines.base import Engine, Rates

# Documents leased beyond the sequences that the engine runs, so that one that ends has a successor at once, as a share
# of them: continuous feeding at 1.1 x max_num_seqs takes as few steps as one big batch (simulated, 3,000 documents).
# The same for KV tokens beyond the engine's cache.
_LEAD = 0.1


def drain_controller(settings: Settings, engine: Engine, rates: Rates | None) -> DrainController:
    """A controller that knows its bounds; `rates` are those that the warm-up found."""
    bounds = drain_bounds(settings, engine)
    return DrainController(bounds, rates, companies(bounds.max_in_flight, settings.max_crashes))


def drain_bounds(settings: Settings, engine: Engine) -> DrainBounds:
    """What settings and preset ask for, as far as the engine goes.

    INGEST_MAX_IN_FLIGHT is taken at its word: what the engine doesn't run waits in the worker, longest work first.
    Without it a worker leases a tenth more than the engine runs, and leaves the rest to others.
    """
    tier, card, cache = TIERS[settings.preset], engine.card, engine.kv_cache
    enough = card.max_num_seqs + max(1, math.ceil(card.max_num_seqs * _LEAD))
    ceiling = settings.max_in_flight or min(tier.ceiling, enough)
    sla = tier.ttft_sla_ms if settings.ttft_sla_ms is None else settings.ttft_sla_ms or None
    if settings.feed == "generate":
        sla = None  # within a wave nobody decides what starts when
    return DrainBounds(
        max_in_flight=ceiling,
        floor=min(settings.min_in_flight or tier.floor, ceiling),
        ceiling=ceiling,
        max_ready=max(1, math.ceil(card.max_num_seqs * _LEAD), ceiling - card.max_num_seqs),
        max_num_seqs=card.max_num_seqs,
        max_kv_tokens=settings.max_kv_tokens or math.ceil(cache.num_tokens * (1 + _LEAD)),
        num_blocks=cache.num_usable_blocks,
        ttft_sla_ms=sla,
        ttft_percentile=settings.ttft_percentile,
        max_num_batched_tokens=card.max_num_batched_tokens or card.max_model_len,
    )
