"""From settings to an engine that may be built: the checks together, and the planner's word on whether it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ingestq.common.errors import SettingsError
from ingestq.common.settings import Settings
from ingestq.workers.startup.configure import Configured, Host, configure

ROOT = Path(__file__).parents[2]
GEMMA = json.loads((ROOT / "common" / "planner" / "models" / "gemma-4-26b-a4b.json").read_text())
LLAMA = json.loads((ROOT / "common" / "planner" / "models" / "llama-3.1-8b.json").read_text())
GIB = 2**30

# Enough of `vllm.EngineArgs` for these.
KNOWN = [
    "model",
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "watermark",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "disable_chunked_mm_input",
    "hf_overrides",
    "quantization",
    "enforce_eager",
    "block_size",
    "language_model_only",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "distributed_executor_backend",
    "enable_expert_parallel",
    "additional_config",
    "num_gpu_blocks_override",
    "disable_sliding_window",
]


def host(device: str = "tpu", chips: str | None = "v6e-4", **fields: Any) -> Host:
    given = {"memory_bytes": None, "kv_cache_bytes": None, "compile_cache": str(ROOT)}
    return Host(known_args=KNOWN, device=device, chips=chips, **{**given, **fields})


def configured(settings: Settings, on: Host | None = None, config: dict[str, Any] | None = GEMMA) -> Configured:
    return configure(settings, on or host(), lambda args: config)


def shipped(name: str, **fields: Any) -> Settings:
    return Settings(model="google/gemma-4-26B-A4B-it", engine_config=f"{ROOT}/deploy/engines/{name}.yaml", **fields)


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("v6e-4-batch", host()),
        ("v6e-4-long-context", host()),
        ("v6e-8", host(chips="v6e-8")),
        ("gpu", host("cuda", "h100-1")),
    ],
)
def test_each_shipped_file_fits_the_machine_that_it_is_for(name: str, on: Host) -> None:
    engine = configured(shipped(name), on)

    assert engine.plan is not None
    assert engine.plan.problems == ()
    assert engine.plan.machine.name == on.chips
    assert engine.args["model"] == "google/gemma-4-26B-A4B-it"
    assert engine.args["disable_log_stats"] is False


def test_the_plan_is_that_of_the_arguments_after_the_guard_rails() -> None:
    engine = configured(shipped("v6e-4-batch", engine_args={"kv_cache_dtype": "fp8"}))

    assert engine.args["kv_cache_dtype"] == "fp8_e5m2"
    assert engine.plan is not None
    assert engine.plan.shape.kv_cache_dtype == "fp8_e5m2"
    assert engine.plan["kv_bytes_per_token"].value == 143_360
    assert any("becomes fp8_e5m2" in line for line in engine.warnings)


def test_what_can_not_fit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(SettingsError) as refusal:
        configured(shipped("v6e-4-batch", engine_args={"tensor_parallel_size": 1}), host(chips="v6e-1"))

    message = str(refusal.value)
    assert message.startswith("it can't fit v6e-1: google/gemma-4-26B-A4B-it takes 5")
    assert "GiB" in message
    assert "(INGEST_MISFIT=warn starts it all the same)" in message


def test_what_can_not_fit_is_only_told_where_that_is_asked_for() -> None:
    settings = shipped("v6e-4-batch", engine_args={"tensor_parallel_size": 1}, misfit="warn")
    engine = configured(settings, host(chips="v6e-1"))

    assert any(line.startswith("it can't fit v6e-1, and is started all the same: ") for line in engine.warnings)


def test_an_argument_that_the_planner_does_not_know_is_told_not_refused() -> None:
    engine = configured(shipped("v6e-4-batch", engine_args={"quantization": "fp8"}))

    assert engine.plan is None
    assert "whether the engine fits is not checked: the planner doesn't know quantization='fp8'" in engine.warnings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decode_context_parallel_size", 4),
        ("distributed_executor_backend", "ray"),
        ("enable_expert_parallel", True),
        ("additional_config", {"quantization": {"qwix": {}}}),
        ("num_gpu_blocks_override", 100),
        ("disable_sliding_window", True),
        ("pipeline_parallel_size", 2),
    ],
)
def test_what_changes_the_memory_is_not_refused_by_a_plan_without_it(name: str, value: Any) -> None:
    """Each may let an engine start that would not start without; llama-3.1-8b is in float32 too large for this one."""
    args = {"dtype": "float32", "max_model_len": 4608, "max_num_seqs": 8}
    with pytest.raises(SettingsError, match="can't fit v6e-1"):
        configured(Settings(model="m", engine_args=args), host(chips="v6e-1"), LLAMA)

    engine = configured(Settings(model="m", engine_args={**args, name: value}), host(chips="v6e-1"), LLAMA)

    assert engine.plan is None
    assert any(f"the planner doesn't know {name}=" in line for line in engine.warnings)


def test_weights_that_the_tpu_runtime_quantizes_by_itself_are_not_planned() -> None:
    args = {"dtype": "float32", "max_model_len": 4608, "max_num_seqs": 8}
    on = host(chips="v6e-1", variables={"MOE_REQUANTIZE_WEIGHT_DTYPE": "float8_e4m3fn"})

    engine = configured(Settings(model="m", engine_args=args), on, LLAMA)

    assert engine.plan is None
    assert "MOE_REQUANTIZE_WEIGHT_DTYPE" not in engine.args
    assert any("the planner doesn't know MOE_REQUANTIZE_WEIGHT_DTYPE=" in line for line in engine.warnings)


def test_an_argument_at_its_default_is_planned_with() -> None:
    args = {"max_model_len": 4608, "max_num_seqs": 8, "pipeline_parallel_size": 1, "additional_config": {}}

    assert configured(Settings(model="m", engine_args=args), host("cuda", "h100-1"), LLAMA).plan is not None


def test_a_context_of_minus_one_is_what_fits() -> None:
    """vLLM shrinks it to the cache (kv_cache_utils._auto_fit_max_model_len); the model's 131,072 tokens take 16 GiB."""
    args = {"max_model_len": -1, "max_num_seqs": 8}
    plan = configured(Settings(model="m", engine_args=args), host(chips="v6e-1"), LLAMA).plan

    assert plan is not None
    assert plan.problems == ()
    assert 90_000 < plan.shape.max_model_len < 110_000
    assert plan["resident_sequences"].value == 1
    with pytest.raises(SettingsError, match=r"max_model_len=131072 takes 16\.00 GiB"):
        configured(Settings(model="m", engine_args={"max_num_seqs": 8}), host(chips="v6e-1"), LLAMA)


