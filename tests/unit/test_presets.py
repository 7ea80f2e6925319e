"""The tiers of service: what they choose, and how far their promise holds."""

import pytest

from ingestq.common.planner.hardware import machine
from ingestq.common.planner.model_layout import load_layout
from ingestq.common.planner.plan import EngineShape, Plan, Workload, make_plan
from ingestq.common.planner.rates import mean_ttft_seconds
from ingestq.common.presets import TIERS
from ingestq.common.settings import MAX_IN_FLIGHT, Settings
from ingestq.producer.presets import PRESETS, max_in_flight_within


def test_the_tiers_are_the_articles():
    assert {name: (tier.floor, tier.ceiling, tier.ttft_sla_ms) for name, tier in TIERS.items()} == {
        "interactive": (1, 8, 1500),
        "standard": (32, 64, 2100),
        "batch": (128, 1024, None),
        "long-context": (16, 32, None),
    }


@pytest.mark.parametrize("name", TIERS)
def test_what_is_planned_is_what_a_worker_keeps_to(name):
    tier = TIERS[name]
    assert Settings.from_env({"INGEST_PRESET": name}).preset == tier.name
    assert tier.ceiling <= MAX_IN_FLIGHT
    assert PRESETS[name].max_num_seqs in (tier.ceiling, None)
    assert PRESETS[name].max_ttft_ms == tier.ttft_sla_ms


def plan_of(prompt_tokens: int, chips: str = "v6e-4", **more: int) -> Plan:
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=256, **more)
    memory = 64 * 2**30 if chips == "cpu" else None
    return make_plan(load_layout("gemma-4-e4b"), machine(chips, memory_bytes=memory), workload, EngineShape())


@pytest.mark.parametrize("name", ["interactive", "standard"])
def test_as_many_as_keep_the_promise_and_not_one_more(name):
    preset, plan = PRESETS[name], plan_of(16_384)
    low, high = max_in_flight_within(preset, plan)
    rate = plan["prefill_tokens_per_s"]
    for number, tokens_per_s in ((low, rate.low), (high, rate.high)):
        assert mean_ttft_seconds(number, 16_384, tokens_per_s) <= preset.max_ttft_ms / 1000
        assert mean_ttft_seconds(number + 1, 16_384, tokens_per_s) > preset.max_ttft_ms / 1000


def test_a_shared_prefix_that_is_cached_lets_more_in():
    preset = PRESETS["standard"]
    assert max_in_flight_within(preset, plan_of(16_384, shared_prefix_tokens=12_288)) > max_in_flight_within(
        preset, plan_of(16_384)
    )


def test_one_document_is_always_let_in():
    assert max_in_flight_within(PRESETS["interactive"], plan_of(100_000, "v5e-4"))[0] >= 1


def test_there_is_no_promise_without_a_rate_or_a_bound():
    assert max_in_flight_within(PRESETS["batch"], plan_of(1000)) is None
    assert max_in_flight_within(PRESETS["standard"], plan_of(1000, "cpu")) is None
