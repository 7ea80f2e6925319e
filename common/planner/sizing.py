"""`Sizing`: what a model in one engine shape takes and leaves; `resolve` chooses what the shape leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from .capacity import (
    CPU_PROCESS_BYTES,
    TPU_RESIDENT_SHARE,
    KvCacheShape,
    block_size,
    ideal_kv_bytes_per_sequence,
    ideal_kv_bytes_per_token,
    kv_cache_shape,
    kv_dtype_bytes,
    weight_bytes,
)
from .hardware import GIB, Machine
from .model_shapes import ModelLayout
from .records import EngineShape, ResolvedShape, Workload

# More sequences at once than vLLM's own default for large accelerators (vllm/engine/arg_utils.py) are not suggested.
_MAX_NUM_SEQS = 1024

# Tokens of a step where nothing is asked for: vLLM's default for `LLM` on GPUs, and on the CPU. Upstream's Gemma 4 jobs
# on TPU use 4096; both lie far above what one step needs to be bound by computing.
_BATCHED_TOKENS, _CPU_BATCHED_TOKENS = 8192, 4096

# Of each GPU, for CUDA's context, graphs, NCCL and the activations of one step: a planning value, vLLM profiles it.
_CUDA_RESERVED_BYTES = 3 * GIB


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Bytes are over all devices that share the model."""

    weight_bytes: int
    # What the runtime holds beside weights and KV cache.
    overhead_bytes: int
    # Memory that the runtime may take in all.
    budget_bytes: int
    # What is left for the KV cache; not above 0: the weights don't fit.
    pool_bytes: int
    # Bytes of one cached value.
    value_bytes: int
    block_size: int
    kv_cache: KvCacheShape
    # Sequences of the workload's length that the cache holds at once.
    resident_sequences: int
    # The same in a layout without padding and copies, with windows kept.
    resident_sequences_ideal: int


def resolve(
    layout: ModelLayout, machine: Machine, workload: Workload, shape: EngineShape
) -> tuple[ResolvedShape, Sizing]:
    """The shape with everything chosen that was left open, and what comes of it."""
    tokens = _CPU_BATCHED_TOKENS if machine.runtime == "cpu" else _BATCHED_TOKENS
    widest = ResolvedShape(
        tensor_parallel_size=shape.tensor_parallel_size or machine.num_devices,
        kv_cache_dtype=shape.kv_cache_dtype,
        dtype=shape.dtype,
        max_model_len=shape.max_model_len or workload.total_tokens,
        max_num_seqs=shape.max_num_seqs or _MAX_NUM_SEQS,
        max_num_batched_tokens=shape.max_num_batched_tokens or max(tokens, shape.max_num_seqs or 0),
        block_size=shape.block_size,
        gpu_memory_utilization=shape.gpu_memory_utilization,
    )
    sizing = size(layout, machine, workload, widest)
    if shape.max_num_seqs is not None:
        return widest, sizing
    limit = min(_MAX_NUM_SEQS, widest.max_num_batched_tokens)
    chosen = ResolvedShape(**{**vars(widest), "max_num_seqs": min(max(sizing.resident_sequences, 1), limit)})
    return chosen, size(layout, machine, workload, chosen)


def size(layout: ModelLayout, machine: Machine, workload: Workload, shape: ResolvedShape) -> Sizing:
    """What the model takes in this shape, and what is left."""
    value_bytes = kv_dtype_bytes(shape.kv_cache_dtype, shape.dtype)
    weights = weight_bytes(layout, machine, tensor_parallel_size=shape.tensor_parallel_size, dtype=shape.dtype)
    overhead = _overhead_bytes(machine, weights, shape.tensor_parallel_size)
    budget = int(machine.hbm_bytes * shape.tensor_parallel_size * shape.gpu_memory_utilization)
    pool = budget - weights - overhead if machine.kv_cache_bytes is None else machine.kv_cache_bytes
    block = shape.block_size or block_size(machine, max_model_len=shape.max_model_len, max_num_seqs=shape.max_num_seqs)
    kv_cache = kv_cache_shape(
        layout,
        machine,
        tensor_parallel_size=shape.tensor_parallel_size,
        value_bytes=value_bytes,
        block_size=block,
        max_num_batched_tokens=shape.max_num_batched_tokens,
    )
    return Sizing(
        weight_bytes=weights,
        overhead_bytes=overhead,
        budget_bytes=budget,
        pool_bytes=pool,
        value_bytes=value_bytes,
        block_size=block,
        kv_cache=kv_cache,
        resident_sequences=kv_cache.resident_sequences(pool, workload.total_tokens),
        resident_sequences_ideal=_resident_ideal(layout, pool, value_bytes, workload.total_tokens),
    )


def _overhead_bytes(machine: Machine, weights: int, tensor_parallel_size: int) -> int:
    if machine.runtime == "tpu":
        return int(weights * (TPU_RESIDENT_SHARE - 1.0))
    return CPU_PROCESS_BYTES if machine.runtime == "cpu" else _CUDA_RESERVED_BYTES * tensor_parallel_size


def _resident_ideal(layout: ModelLayout, pool_bytes: int, value_bytes: int, num_tokens: int) -> int:
    growing = ideal_kv_bytes_per_token(layout, value_bytes) * num_tokens
    return max(0, pool_bytes) // (growing + ideal_kv_bytes_per_sequence(layout, value_bytes, num_tokens))
