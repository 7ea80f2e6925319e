"""`WarmUp`: what a worker finds out about its engine, and does for it, before it leases the first document.

Loading has compiled the engine's shapes, or taken them from its compile cache. The warm-up proves that it answers,
checks its KV cache, measures its rates, and has it compute what the queued documents begin with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import StopRequested

from ...common.errors import EngineError, PromptRefused, SettingsError
from ...common.schema import Sampling
from ...common.settings import Settings
from ..engines.base import Engine, EngineCounters, KvCache, Prompt, Rates
from ..logs import one_line
from .kv_check import off_plan, wrong_dtype
from .measure import measure_rates
from .prefixes import Task, queued_tasks, shared_prefix
from .rehearsal import Rehearsal

logger = logging.getLogger(__name__)

# Prefixes that are computed beforehand; the share of the KV cache and the seconds of prefill that they may take in all.
_MAX_PREFIXES, _MAX_SHARE, _MAX_SECONDS = 16, 0.25, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What the warm-up found."""

    kv_cache: KvCache
    # None: the engine takes no prompts of our making.
    rates: Rates | None
    # Shared prefixes that were computed.
    num_prefixes: int
    warmup_ms: float
    # As they stood at its end: what the engine counts from then on is the documents' doing.
    counters: EngineCounters

    def __str__(self) -> str:
        """For the log line of a worker that is ready."""
        kv_cache, rates = self.kv_cache, self.rates
        told = f"KV cache {kv_cache.dtype}, {kv_cache.num_tokens} tokens in {kv_cache.num_blocks} blocks"
        if rates:
            told += (
                f"; prefill {rates.prefill_tokens_per_s:.0f} and decode {rates.decode_tokens_per_s:.0f} tokens/s "
                f"({rates.decode_num_seqs} sequences)"
            )
        return f"{told}; {self.num_prefixes} shared prefixes cached; warm-up {self.warmup_ms / 1e3:.1f} s"


class WarmUp:
    """Warms up one engine for one queue."""

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        *,
        stopping: Callable[[], bool],
        promise: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        """
        Args:
            stopping: whether the worker was told to stop: the warm-up ends at the next step.
            promise: called before each step and each prefix that is encoded, but not before steps of the proof: like
                loading, they may take as long as it takes to compile. `release`: called when what was promised is done.
        """
        self._connection = connection
        self._settings = settings
        self._stopping = stopping
        self._promise = promise
        self._release = release

    def run(self, engine: Engine, *, fill_cache: bool = True) -> Warmed:
        """Readies a new engine.

        Args:
            fill_cache: whether documents' prefixes may be run. Not after a failure: they may have been its cause, and
                then a lease has to say whose.

        Raises:
            StopRequested: the worker was told to stop.
            SettingsError: the KV cache isn't what was asked for (INGEST_MISFIT=refuse).
            EngineError: the engine failed its first prompt.
        """
        began = time.monotonic()
        _prove(Rehearsal(engine, self._stop_if_told))
        kv_cache = engine.kv_cache
        self._check(kv_cache, engine)
        rehearsal = Rehearsal(engine, self._begin_watched, self._release)
        rates = engine.rates or measure_rates(rehearsal)
        prefixes = self._prefixes(engine, rates) if fill_cache and kv_cache.prefix_caching else []
        num_prefixes = sum(_is_computed(rehearsal, prefix) for prefix in prefixes)
        self._stop_if_told()
        return Warmed(
            kv_cache=kv_cache,
            rates=rates,
            num_prefixes=num_prefixes,
            warmup_ms=(time.monotonic() - began) * 1e3,
            counters=engine.counters(),
        )

    def _stop_if_told(self) -> None:
        if self._stopping():  # an engine may have swallowed the exception that said so
            raise StopRequested

    def _begin_watched(self) -> None:
        self._stop_if_told()
        self._promise()

    def _check(self, kv_cache: KvCache, engine: Engine) -> None:
        if wrong := wrong_dtype(kv_cache):
            if self._settings.misfit == "refuse":
                raise SettingsError(wrong)
            logger.warning("%s", wrong, extra={"action": "kv_dtype"})
        if engine.plan is not None:
            for told in off_plan(kv_cache, engine.plan):
                logger.warning("%s", told, extra={"action": "off_plan"})

    def _prefixes(self, engine: Engine, rates: Rates | None) -> list[list[int]]:
        """What the first documents in the queue begin with, as far as there is room and time for it."""
        try:
            tasks = queued_tasks(self._connection, self._settings.queue, engine.card.model)
        except RedisError as error:
            logger.warning("Redis: %s; no shared prefix is cached beforehand", one_line(str(error)))
            return []
        prefixes = [prefix for task in tasks[:_MAX_PREFIXES] if (prefix := self._prefix(engine, task))]
        return affordable(prefixes, engine.kv_cache, engine.card.max_model_len, rates)

    def _prefix(self, engine: Engine, task: Task) -> list[int]:
        """Of one task; empty if it can't be told: its documents will say why."""
        self._begin_watched()  # a text may be one that the tokenizer never comes back from
        try:
            return shared_prefix(engine, task, engine.card.model)
        except (StopRequested, SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # whatever a tokenizer makes of a text: Rust's panics are no Exceptions
            logger.info("a shared prefix can't be encoded: %s", type(error).__name__)  # its message may quote it
            return []
        finally:
            self._release()


def affordable(
    prefixes: Sequence[list[int]], kv_cache: KvCache, max_model_len: int, rates: Rates | None
) -> list[list[int]]:
    """Of prefixes, the most wanted first, those that pay and for which there is room and time.

    Only whole blocks are shared, so that one of less than a block is of no use; behind one of max_model_len no text
    fits.
    """
    room = kv_cache.num_tokens * _MAX_SHARE
    tokens_left = min(room, rates.prefill_tokens_per_s * _MAX_SECONDS) if rates else room
    chosen: list[list[int]] = []
    for prefix in prefixes:
        if kv_cache.block_size <= len(prefix) < max_model_len and len(prefix) <= tokens_left and prefix not in chosen:
            chosen.append(prefix)
            tokens_left -= len(prefix)
    return chosen


def _prove(rehearsal: Rehearsal) -> None:
    """Runs one small prompt, for two tokens of output: the first one is prefill's, the second is decoded.

    Raises:
        EngineError: the engine failed it, or doesn't take it.
    """
    token_ids = rehearsal.engine.encode("ingestq")
    try:
        sampling = Sampling(max_tokens=2, ignore_eos=True)
        rehearsal.run([Prompt(prompt_id="proof", token_ids=token_ids, sampling=sampling)])
    except PromptRefused as error:
        raise EngineError(f"the engine refuses its first prompt: {error}") from error


def _is_computed(rehearsal: Rehearsal, prefix: list[int]) -> bool:
    """Runs a prefix, whose blocks the engine then keeps."""
    try:
        rehearsal.run([Prompt(prompt_id="prefix", token_ids=prefix, sampling=Sampling(max_tokens=1))])
    except (PromptRefused, EngineError):
        return False
    return True
