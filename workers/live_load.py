"""`LiveLoad`: how busy a worker is at the moment of asking, and what keeps documents waiting, for `ingestq status`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from statistics import quantiles

from ..common.worker_load import Closed, WorkerLoad
from .courier import Courier
from .drain import DrainController
from .engines.base import Engine

# Seconds over which documents and tokens per second are taken.
_WINDOW = 60.0


class LiveLoad:
    """Called by whoever publishes the load."""

    def __init__(self, engine: Engine, courier: Courier) -> None:
        self._engine = engine
        self._courier = courier
        self._before = engine.counters()
        # Time, documents finished and their tokens, at former calls of the last minute.
        self._seen: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def __call__(self) -> WorkerLoad:
        courier, counters = self._courier, self._engine.counters()
        documents_per_s, tokens_per_s = self._throughput()
        num_ready, in_flight = len(courier.pool), courier.in_flight
        queue_p50, queue_p95 = _percentiles(list(courier.queue_waits))
        with courier.controller() as controller:
            p50, p95, p99 = controller.ttft_ms
            return WorkerLoad(
                in_flight=in_flight,
                max_in_flight=controller.in_flight_limit,
                num_running=max(0, in_flight - num_ready),
                num_ready=num_ready,
                kv_tokens=courier.holdings.kv_tokens,
                max_kv_tokens=max(courier.max_kv_tokens.values()),  # what it holds counts against all of them
                waiting_prompt_tokens=self._engine.num_waiting_tokens,
                closed=tuple(self._closed(controller, in_flight)),
                prefill_tokens_per_s=controller.prefill_tokens_per_s,
                decode_tokens_per_s=controller.decode_tokens_per_s,
                ttft_p50_ms=p50,
                ttft_p95_ms=p95,
                ttft_p99_ms=p99,
                queue_p50_ms=queue_p50,
                queue_p95_ms=queue_p95,
                ttft_sla_ms=controller.ttft_sla_ms,
                ttft_percentile=controller.bounds.ttft_percentile,
                kv_usage=counters.kv_usage,
                num_preemptions=counters.num_preemptions - self._before.num_preemptions,
                prefix_hit_rate=counters.prefix_hit_rate(self._before),
                draft_acceptance=counters.draft_acceptance(self._before),
                documents_per_s=documents_per_s,
                tokens_per_s=tokens_per_s,
            )

    def _throughput(self) -> tuple[float, float]:
        """Documents and tokens a second over the last minute."""
        now = time.monotonic()
        self._seen.append((now, self._courier.num_finished, self._courier.num_tokens))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        (since, documents, tokens), (until, documents_now, tokens_now) = self._seen[0], self._seen[-1]
        seconds = max(until - since, 1e-3)
        return (documents_now - documents) / seconds, (tokens_now - tokens) / seconds

    def _closed(self, controller: DrainController, in_flight: int) -> list[Closed]:
        """What keeps documents waiting, in Redis and in this worker, with the numbers."""
        courier = self._courier
        told = {
            "suspended": "`rq suspend` is in force",
            "worker": f"{in_flight:,} documents are in flight here, which is what the queue's max_in_flight admits",
            "fleet": "max_in_flight_fleet is reached by all workers together",
            "company": "a document that lost workers runs in small company: see `ingestq why`",
            "kv": f"{courier.holdings.kv_tokens:,} KV tokens are reserved here, {{max_kv_tokens:,}} may be, and "
            f"the next document needs more than is left",
            "kv_fleet": "max_kv_tokens_fleet is reached by all workers together",
            "prefill": "more prompt tokens would take the time to first token over its bound",
            "head": "this worker makes room for a large document that has waited for a minute",
        }
        closed = [
            Closed(gate=gate, why=f"{queue}: {told[gate].format(max_kv_tokens=courier.max_kv_tokens[queue])}")
            for queue, gate in courier.gates.items()
            if gate in told
        ]
        if in_flight >= controller.in_flight_limit:
            why = f"{in_flight:,} documents are in flight, the limit is {controller.in_flight_limit:,} now"
            closed.append(Closed(gate="in_flight", why=why))
        if courier.start_gate != "open":
            closed.append(
                Closed(gate=f"start: {courier.start_gate}", why=_told_of_start(courier.start_gate, controller))
            )
        return closed


def _told_of_start(gate: str, controller: DrainController) -> str:
    bounds = controller.bounds
    num_seqs = min(bounds.max_num_seqs, controller.in_flight_limit)
    return {
        "sequences": f"the engine runs {num_seqs:,} sequences, as many as it may",
        "kv": f"the engine's {bounds.num_blocks:,} KV blocks are spoken for, as far as they are given out now "
        f"({controller.kv_share:.0%})",
        "ttft": f"another prompt would wait for its first token longer than {controller.ttft_sla_ms:,g} ms"
        if controller.ttft_sla_ms
        else "",
    }[gate]


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and 95th percentile; None without values."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    cut = quantiles(values, n=20)
    return cut[9], cut[18]
