"""`planned_profile`: the simulated engine in the shape of a real one that nobody here has: Gemma 4 26B-A4B on a v6e-4.

Planned, not measured: sizes are arithmetic by the runtime's rules, times the middle of the ranges that the planner
expects of such a machine (`common/planner`), which no TPU has confirmed.
"""

from __future__ import annotations

from typing import Any

from ...common.planner import capacity, rates
from ...common.planner.hardware import machine
from ...common.planner.model_layout import load_layout
from ...common.planner.plan import EngineShape, Workload, make_plan
from ...common.planner.records import Plan
from ...common.planner.sizing import resolve
from .simulated_engine import Profile

# What deploy/engines/v6e-4-batch.yaml asks for.
MODEL, CHIPS = "gemma-4-26b-a4b", "v6e-4"
TENSOR_PARALLEL_SIZE = 4
KV_CACHE_DTYPE = "fp8_e5m2"
GPU_MEMORY_UTILIZATION = 0.90
MAX_MODEL_LEN = 8704
MAX_NUM_SEQS = 128
MAX_NUM_BATCHED_TOKENS = 8192

# The document that times and ideal layout are worked out for, in tokens: as in that file's comments.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 4096, 256


def planned_profile(
    *,
    ideal: bool = False,
    slowdown: float = 1.0,
    max_model_len: int = MAX_MODEL_LEN,
    max_num_seqs: int = MAX_NUM_SEQS,
    prompt_tokens: int = _PROMPT_TOKENS,
    output_tokens: int = _OUTPUT_TOKENS,
    **fields: Any,
) -> Profile:
    """The profile of one engine with the engine arguments of deploy/engines/v6e-4-batch.yaml.

    Args:
        ideal: the KV cache of a layout without padding and copies, where layers with a window keep their window; else
            as vLLM 0.32 allocates it. The simulated engine's blocks all grow with the sequence, so the ideal one has as
            many of them as hold its number of documents of the length below; longer ones would gain more.
        slowdown: all step times are this many times as long: an engine that is ill.
        max_model_len: prompt and output of the longest document; it decides the KV block size, with max_num_seqs.
        prompt_tokens: of the document that is planned for, like output_tokens: attention makes prefill of long prompts
            slower.
        fields: of the profile, in place of what is planned (seed, time_scale, output_tokens_median, ...).

    Raises:
        ValueError: the profile contradicts itself, as where max_model_len doesn't fit the KV cache.
    """
    plan = _plan(max_model_len, max_num_seqs, Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens))
    return Profile(
        **{
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            **_kv_cache(plan, ideal=ideal),
            **{name: ms * slowdown for name, ms in _times(plan, ideal=ideal).items()},
            **fields,
        }
    )


def _plan(max_model_len: int, max_num_seqs: int, workload: Workload) -> Plan:
    shape = EngineShape(
        tensor_parallel_size=TENSOR_PARALLEL_SIZE,
        kv_cache_dtype=KV_CACHE_DTYPE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
    )
    return make_plan(load_layout(MODEL), machine(CHIPS), workload, shape)


def _kv_cache(plan: Plan, *, ideal: bool) -> dict[str, int]:
    """Blocks and their tokens: `kv_pool_bytes` divided as `kv_tokens` says, or for `resident_sequences_ideal`."""
    _, sizing = resolve(plan.model, plan.machine, plan.workload, plan.shape)
    blocks_per_document = -(-plan.workload.total_tokens // sizing.block_size)
    if ideal:
        num_blocks = sizing.resident_sequences_ideal * blocks_per_document
    else:
        num_blocks = sizing.kv_cache.num_blocks(sizing.pool_bytes) - 1  # vLLM's null block
    return {"num_kv_blocks": num_blocks, "block_size": sizing.block_size}


def _times(plan: Plan, *, ideal: bool) -> dict[str, float]:
    """Milliseconds of a step: reading the weights; the window of each sequence; its other KV; computing prefill.

    Reading is by the roofline behind `decode_tokens_per_s`, at the middle of the share that is expected of it: weights
    for a full batch, whose tokens touch almost all experts; KV linear in the context from the window on. A step full of
    prefill takes what `prefill_tokens_per_s` says at its middle: its weights are read meanwhile.
    """
    decode = rates.decode_share()
    bytes_per_ms = (
        plan.machine.hbm_bytes_per_s * plan.shape.tensor_parallel_size * (decode.low + decode.high) / 2 / 1000.0
    )
    value_bytes = capacity.dtype_bytes("dtype", plan.shape.dtype)
    weights = rates.weight_bytes_read(
        plan.model, plan.machine, plan.shape.tensor_parallel_size, value_bytes, plan.shape.max_num_seqs
    )
    per_seq, per_token = _kv_bytes_read(plan, ideal=ideal)
    prefill = plan["prefill_tokens_per_s"]
    full_step_ms = MAX_NUM_BATCHED_TOKENS * 2000.0 / ((prefill.low or 0.0) + (prefill.high or 0.0))
    step_ms = weights / bytes_per_ms
    return {
        "step_ms": step_ms,
        "step_ms_per_seq": per_seq / bytes_per_ms,
        "step_ms_per_kv_token": per_token / bytes_per_ms,
        "step_ms_per_prefill_token": max(0.0, full_step_ms - step_ms) / MAX_NUM_BATCHED_TOKENS,
    }


def _kv_bytes_read(plan: Plan, *, ideal: bool) -> tuple[float, float]:
    """Bytes that a generated token reads of its sequence's windows, and for each token of its context."""
    value_bytes = capacity.kv_dtype_bytes(plan.shape.kv_cache_dtype, plan.shape.dtype)
    longest = plan.shape.max_model_len
    if ideal:
        return (
            float(capacity.ideal_kv_bytes_per_sequence(plan.model, value_bytes, longest)),
            float(capacity.ideal_kv_bytes_per_token(plan.model, value_bytes)),
        )
    size = plan.shape.tensor_parallel_size
    at_longest, before = (
        rates.kv_bytes_read(plan.model, plan.machine, size, value_bytes, num_tokens)
        for num_tokens in (longest, longest - 1)
    )
    per_token = at_longest - before
    return float(at_longest - per_token * longest), float(per_token)
