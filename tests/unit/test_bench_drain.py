"""What `make bench-drain` counts and how: its pure parts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from drain.figures import (
    difference,
    intersection,
    jain,
    length,
    percentile,
    rolling,
    spans_where,
    time_to_return,
    tokens_within,
)
from drain.machine import BusyShare, next_factor
from drain.observer import Look, Observed, excesses
from drain.steps import First, Step, StepWriter, read_firsts, read_steps
from drain.worker import PacedEngine
from drain.workload import LONG, TOKEN_BYTES, Throttle, documents

from ingestq.common.limits import AdmissionLimits
from ingestq.common.schema import Sampling
from ingestq.common.settings import Settings
from ingestq.workers.engines.base import Prompt
from ingestq.workers.engines.simulated_engine import SimulatedEngine

# --- figures


def test_a_percentile_is_a_value_that_occurred() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 95) == 2.0
    assert math.isnan(percentile([], 95))


@pytest.mark.parametrize(("shares", "index"), [([5, 5], 1.0), ([1, 0], 0.5), ([1, 1, 0, 0], 0.5), ([3, 1], 0.8)])
def test_jains_index(shares: list[float], index: float) -> None:
    assert jain(shares) == pytest.approx(index)


def test_spans_are_cut_and_left_out() -> None:
    assert intersection([(0, 4), (6, 9)], [(3, 7)]) == [(3, 4), (6, 7)]
    assert difference([(0, 10)], [(2, 3), (5, 20)]) == [(0, 2), (3, 5)]
    assert difference([(0, 10)], []) == [(0, 10)]
    assert length([(0, 2), (3, 5)]) == 4


def test_a_span_holds_from_the_first_to_the_last_sample_that_does() -> None:
    samples = enumerate([False, True, True, False, True, False, True, True])

    assert spans_where(samples) == [(1, 2), (6, 7)]


def test_of_a_step_across_the_end_of_the_backlog_its_part_counts() -> None:
    assert tokens_within([(0.0, 1.0, 10), (1.0, 2.0, 10), (2.0, 3.0, 10)], [(0.5, 2.0)]) == 15.0


def test_time_to_return_ends_with_the_last_window_above_the_bound() -> None:
    points = rolling([(0.5, 1.0), (2.5, 9.0), (4.5, 1.0), (6.5, 9.0), (8.5, 1.0)], 2.0, 95)

    assert points == [(2.0, 1.0), (4.0, 9.0), (6.0, 1.0), (8.0, 9.0), (10.0, 1.0)]
    assert time_to_return(points, 5.0, step=2.0, until=20.0) == 6.0
    assert time_to_return(points, 5.0, step=2.0, until=5.0) == 2.0
    assert time_to_return(points, 5.0, step=9.0, until=20.0) == 0.0


# --- the observer


def look(in_flight: int, *, limits: AdmissionLimits | None = None, kv_tokens: int = 0) -> Look:
    return Look(
        at=0.0,
        queued=(0,),
        in_flight=in_flight,
        kv_tokens=kv_tokens,
        by_worker={"w": in_flight},
        kv_by_worker={"w": kv_tokens},
        limits=limits or AdmissionLimits(),
    )


def test_what_is_at_a_limit_does_not_exceed_it() -> None:
    limits = AdmissionLimits(max_in_flight=5, max_in_flight_fleet=5, max_kv_tokens=100, max_kv_tokens_fleet=100)

    assert excesses(None, look(5, limits=limits, kv_tokens=100), AdmissionLimits()) == {}
    assert excesses(None, look(7, limits=limits, kv_tokens=116), AdmissionLimits()) == {
        "max_in_flight": 2,
        "max_in_flight_fleet": 2,
        "max_kv_tokens": 16,
        "max_kv_tokens_fleet": 16,
    }


def test_the_lower_of_live_limit_and_setting_counts() -> None:
    assert excesses(None, look(6, limits=AdmissionLimits(max_in_flight=8)), AdmissionLimits(max_in_flight=5)) == {
        "max_in_flight": 1
    }


def test_below_a_lowered_limit_only_growth_is_an_excess() -> None:
    lowered = AdmissionLimits(max_in_flight_fleet=4)

    assert excesses(look(9), look(9, limits=lowered), AdmissionLimits()) == {}
    assert excesses(look(9), look(8, limits=lowered), AdmissionLimits()) == {}
    assert excesses(look(6), look(8, limits=lowered), AdmissionLimits()) == {"max_in_flight_fleet": 2}


def test_the_largest_excess_of_each_limit_is_kept() -> None:
    observed, bounds = Observed(), AdmissionLimits(max_in_flight=5)
    for in_flight in (5, 8, 5, 6):
        observed.note(None, look(in_flight), bounds)

    assert observed.overshoot == {"max_in_flight": 3}
    assert observed.max_in_flight_worker == 8


# --- steps


def test_steps_are_read_as_they_were_written_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    step = Step(1.0, 2.0, 0.5, 0.25, 100, 7, 300, 4, 1)
    firsts = [First(2.0, 120.5, 60, 40), First(2.0, 121.5, 40, 0)]
    for _ in range(2):  # two processes of one worker
        StepWriter(tmp_path, "engine-1").write(step, firsts)
    with (tmp_path / "engine-1.steps").open("ab") as torn:
        torn.write(b"half")

    assert read_steps(tmp_path, "engine-1") == [step, step]
    assert read_firsts(tmp_path, "engine-1") == [*firsts, *firsts]
    assert step.num_tokens == 107
    assert read_steps(tmp_path, "engine-2") == []


class Clock:
    """A clock that moves when somebody sleeps, and some more."""

    def __init__(self, overrun: float) -> None:
        self.now = 0.0
        self.slept = 0.0
        self.overrun = overrun

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds + self.overrun


def paced(clock: Clock, monkeypatch: pytest.MonkeyPatch, time_scale: float) -> PacedEngine:
    monkeypatch.setattr("drain.worker.time", clock)
    settings = Settings.from_env(
        {"INGEST_MODEL": "sim", "INGEST_ENGINE": "simulated", "INGEST_ENGINE_TIME_SCALE": "0"}
        | {"INGEST_ENGINE_STEP_MS": "100", "INGEST_ENGINE_STEP_MS_PER_SEQ": "0"}
        | {"INGEST_ENGINE_STEP_MS_PER_PREFILL_TOKEN": "0"}
    )
    return PacedEngine(SimulatedEngine.from_settings(settings), time_scale)


def prompt(num_output_tokens: int) -> Prompt:
    sampling = Sampling(max_tokens=num_output_tokens, ignore_eos=True)
    return Prompt(prompt_id="p", token_ids=[1], sampling=sampling)


def test_overruns_of_a_step_are_made_up_for_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(overrun=0.004)
    engine = paced(clock, monkeypatch, 0.1)
    engine.add_request(prompt(10))

    for _ in range(10):  # 100 ms each, of which a tenth
        engine.step()

    assert clock.now == pytest.approx(0.1 + 0.004)


def test_what_passes_between_steps_counts_as_simulated_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(overrun=0.0)
    engine = paced(clock, monkeypatch, 0.1)
    engine.add_request(prompt(10))

    for _ in range(10):
        engine.step()
        clock.now += 0.002

    # 10 steps and 9 gaps between them, the tenth gap is after the end.
    assert clock.now - 0.002 == pytest.approx((10 * 0.1 + 9 * 0.002) * 0.1)


def test_an_idle_engine_gets_nothing_back_for_its_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(overrun=0.0)
    engine = paced(clock, monkeypatch, 0.1)

    for _ in range(3):
        engine.add_request(prompt(1))
        engine.step()
        clock.now += 1.0

    assert clock.now == pytest.approx(3.0 + 3 * 0.01)


# --- the machine


def test_busy_is_what_was_not_idle_since_the_last_look(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 2 3\n")
    share = BusyShare(stat)
    stat.write_text("cpu  160 0 110 720 110 0 0 0 90 0\ncpu0 1 2 3\n")

    assert share.look(restart=False) == pytest.approx(0.7)
    assert share.look() == pytest.approx(0.7)
    assert share.look() == 0.0


def test_the_clock_is_slowed_down_by_what_the_machine_was_too_busy() -> None:
    assert next_factor(10.0, 0.9) == pytest.approx(10.0 * 0.6 / 0.9)
    assert next_factor(10.0, 0.71) == pytest.approx(8.0)


# --- documents


def test_documents_are_long_tailed_within_their_bounds_and_always_the_same() -> None:
    first, second = list(documents(LONG, 200)), list(documents(LONG, 200))
    lengths = sorted(len(request.text) // TOKEN_BYTES for request in first)

    assert first == second
    assert len({request.document_id for request in first}) == 200
    assert lengths[0] >= 1_000
    assert lengths[-1] <= 16_000
    assert lengths[100] < sum(lengths) / 200  # more short ones than long ones
    assert max(len(request.text.encode()) for request in first) <= Settings().max_text_bytes


def test_a_stream_waits_while_the_queue_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[object] = []
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        queued.clear()

    monkeypatch.setattr("drain.workload.time.sleep", sleep)
    throttle = Throttle(lambda: len(queued), depth=10, look_every=1)
    for request in throttle(documents(LONG, 25)):
        queued.append(request)
        assert len(queued) <= 10

    assert len(slept) == 2


def test_a_stream_that_is_stopped_ends() -> None:
    throttle = Throttle(lambda: 0, depth=10)
    throttle.pause()
    throttle.stop()

    assert list(throttle(documents(LONG, 5))) == []
