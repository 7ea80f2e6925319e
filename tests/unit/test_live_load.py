"""What a worker says of itself: every closed gate in a sentence, with the numbers."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from ingestq.common import scripts
from ingestq.workers import live_load
from ingestq.workers.drain import DrainBounds, DrainController, StartGate
from ingestq.workers.engines.base import EngineCounters
from ingestq.workers.live_load import LiveLoad

BOUNDS = DrainBounds(max_in_flight=40, max_num_seqs=32, max_kv_tokens=90_000, num_blocks=5_000, ttft_sla_ms=1500)


class Engine:
    def __init__(self) -> None:
        self.seen = EngineCounters(num_preemptions=7, num_compilations=0, kv_usage=0.0)
        self.num_waiting_tokens = 1_234

    def counters(self) -> EngineCounters:
        return self.seen


class Courier:
    """As far as a load asks."""

    def __init__(self, **fields: Any) -> None:
        self.in_flight, self.pool = 12, [None] * 2
        self.holdings = SimpleNamespace(kv_tokens=3_000)
        self.max_kv_tokens = {"high": 90_000, "low": 90_000}
        self.queue_waits: deque[int] = deque()
        self.num_finished = self.num_tokens = 0
        self.gates: dict[str, str] = {"high": "open", "low": "open"}
        self.start_gate = "open"
        self._controller = DrainController(BOUNDS)
        vars(self).update(fields)

    @contextmanager
    def controller(self) -> Any:
        yield self._controller


def load_of(**fields: Any) -> Any:
    return LiveLoad(Engine(), Courier(**fields))()


def test_numbers_are_those_of_the_moment() -> None:
    load = load_of()
    assert (load.in_flight, load.max_in_flight, load.num_running, load.num_ready) == (12, 40, 10, 2)
    assert (load.kv_tokens, load.max_kv_tokens, load.waiting_prompt_tokens) == (3_000, 90_000, 1_234)
    assert (load.ttft_sla_ms, load.ttft_percentile) == (1500, 0.95)
    assert load.closed == ()
    assert load.num_preemptions == 0, "those of the warm-up don't count"


@pytest.mark.parametrize("gate", [gate for gate in get_args(scripts.Gate) if gate != "open"])
def test_every_gate_of_a_queue_is_told(gate: str) -> None:
    (closed,) = load_of(gates={"high": "open", "low": gate}).closed
    assert closed.gate == gate
    assert closed.why.startswith("low: ")


@pytest.mark.parametrize("gate", [gate for gate in get_args(StartGate) if gate != "open"])
def test_every_gate_of_the_engine_is_told(gate: str) -> None:
    (closed,) = load_of(start_gate=gate).closed
    assert closed.gate == f"start: {gate}"
    number = {"sequences": "32", "kv": "5,000", "ttft": "1,500 ms"}[gate]
    assert number in closed.why


def test_a_full_worker_says_so() -> None:
    assert [closed.why for closed in load_of(in_flight=40).closed] == [
        "40 documents are in flight, the limit is 40 now"
    ]


@pytest.mark.parametrize(
    ("waits", "median", "p95"), [([], None, None), ([70], 70, 70), (list(range(1, 101)), 50.5, 95.95)]
)
def test_time_in_the_queue_is_told_in_quantiles(waits: list[int], median: float | None, p95: float | None) -> None:
    load = load_of(queue_waits=deque(waits))
    assert (load.queue_p50_ms, load.queue_p95_ms) == (median, p95)


def test_throughput_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(live_load.time, "monotonic", lambda: now)
    courier = Courier()
    load = LiveLoad(Engine(), courier)
    for _ in range(90):  # two seconds apart: a document of 100 tokens a second, then two
        now += 2
        courier.num_finished += 2 if now <= 1100 else 4
        courier.num_tokens += 200 if now <= 1100 else 400
        said = load()
    assert said.documents_per_s == pytest.approx(2.0)
    assert said.tokens_per_s == pytest.approx(200.0)
