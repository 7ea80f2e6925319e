"""Why a plan can't run, and what to know of one that can: each check a pure function with one sentence or none."""

from __future__ import annotations

from collections.abc import Iterator

from ..sizes import byte_size
from .capacity import kv_bytes_per_token, window_of
from .hardware import Machine
from .model_shapes import ModelLayout
from .records import ResolvedShape, Workload
from .sizing import Sizing


def problems(
    layout: ModelLayout, machine: Machine, workload: Workload, shape: ResolvedShape, sizing: Sizing
) -> Iterator[str]:
    """Sentences with value, bound and way out; none: it fits."""
    yield from _devices(layout, machine, shape)
    yield from _lengths(layout, workload, shape)
    yield from _kv_dtype(machine, shape)
    yield from _memory(layout, machine, shape, sizing)
    if shape.max_num_batched_tokens < shape.max_num_seqs:
        yield (
            f"max_num_batched_tokens={shape.max_num_batched_tokens} is below max_num_seqs={shape.max_num_seqs}: every "
            f"running sequence needs a token of each step; raise the one or lower the other"
        )


def warnings(
    layout: ModelLayout, machine: Machine, workload: Workload, shape: ResolvedShape, sizing: Sizing
) -> Iterator[str]:
    """What runs, but not as one may expect."""
    tensor_parallel_size = shape.tensor_parallel_size
    if tensor_parallel_size < machine.num_devices:
        yield (
            f"tensor_parallel_size={tensor_parallel_size} leaves {machine.num_devices - tensor_parallel_size} of "
            f"{machine.num_devices} devices idle; the figures are of one engine, start more workers for the rest"
        )
    if machine.name.startswith("v6e") and shape.kv_cache_dtype in ("fp8", "fp8_e4m3"):
        yield f"kv_cache_dtype={shape.kv_cache_dtype} is slow on v6e (tpu-inference#1112); write fp8_e5m2"
    if machine.fp8_kv is None and sizing.value_bytes == 1:
        yield f"kv_cache_dtype={shape.kv_cache_dtype} needs AVX-512 or AMX on a CPU; without them write auto"
    yield from _fp8_gain(layout, machine, shape, sizing)
    yield from _windows_lost(layout, machine)
    if 0 < sizing.resident_sequences < shape.max_num_seqs:
        yield (
            f"max_num_seqs={shape.max_num_seqs} and the KV cache holds {sizing.resident_sequences} sequences of "
            f"{workload.total_tokens} tokens: more will be preempted and computed again; lower max_num_seqs"
        )


def _devices(layout: ModelLayout, machine: Machine, shape: ResolvedShape) -> Iterator[str]:
    size = shape.tensor_parallel_size
    if size > machine.num_devices:
        yield f"tensor_parallel_size={size} is above the {machine.num_devices} devices of {machine.name}; lower it"
    if layout.num_query_heads % size:
        yield f"tensor_parallel_size={size} doesn't divide {layout.num_query_heads} query heads; {_divisors(layout)}"
    for heads in sorted({layer.num_kv_heads for layer in layout.kv_layers}):
        if heads % size and size % heads:
            yield f"tensor_parallel_size={size} and {heads} KV heads don't divide each other; {_divisors(layout)}"
    if layout.experts and layout.experts.width % size:
        width = layout.experts.width
        yield f"tensor_parallel_size={size} doesn't divide the experts' width {width}; {_divisors(layout)}"


def _divisors(layout: ModelLayout) -> str:
    kv_heads = {layer.num_kv_heads for layer in layout.kv_layers}
    width = layout.experts.width if layout.experts else 0
    sizes = [
        size
        for size in range(1, layout.num_query_heads + 1)
        if layout.num_query_heads % size == 0
        and width % size == 0
        and all(heads % size == 0 or size % heads == 0 for heads in kv_heads)
    ]
    return f"take one of {', '.join(map(str, sizes))}"


def _lengths(layout: ModelLayout, workload: Workload, shape: ResolvedShape) -> Iterator[str]:
    if workload.total_tokens > shape.max_model_len:
        yield (
            f"prompt_tokens={workload.prompt_tokens} and output_tokens={workload.output_tokens} are "
            f"{workload.total_tokens} tokens, max_model_len is {shape.max_model_len}: the output would be cut short or "
            f"the prompt refused; raise max_model_len to {workload.total_tokens}, or split the documents"
        )
    if shape.max_model_len > layout.max_position_embeddings:
        yield (
            f"max_model_len={shape.max_model_len} is above the {layout.max_position_embeddings} positions that the "
            f"model was made for; split the documents"
        )


def _kv_dtype(machine: Machine, shape: ResolvedShape) -> Iterator[str]:
    if machine.fp8_kv is False and shape.kv_cache_dtype.startswith("fp8"):
        yield f"kv_cache_dtype={shape.kv_cache_dtype}: {machine.name} has no fp8 KV cache; write auto"


def _memory(layout: ModelLayout, machine: Machine, shape: ResolvedShape, sizing: Sizing) -> Iterator[str]:
    if machine.hbm_bytes == 0 and machine.kv_cache_bytes is None:
        yield f"the memory of {machine.name} is not known; say it, or what VLLM_CPU_KVCACHE_SPACE sets aside"
        return
    if sizing.pool_bytes <= 0:
        yield (
            f"{layout.name} takes {byte_size(sizing.weight_bytes + sizing.overhead_bytes)}, and "
            f"{shape.tensor_parallel_size} devices of {machine.name} give {byte_size(sizing.budget_bytes)} at "
            f"gpu_memory_utilization={shape.gpu_memory_utilization}; take more devices or a smaller model"
        )
        return
    cache, length = sizing.kv_cache, shape.max_model_len
    if not cache.resident_sequences(sizing.pool_bytes, length):
        yield (
            f"one sequence of max_model_len={length} takes "
            f"{byte_size(cache.blocks_per_sequence(length) * cache.bytes_per_block)} of KV cache, and there are "
            f"{byte_size(sizing.pool_bytes)}, for {cache.longest_sequence(sizing.pool_bytes, length)} tokens; "
            f"lower max_model_len or take more devices"
        )


def _fp8_gain(layout: ModelLayout, machine: Machine, shape: ResolvedShape, sizing: Sizing) -> Iterator[str]:
    if machine.runtime != "tpu" or sizing.value_bytes != 1:
        return
    size = shape.tensor_parallel_size
    wide, narrow = (
        kv_bytes_per_token(layout, machine, tensor_parallel_size=size, kv_cache_dtype=dtype)
        for dtype in ("bfloat16", shape.kv_cache_dtype)
    )
    if wide < 2 * narrow:
        yield (
            f"fp8 fits {wide / narrow:.2f} times the tokens of bfloat16 here, not twice: a device with one KV head of "
            f"a layer has two values to pack where a word takes four"
        )


def _windows_lost(layout: ModelLayout, machine: Machine) -> Iterator[str]:
    windowed = [layer for layer in layout.kv_layers if layer.sliding_window is not None]
    lost = sum(window_of(machine, layout, layer) is None for layer in windowed)
    if lost:
        yield (
            f"the runtime keeps all tokens of {lost} layers that only look back on a window, "
            f"so a long sequence takes several times what the model needs"
        )
