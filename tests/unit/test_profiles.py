"""The planned profile is what the planner says of the engine file that it stands for."""

from pathlib import Path

import pytest
import yaml

from ingestq.common.planner.hardware import machine
from ingestq.common.planner.model_layout import load_layout
from ingestq.common.planner.plan import EngineShape, Workload, make_plan
from ingestq.workers.engines import profiles
from ingestq.workers.engines.profiles import planned_profile

ENGINE = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "engines" / "v6e-4-batch.yaml").read_text())
PROMPT, OUTPUT = 4096, 256


@pytest.fixture(scope="module")
def plan():
    names = ("tensor_parallel_size", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    shape = EngineShape(
        gpu_memory_utilization=ENGINE["gpu_memory_utilization"], **{name: ENGINE[name] for name in names}
    )
    workload = Workload(prompt_tokens=PROMPT, output_tokens=OUTPUT)
    return make_plan(load_layout(ENGINE["model"]), machine("v6e-4"), workload, shape)


def middle(figure):
    return (figure.low + figure.high) / 2


def test_the_engine_is_that_of_the_engine_file():
    profile = planned_profile()
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        assert getattr(profile, name) == ENGINE[name]
    for name in ("tensor_parallel_size", "kv_cache_dtype", "gpu_memory_utilization"):
        assert getattr(profiles, name.upper()) == ENGINE[name]


def test_the_kv_cache_is_as_vllm_allocates_it(plan):
    profile = planned_profile()
    assert profile.block_size == plan["block_size"].value
    # The plan counts the null block.
    assert (profile.num_kv_blocks + 1) * profile.block_size == plan["kv_tokens"].value
    assert profile.num_kv_blocks // -(-(PROMPT + OUTPUT) // profile.block_size) == plan["resident_sequences"].value


def test_the_ideal_layout_holds_as_many_documents_as_planned(plan):
    profile = planned_profile(ideal=True)
    resident = profile.num_kv_blocks // -(-(PROMPT + OUTPUT) // profile.block_size)
    assert resident == plan["resident_sequences_ideal"].value > 4 * plan["resident_sequences"].value
    assert profile.step_ms_per_kv_token < planned_profile().step_ms_per_kv_token


def test_a_step_full_of_prefill_has_the_middle_of_the_planned_rate(plan):
    profile = planned_profile()
    num_tokens = profile.max_num_batched_tokens
    assert num_tokens * 1e3 / profile.step_time_ms(0, num_tokens) == pytest.approx(middle(plan["prefill_tokens_per_s"]))


def test_the_resident_documents_decode_at_the_middle_of_the_planned_rate(plan):
    profile, num_seqs = planned_profile(), int(plan["resident_sequences"].value)
    step_ms = profile.step_time_ms(num_seqs, 0, num_seqs * (PROMPT + OUTPUT // 2))
    # The weights are those of a full batch here, of the resident sequences there.
    assert num_seqs * 1e3 / step_ms == pytest.approx(middle(plan["decode_tokens_per_s"]), rel=0.01)


def test_a_slow_engine_takes_longer_for_every_step_and_is_as_large():
    profile, slow = planned_profile(), planned_profile(slowdown=3.0)
    assert slow.step_time_ms(80, 4000, 300_000) == pytest.approx(3 * profile.step_time_ms(80, 4000, 300_000))
    assert slow.num_kv_blocks == profile.num_kv_blocks


@pytest.mark.parametrize(("max_model_len", "max_num_seqs"), [(16_896, 128), (2048, 1024)])
def test_other_lengths_have_other_blocks_but_no_more_tokens(max_model_len, max_num_seqs):
    profile, other = planned_profile(), planned_profile(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    assert other.block_size > profile.block_size
    assert other.num_kv_blocks * other.block_size == pytest.approx(profile.num_kv_blocks * profile.block_size, rel=1e-3)


def test_fields_of_the_profile_can_be_given():
    assert planned_profile(seed=7, time_scale=0.5, output_tokens_median=80).seed == 7
    with pytest.raises(ValueError, match="num_kv_block"):
        planned_profile(num_kv_block=7)
