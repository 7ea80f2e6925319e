"""Whether an engine can fit its machine, asked of the planner before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ...common.errors import IngestqError, SettingsError
from ...common.planner.hardware import Machine
from ...common.planner.model_layout import ModelLayout, read_layout
from ...common.planner.plan import EngineShape, Plan, Workload, make_plan
from ...common.planner.sizing import resolve
from ...common.planner.unplanned import told, unplanned
from ...common.schema import Sampling

# What vLLM 0.32 takes where the arguments say nothing: a worker is a single `vllm.LLM`.
_DEFAULT_TENSOR_PARALLEL_SIZE = 1
_DEFAULT_GPU_MEMORY_UTILIZATION = 0.92


def check_fit(
    config: Mapping[str, Any],
    args: Mapping[str, Any],
    machine: Machine,
    *,
    misfit: Literal["refuse", "warn"],
) -> tuple[Plan | None, list[str]]:
    """The plan of an engine, and lines to log about it; no plan where the planner does not know what is asked.

    Args:
        config: the model's config.json.
        args: the engine's, after the guard rails.
        misfit: INGEST_MISFIT.

    Raises:
        SettingsError: it can't fit, and `misfit` is "refuse".
    """
    if asked := unplanned(args):
        return None, [f"whether the engine fits is not checked: the planner doesn't know {told(asked)}"]
    try:
        plan = plan_engine(config, args, machine)
        certain = _certain_problems(plan, config, args)
    except IngestqError as error:  # a layout that the planner does not understand
        return None, [f"whether the engine fits is not checked: {error}"]
    if certain and misfit == "refuse":
        raise SettingsError(
            f"it can't fit {machine.name}: {' '.join(certain)} (INGEST_MISFIT=warn starts it all the same)"
        )
    verdict = "it can't" if certain else "by estimate, it doesn't"
    problems = [f"{verdict} fit {machine.name}, and is started all the same: {problem}" for problem in plan.problems]
    return plan, [*problems, *plan.warnings]


def _certain_problems(plan: Plan, config: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[str, ...]:
    """The plan's problems that are left if weights and KV cache had all of the memory: what else is in it is estimated.

    An engine that has been set to the last block that vLLM can give it must start here, too.
    """
    machine, shape = plan.machine, plan.shape
    budget = int(machine.hbm_bytes * shape.tensor_parallel_size * shape.gpu_memory_utilization)
    room = budget - int(plan["weights_bytes"].value or 0)
    if not plan.problems or machine.kv_cache_bytes is not None or room <= 0:
        return plan.problems
    return plan_engine(config, args, replace(machine, kv_cache_bytes=room)).problems


def plan_engine(config: Mapping[str, Any], args: Mapping[str, Any], machine: Machine) -> Plan:
    """The plan of an engine for documents that fill its context.

    Raises:
        UnknownLayout: the planner does not understand the model's config.json.
    """
    overrides = args.get("hf_overrides")
    config = _merged(config, overrides) if isinstance(overrides, Mapping) else config
    layout = read_layout(config, str(args.get("model", "")))
    if args.get("language_model_only") or args.get("limit_mm_per_prompt"):  # vLLM then loads no tower, or not all
        layout = replace(layout, tower_parameters=0)
    length = _length(args, layout, machine)
    # vLLM itself refuses more than the model has positions for, before it loads anything, and may be told not to
    # (VLLM_ALLOW_LONG_MAX_MODEL_LEN).
    layout = replace(layout, max_position_embeddings=max(length, layout.max_position_embeddings))
    return make_plan(layout, machine, _filling(length), _shape(args, layout, length))


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """As vLLM's ModelConfig applies hf_overrides: a mapping changes the keys that it has."""
    merged = dict(config)
    for key, value in overrides.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = _merged(inner, value)
        merged[key] = value
    return merged


def _length(args: Mapping[str, Any], layout: ModelLayout, machine: Machine) -> int:
    """max_model_len as vLLM settles it: left out, it is the model's; -1 is as much of that as fits."""
    asked, whole = args.get("max_model_len"), layout.max_position_embeddings
    if asked != -1:
        return int(asked or whole)
    _, sizing = resolve(layout, machine, _filling(whole), _shape(args, layout, whole))
    return sizing.kv_cache.longest_sequence(sizing.pool_bytes, whole) or whole


def _filling(length: int) -> Workload:
    """A document that fills a context."""
    output = min(Sampling().max_tokens, length // 2)
    return Workload(prompt_tokens=length - output, output_tokens=output)


def _shape(args: Mapping[str, Any], layout: ModelLayout, length: int) -> EngineShape:
    dtype = str(args.get("dtype") or "auto").removeprefix("torch.")
    if dtype == "auto":  # vLLM takes float32 checkpoints as bfloat16, too
        dtype = layout.dtype if layout.dtype in ("bfloat16", "float16") else "bfloat16"
    share = args.get("gpu_memory_utilization")
    return EngineShape(
        tensor_parallel_size=args.get("tensor_parallel_size") or _DEFAULT_TENSOR_PARALLEL_SIZE,
        kv_cache_dtype=args.get("kv_cache_dtype") or "auto",
        dtype=dtype,
        max_model_len=length,
        max_num_seqs=args.get("max_num_seqs"),
        max_num_batched_tokens=args.get("max_num_batched_tokens"),
        block_size=args.get("block_size"),
        gpu_memory_utilization=_DEFAULT_GPU_MEMORY_UTILIZATION if share is None else share,
    )
