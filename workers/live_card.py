"""`LiveCard`: an engine's card at the moment of asking: what the warm-up found, and what was counted since."""

from __future__ import annotations

import logging

from ..common.engine_card import EngineCard
from .engines.base import Engine, EngineCounters
from .logs import described
from .startup.warmup import Warmed

logger = logging.getLogger(__name__)


class LiveCard:
    """Called by whoever publishes the card. Says in the log when the engine has compiled again.

    Never raises: producers need the card, whatever has become of the engine's statistics.
    """

    def __init__(self, engine: Engine, warmed: Warmed) -> None:
        self._engine = engine
        self._warmed = warmed
        self._counters = warmed.counters
        self._num_told = 0

    def __call__(self) -> EngineCard:
        found, now = self._warmed, self._read_counters()
        cache, rates = found.kv_cache, found.rates
        facts = {
            "kv_cache_dtype": cache.dtype,
            "num_kv_tokens": cache.num_tokens,
            "num_blocks": cache.num_blocks,
            "block_size": cache.block_size,
            "prefill_tokens_per_s": rates and rates.prefill_tokens_per_s,
            "decode_tokens_per_s": rates and rates.decode_tokens_per_s,
            "warmup_ms": found.warmup_ms,
            "recompiles": self._recompiles(now.num_compilations),
            "num_preemptions": now.num_preemptions - found.counters.num_preemptions,
            "draft_acceptance": now.draft_acceptance(found.counters),
        }
        return self._engine.card.model_copy(update=facts)

    def _read_counters(self) -> EngineCounters:
        try:
            self._counters = self._engine.counters()
        except Exception as error:
            logger.warning(
                "the engine's counters can't be read: %s; the card keeps the former ones",
                described(error),
                extra={"action": "counters_failed"},
            )
        return self._counters

    def _recompiles(self, num_compilations: int | None) -> int | None:
        before = self._warmed.counters.num_compilations
        if num_compilations is None or before is None:
            return None
        number = num_compilations - before
        if number > self._num_told:
            self._num_told = number
            logger.warning(
                "the engine has compiled %d times since it was ready, and steps waited for it: documents need shapes "
                "that its start had not compiled",
                number,
                extra={"action": "recompiled"},
            )
        return number
