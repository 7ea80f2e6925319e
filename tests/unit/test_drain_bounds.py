"""What settings, preset and engine make of a worker's bounds."""

from __future__ import annotations

from typing import Any

import pytest

from ingestq.common.settings import Settings
from ingestq.workers.drain import DrainBounds
from ingestq.workers.drain_bounds import drain_bounds, drain_controller
from ingestq.workers.engines.simulated_engine import SimulatedEngine


def engine_of(**profile: Any) -> SimulatedEngine:
    return SimulatedEngine.from_settings(Settings(engine="simulated", model="sim", engine_args=profile))


def bounds(engine: SimulatedEngine | None = None, **settings: Any) -> DrainBounds:
    return drain_bounds(Settings(engine="simulated", model="sim", **settings), engine or engine_of())


def test_a_batch_worker_leases_a_tenth_more_than_its_engine_runs() -> None:
    found = bounds(engine_of(max_num_seqs=256))
    assert (found.max_in_flight, found.ceiling, found.floor, found.max_num_seqs) == (282, 282, 128, 256)
    assert found.max_ready == 26
    assert found.ttft_sla_ms is None


@pytest.mark.parametrize("num_seqs", [1, 2, 10])
def test_a_small_engine_has_one_successor_at_hand_at_least(num_seqs: int) -> None:
    found = bounds(engine_of(max_num_seqs=num_seqs))
    assert (found.max_in_flight, found.max_ready) == (num_seqs + 1, 1)
    assert found.floor == num_seqs + 1, "the floor is no more than the ceiling"


@pytest.mark.parametrize(
    ("preset", "ceiling", "floor", "sla"),
    [
        ("interactive", 8, 1, 1500),
        ("standard", 64, 32, 2100),
        ("batch", 282, 128, None),
        ("long-context", 32, 16, None),
    ],
)
def test_a_preset_says_what_is_not_set(preset: str, ceiling: int, floor: int, sla: float | None) -> None:
    found = bounds(preset=preset)
    assert (found.ceiling, found.floor, found.ttft_sla_ms) == (ceiling, floor, sla)


def test_settings_are_taken_at_their_word() -> None:
    found = bounds(max_in_flight=1000, min_in_flight=7, max_kv_tokens=5000, ttft_sla_ms=900, ttft_percentile=0.9)
    assert (found.max_in_flight, found.floor, found.max_kv_tokens) == (1000, 7, 5000)
    assert (found.ttft_sla_ms, found.ttft_percentile) == (900, 0.9)
    assert found.max_ready == 1000 - 256, "what the engine doesn't run waits in the worker"


def test_a_time_to_first_token_of_0_is_none() -> None:
    assert bounds(preset="interactive", ttft_sla_ms=0).ttft_sla_ms is None


def test_within_a_wave_nobody_decides_what_starts_when() -> None:
    assert bounds(preset="interactive", feed="generate").ttft_sla_ms is None


def test_kv_tokens_are_those_of_the_cache_and_a_tenth_more() -> None:
    found = bounds(engine_of(num_kv_blocks=1000, block_size=16, max_model_len=1000))
    assert (found.num_blocks, found.max_kv_tokens) == (1000, 17600)


def test_a_controller_knows_how_small_companies_become() -> None:
    controller = drain_controller(Settings(engine="simulated", model="sim", max_in_flight=256), engine_of(), None)
    assert controller.companies == [16, 1]
    assert controller.in_flight_limit == 256
