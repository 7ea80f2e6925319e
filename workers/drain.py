"""`DrainController`: how much to take off the queue, and what of it to start. Arithmetic only; courier.py acts on it.

Bounds in order of precedence: the hard limits (documents in flight, KV tokens, the engine's own sequences and blocks),
then the time to first token, then the floor. The limit on documents in flight gives way to preemptions and errors, but
not below the floor; the floor is no promise where a hard limit or the time to first token admits less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..common.limits import AdmissionLimits
from .adaptive_limit import AdaptiveLimit
from .engines.base import Rates, StepReport
from .live_rate import LiveRate
from .ttft import TtftModel, milliseconds

# What keeps a ready prompt out of the engine; "open": nothing does.
StartGate = Literal["open", "sequences", "kv", "ttft"]

# Of the KV blocks, what is given out at least, however many preemptions there are: reservations are a high quantile of
# what is needed, so that blocks run out because one task's documents changed, not because all need twice as much.
_MIN_KV_SHARE = 0.5

# Of the documents of a generation (see `AdaptiveLimit`), how many may fail in the engine before that speaks against
# the engine rather than against them; one may always.
_ERROR_SHARE = 0.05


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
class DrainBounds:
    """What a controller keeps to, whatever it measures."""

    # Documents that this worker may hold leases on. Hard.
    max_in_flight: int
    # Sequences that the engine runs at once. Hard: what waits in the engine for a sequence would wait for its first
    # token longer than prefill explains.
    max_num_seqs: int
    # Where the limit on documents in flight may go.
    floor: int = 1
    ceiling: int = 2**31 - 1
    # Documents that are leased and tokenized while the engine has no room for them.
    max_ready: int = 1
    # KV tokens that this worker may have reserved; 0: no bound. Hard, and checked in lease.lua.
    max_kv_tokens: int = 0
    # KV blocks that the engine has; 0: not known. Hard.
    num_blocks: int = 0
    # Milliseconds from the engine's add_request to the first output token, and the share (0 to 1) of the documents
    # for which that is to hold; None: no bound.
    ttft_sla_ms: float | None = None
    ttft_percentile: float = 0.95
    # Tokens that one step computes at most.
    max_num_batched_tokens: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine has been given and not finished yet."""

    num_seqs: int = 0
    # KV blocks that all of them together take at most.
    num_blocks: int = 0
    # Prompt tokens of those without a first token.
    waiting_tokens: int = 0

    def plus(self, num_prompt_tokens: int, num_blocks: int) -> EngineLoad:
        """With one prompt more."""
        return EngineLoad(
            num_seqs=self.num_seqs + 1,
            num_blocks=self.num_blocks + num_blocks,
            waiting_tokens=self.waiting_tokens + num_prompt_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What may be leased now."""

    documents: int
    # Prompt tokens, by the producers' estimates, but always one document; None: no bound.
    prompt_tokens: int | None = None


class DrainController:
    """Decides from counts and measurements; knows nothing of Redis, threads or clocks. Not thread-safe."""

    def __init__(self, bounds: DrainBounds, rates: Rates | None = None, companies: Sequence[int] = ()) -> None:
        """
        Args:
            rates: of the warm-up, to begin with.
            companies: see `companies`.
        """
        self.bounds = bounds
        self.companies = companies
        step = bounds.max_num_batched_tokens
        self._prefill = LiveRate(step, rates.prefill_tokens_per_s if rates else None)
        self._decode = LiveRate(bounds.max_num_seqs, rates.decode_tokens_per_s if rates else None)
        # A first token comes at the end of a step, and a step may be full.
        rate = self._prefill.tokens_per_s
        self._ttft = TtftModel(bounds.ttft_percentile, first_margin_ms=milliseconds(step, rate) if rate else 0.0)
        self._in_flight = AdaptiveLimit(bounds.floor, min(bounds.ceiling, bounds.max_in_flight))
        self._kv_share = AdaptiveLimit(_MIN_KV_SHARE, 1.0)
        self._num_errors = self._num_ended = 0
        self._max_in_flight = bounds.max_in_flight
        self._ttft_sla_ms = bounds.ttft_sla_ms
        # What the last prompt that was ready met.
        self._gate: StartGate = "open"
        self._kv_was_short = False

    # --- what it goes by now

    @property
    def in_flight_limit(self) -> int:
        """Documents that may be in flight."""
        return min(self._adapted, self._max_in_flight)

    @property
    def _adapted(self) -> int:
        # Fractions are kept in the limit, so that it grows from small values, too.
        return max(1, int(self._in_flight.value)) if self._in_flight.ceiling >= 1 else 0

    @property
    def kv_share(self) -> float:
        """Of the engine's KV blocks, what is given out; less than 1 after preemptions."""
        return self._kv_share.value

    @property
    def ttft_sla_ms(self) -> float | None:
        return self._ttft_sla_ms

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self._prefill.tokens_per_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self._decode.tokens_per_s

    @property
    def ttft_ms(self) -> tuple[float | None, float | None, float | None]:
        """Median, 95th and 99th percentile of the last documents."""
        p50, p95, p99 = self._ttft.observed_ms((0.5, 0.95, 0.99))
        return p50, p95, p99

    # --- what it hears

    def update(self, limits: Iterable[AdmissionLimits]) -> None:
        """Heeds the live limits of the worker's queues.

        Each queue's own are checked in lease.lua. Here a worker holds no more than the largest admits, and keeps to the
        shortest time to first token: it is one engine, and whoever waits in it waits for all.
        """
        limits = list(limits)
        in_flight = [self.bounds.max_in_flight if each.max_in_flight is None else each.max_in_flight for each in limits]
        self._max_in_flight = min(self.bounds.max_in_flight, max(in_flight, default=self.bounds.max_in_flight))
        slas = [self.bounds.ttft_sla_ms if each.ttft_sla_ms is None else each.ttft_sla_ms for each in limits]
        self._ttft_sla_ms = min((sla for sla in slas if sla), default=None) if limits else self.bounds.ttft_sla_ms

    def observe(self, report: StepReport, *, limit_used: bool) -> None:
        """Learns from one step of the engine.

        Args:
            limit_used: whether as many documents are in flight as may be.
        """
        for first in report.first_tokens:
            # Against the rate as it was when the step began.
            tokens = first.num_tokens_ahead + first.num_prompt_tokens
            self._ttft.observe(first.ttft_ms, tokens, self._prefill.tokens_per_s)
        self._observe_rates(report)
        if report.num_preemptions > 0:
            self._in_flight.shrink()
            self._kv_share.shrink()
        self._end(len(report.first_tokens), limit_used=limit_used and self.in_flight_limit == self._adapted)

    def observe_errors(self, num: int) -> None:
        """Documents failed in the engine, though it took them."""
        self._num_errors += num
        if self._num_errors > max(1, _ERROR_SHARE * self.in_flight_limit):
            self._in_flight.shrink()
        self._end(num, limit_used=False)

    def _observe_rates(self, report: StepReport) -> None:
        if report.num_prefilled_tokens or report.num_waiting_tokens:
            # Only where there was more to prefill than a step can was prefill what took the time.
            full = report.num_waiting_tokens >= self.bounds.max_num_batched_tokens
            self._prefill.observe(report.num_prefilled_tokens, report.seconds, full=full)
        if report.num_output_tokens:
            self._decode.observe(report.num_output_tokens, report.seconds, full=True)

    def _end(self, num_documents: int, *, limit_used: bool) -> None:
        """Documents left what waits, for the engine or for good: others take their places."""
        generation = max(1, self.in_flight_limit)
        self._in_flight.passed(num_documents, generation, used=limit_used)
        self._kv_share.passed(num_documents, generation, used=self._kv_was_short)
        self._num_ended += num_documents
        if self._num_ended >= generation:
            self._num_errors = self._num_ended = 0
            self._kv_was_short = False

    # --- what it decides

    def admit(
        self,
        *,
        in_flight: int,
        num_ready: int = 0,
        ready_tokens: int = 0,
        waiting_tokens: int = 0,
        jobs_left: int | None = None,
    ) -> Room:
        """How much more to lease: what the engine has room for, and a lead of `max_ready`.

        Args:
            in_flight: leases held.
            num_ready: of those, tokenized and waiting for the engine; `ready_tokens`: their prompt tokens.
            waiting_tokens: prompt tokens in the engine of prompts without a first token.
            jobs_left: what `--max-jobs` leaves to lease; None without it.
        """
        room = self.in_flight_limit - in_flight
        room = min(room, self.bounds.max_ready + self._num_free_seqs(in_flight - num_ready) - num_ready)
        if jobs_left is not None:
            room = min(room, jobs_left)
        tokens = self._token_budget()
        if tokens is not None:
            # A step's worth more, so that the engine has the next ones at hand. While nothing waits, this is positive.
            tokens += self.bounds.max_num_batched_tokens - waiting_tokens - ready_tokens
            if tokens <= 0:
                return Room(documents=0, prompt_tokens=0)
        return Room(documents=max(0, room), prompt_tokens=tokens)

    def start_gate(self, load: EngineLoad, prompt_tokens: int, num_blocks: int) -> StartGate:
        """Whether a prompt may start now, and what keeps it waiting.

        Args:
            load: what the engine has.
            prompt_tokens, num_blocks: the prompt's, the latter at most.
        """
        self._gate = self._start_gate(load, prompt_tokens, num_blocks)
        self._kv_was_short |= self._gate == "kv"
        return self._gate

    def predicted_ttft_ms(self, waiting_tokens: int, prompt_tokens: int) -> float | None:
        """What a prompt's time to first token will not exceed, at the percentile asked for; None: nothing is known.

        Args:
            waiting_tokens: prompt tokens ahead of it in the engine.
        """
        rate = self._prefill.tokens_per_s
        return milliseconds(waiting_tokens + prompt_tokens, rate) + self._ttft.margin_ms if rate else None

    def company(self, crashes: Iterable[int]) -> int:
        """The smallest company that jobs which lost so many workers are bound to; 0: none is."""
        suspicion = min(max(crashes, default=0), len(self.companies))
        return self.companies[suspicion - 1] if suspicion else 0

    def _start_gate(self, load: EngineLoad, prompt_tokens: int, num_blocks: int) -> StartGate:
        bounds, sla = self.bounds, self._ttft_sla_ms
        if load.num_seqs >= self._max_seqs:
            return "sequences"
        # Alone it may have all of them: whether that is enough, the engine knows.
        if bounds.num_blocks and load.num_seqs and load.num_blocks + num_blocks > bounds.num_blocks * self.kv_share:
            return "kv"
        if sla is None or not load.waiting_tokens:  # where nobody waits, it can't be better later
            return "open"
        predicted = self.predicted_ttft_ms(load.waiting_tokens, prompt_tokens)
        if predicted is None:  # until a step has shown something, as much as one computes
            fits = load.waiting_tokens + prompt_tokens <= bounds.max_num_batched_tokens
        else:
            fits = predicted <= sla
        return "open" if fits else "ttft"

    @property
    def _max_seqs(self) -> int:
        return max(1, min(self.bounds.max_num_seqs, self._adapted))

    def _num_free_seqs(self, num_running: int) -> int:
        """How many sequences could start; none while something else keeps prompts out."""
        return max(0, self._max_seqs - num_running) if self._gate in ("open", "sequences") else 0

    def _token_budget(self) -> int | None:
        """Prompt tokens that may wait in the engine within the time to first token; None: any number."""
        if self._ttft_sla_ms is None:
            return None
        rate = self._prefill.tokens_per_s
        return int(max(0.0, self._ttft_sla_ms - self._ttft.margin_ms) / 1e3 * rate) if rate else 0