def test_only_what_is_certain_is_refused() -> None:
    """What a GPU's engine holds beside weights and cache is a planning value: vLLM may find room for a bit more."""
    args = {"max_model_len": 131072, "max_num_seqs": 8}
    gpu = host("cuda", "h100-1", memory_bytes=36 * GIB)  # 33.12 GiB at 0.92 - 14.96 GiB of weights; 16 GiB of KV

    engine = configured(Settings(model="m", engine_args=args), gpu, LLAMA)
    assert engine.plan is not None
    assert engine.plan.problems
    assert any(line.startswith("by estimate, it doesn't fit h100-1, and is started all") for line in engine.warnings)

    with pytest.raises(SettingsError, match="it can't fit h100-1: one sequence of max_model_len=131072"):
        configured(Settings(model="m", engine_args=args), replace(gpu, memory_bytes=33 * GIB), LLAMA)


def test_a_context_beyond_the_models_positions_is_left_to_vllm() -> None:
    """It refuses that itself before it loads anything, and may be told not to (VLLM_ALLOW_LONG_MAX_MODEL_LEN)."""
    args = {"max_model_len": 140_000, "max_num_seqs": 8}
    plan = configured(Settings(model="m", engine_args=args), host("cuda", "h100-1"), LLAMA).plan

    assert plan is not None
    assert plan.problems == ()


def test_the_memory_that_a_gpu_has_counts_not_that_of_others_of_its_name() -> None:
    args = {"max_model_len": 4608, "max_num_seqs": 8}
    found = host("cuda", "h100-1", memory_bytes=93 * GIB)

    nvl = configured(Settings(model="m", engine_args=args), found, LLAMA).plan
    named = configured(Settings(model="m", chips="h100", engine_args=args), found, LLAMA).plan

    assert nvl is not None
    assert named is not None
    assert nvl.machine.hbm_bytes == 93 * GIB
    assert named.machine.hbm_bytes < 80 * GIB


def test_the_tpu_runtime_does_not_read_kv_cache_memory_bytes() -> None:
    args = {"max_model_len": 4608, "max_num_seqs": 8, "kv_cache_memory_bytes": 1000}
    plan = configured(Settings(model="m", engine_args=args), host(), LLAMA).plan

    assert plan is not None
    assert plan.problems == ()
    assert plan["kv_pool_bytes"].value > GIB


def test_towers_that_are_not_loaded_are_not_counted() -> None:
    args = {"max_model_len": 4608, "max_num_seqs": 8}
    gpu = host("cuda", "h100-1")
    whole = configured(Settings(model="m", engine_args=args), gpu, GEMMA).plan
    text = configured(Settings(model="m", engine_args={**args, "language_model_only": True}), gpu, GEMMA).plan

    assert whole is not None
    assert text is not None
    assert text["weights_bytes"].value == whole["weights_bytes"].value - 2 * whole.model.tower_parameters


def test_a_block_size_that_is_given_is_planned_with() -> None:
    args = {"max_model_len": 4608, "max_num_seqs": 8, "block_size": 64}
    plan = configured(Settings(model="m", engine_args=args), host("cuda", "h100-1"), LLAMA).plan

    assert plan is not None
    assert (plan["block_size"].value, plan["block_size"].formula) == (64, "as given")


def test_a_layout_that_the_planner_does_not_know_is_told_not_refused() -> None:
    engine = configured(Settings(model="m", engine_args={"max_num_seqs": 8}), config={"model_type": "mamba"})

    assert engine.plan is None
    assert any("whether the engine fits is not checked: " in line and "mamba" in line for line in engine.warnings)


def test_a_machine_that_is_found_and_not_known_is_told_one_that_is_named_is_refused() -> None:
    settings = Settings(model="m", engine_args={"max_model_len": 4608})
    found = configured(settings, host("cuda", "b300-3"), LLAMA)
    assert found.plan is None
    assert any("b300-3" in line and "INGEST_CHIPS" in line for line in found.warnings)

    with pytest.raises(SettingsError, match=r"^INGEST_CHIPS='v6e-5': .*did you mean v6e-"):
        configured(settings.model_copy(update={"chips": "v6e-5"}), host(), LLAMA)


def test_the_machine_that_is_named_is_planned_for() -> None:
    settings = Settings(model="m", chips="v6e-8", engine_args={"max_num_seqs": 8, "max_model_len": 4608})

    plan = configured(settings, host(chips="v6e-4"), LLAMA).plan
    assert plan is not None
    assert plan.machine.name == "v6e-8"


def test_a_config_that_can_not_be_had_is_left_to_vllm() -> None:
    engine = configured(Settings(model="m", engine_args={"max_num_seqs": 8}), config=None)

    assert (engine.plan, engine.warnings) == (None, [])


def test_a_cpu_has_the_memory_that_is_set_aside_for_its_kv_cache_on_each_of_its_devices() -> None:
    settings = Settings(
        model="m", engine_args={"dtype": "float32", "max_model_len": 2304, "kv_cache_memory_bytes": GIB}
    )
    cpu = host("cpu", "cpu", memory_bytes=64 * GIB, kv_cache_bytes=2 * GIB)

    of_argument = configured(settings, replace(cpu, kv_cache_bytes=None), LLAMA).plan
    assert of_argument is not None
    assert of_argument["kv_pool_bytes"].value == GIB
    of_both = configured(settings, cpu, LLAMA).plan  # the variable has the last word: vllm/platforms/cpu.py
    assert of_both is not None
    assert of_both["kv_pool_bytes"].value == 2 * GIB
    both = {"tensor_parallel_size": 2, "dtype": "float32", "max_model_len": 2304}
    of_variable = configured(Settings(model="m", engine_args=both), cpu, LLAMA).plan
    assert of_variable is not None
    assert of_variable.problems == ()
    assert of_variable["kv_pool_bytes"].value == 4 * GIB


def test_without_max_model_len_it_is_the_models() -> None:
    plan = configured(Settings(model="m", misfit="warn"), host("cuda", "h100-1"), LLAMA).plan

    assert plan is not None
    assert plan.shape.max_model_len == 131072


def test_hf_overrides_are_planned_with() -> None:
    args = {"hf_overrides": {"num_hidden_layers": 16}, "max_model_len": 4608, "max_num_seqs": 8}
    whole = configured(Settings(model="m", engine_args={**args, "hf_overrides": {}}), host("cuda", "h100-1"), LLAMA)
    half = configured(Settings(model="m", engine_args=args), host("cuda", "h100-1"), LLAMA)

    assert whole.plan is not None
    assert half.plan is not None
    assert half.plan["kv_bytes_per_token"].value == whole.plan["kv_bytes_per_token"].value / 2


def test_hf_overrides_change_what_a_nested_section_has() -> None:
    args = {"max_model_len": 4608, "max_num_seqs": 8, "hf_overrides": {"text_config": {"num_kv_shared_layers": 15}}}
    plan = configured(Settings(model="m", engine_args=args), host("cuda", "h100-1"), GEMMA).plan

    assert plan is not None
    assert len(plan.model.kv_layers) == 15


def test_on_tpu_a_compile_cache_in_an_object_store_is_warned_about() -> None:
    settings = shipped("v6e-4-batch")

    assert any(
        "gs://b/c is an object store" in line for line in configured(settings, host(compile_cache="gs://b/c")).warnings
    )
    on_gpu = configured(shipped("gpu"), host("cuda", "h100-1", compile_cache="gs://b/c"))
    assert not any("gs://" in line for line in on_gpu.warnings)


def test_names_come_before_values_and_a_model_is_needed() -> None:
    with pytest.raises(SettingsError, match=r"^INGEST_ENGINE_SWAP_SPACE is no engine argument"):
        configured(Settings(model="m", engine_args={"swap_space": 4, "max_model_len": 1}))
    with pytest.raises(SettingsError, match="INGEST_MODEL is not set"):
        configured(Settings())
