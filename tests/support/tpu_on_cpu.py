"""The real TPU runtime (vllm-tpu and tpu-inference 0.32.0) generates on a CPU, by JAX: `install()` before the engine.

Its scheduler, worker, model runner, KV cache manager, sampler and model are the real ones; so are the KV arrays, in
their layout and dtype. What a CPU can't do is replaced, each for the reason above its function:

1. compiler options that only XLA's TPU compiler knows;
2. what the devices say about themselves: how much memory they have, and where in the mesh they are;
3. what the host hands over without a copy: the runner goes on to write into it;
4. the attention kernel, which Mosaic compiles for TPUs alone; `test_on_cpu.py` compares the stand-in with the
   reference that the runtime ships.

Nothing else of Pallas is used by the tiny model: a kernel that JAX should run here raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# The environment of a process that runs it. JAX: a CPU that counts as a TPU. The model in JAX, as on v6e. Steps are
# compiled when they are first needed: all shapes at start would take minutes.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MODEL_IMPL_TYPE": "flax_nnx",
    "SKIP_JAX_PRECOMPILE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

# Scores of keys that a query must not see: far below any other, and finite (inf - inf is no number).
_MASKED = -1e30


def install(hbm_bytes: int) -> None:
    """Replaces what a CPU can't do. Before anything else of `tpu_inference` is imported, with ENVIRONMENT set.

    Args:
        hbm_bytes: what each device says that it has, and nothing of it in use: the KV cache takes its share of it.
    """
    _replace_compiler_options()
    _replace_devices(hbm_bytes)
    _copy_what_is_handed_over()
    import tpu_inference.layers.common.attention_interface as interface

    interface.ragged_paged_attention = ragged_paged_attention


def _replace_compiler_options() -> None:
    """`xla_tpu_*`: XLA's CPU compiler stops at an option that it doesn't know."""
    from tpu_inference.models.common import compiler_options

    compiler_options.get_step_fn_compiler_options = dict
    compiler_options.get_sampling_compiler_options = dict


def _replace_devices(hbm_bytes: int) -> None:
    """A CPU device has neither memory statistics nor coordinates in a mesh.

    The runtime's own way out, counting live arrays, counts each twice here: a shard of an array is another live one.
    """
    from tpu_inference import utils

    utils.hbm_usage_bytes = lambda devices: [(0, hbm_bytes) for _ in devices]
    utils.make_optimized_mesh = _mesh


def _copy_what_is_handed_over() -> None:
    """JAX on a CPU takes a NumPy array as it is where a TPU would copy it, and computes later.

    The runner prepares the next step in the same arrays meanwhile: without this, outputs depend on who is faster.
    """
    import jax
    import numpy as np
    from tpu_inference import utils

    put = utils.general_device_put

    def put_copy(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        copied = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tensors)
        return put(copied, *args, **kwargs)

    utils.general_device_put = put_copy


def _mesh(axis_shapes: Sequence[int], axis_names: Sequence[str], *, devices: Sequence[Any] | None = None) -> Any:
    """The devices in the order of their numbers."""
    import jax
    import numpy as np

    chosen = list(devices or jax.devices())[: math.prod(axis_shapes)]
    return jax.sharding.Mesh(np.array(chosen).reshape(axis_shapes), axis_names)


def ragged_paged_attention(
    queries: Any,
    keys: Any,
    values: Any,
    kv_cache: Any,
    kv_lens: Any,
    page_indices: Any,
    cu_q_lens: Any,
    distribution: Any,
    *,
    sm_scale: float = 1.0,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    **_tuning: Any,
) -> tuple[Any, Any]:
    """What `kernels/ragged_paged_attention/v3/kernel.py` computes, in plain JAX on arrays of the same layout.

    A sequence's keys are always reduced in the same order, wherever it stands in the batch: what a document becomes
    doesn't depend on its company.

    Args:
        queries: [num_tokens, num_q_heads, head_dim]; all sequences' new tokens, one after the other.
        keys, values: [num_tokens, num_kv_heads, head_dim], in the cache's dtype.
        kv_cache: [num_pages, page_size, num_kv_heads * 2 // packing, packing, padded head_dim].
        kv_lens: [max_num_seqs]; tokens of each sequence, the new ones included.
        page_indices: [max_num_seqs * pages_per_seq].
        cu_q_lens: [max_num_seqs + 1]; where each sequence's new tokens begin.
        distribution: [3]; the last is the number of sequences.

    Returns:
        The attention, in the shape of `queries`; and the cache with the new tokens in it.
    """
    import jax
    import jax.numpy as jnp

    num_tokens, num_q_heads, head_dim = queries.shape
    num_kv_heads, num_pages = keys.shape[1], kv_cache.shape[0]
    page_size, padded_dim = kv_cache.shape[1], kv_cache.shape[-1]
    pages = page_indices.reshape(kv_lens.shape[0], -1)
    out_dtype = jnp.float32 if queries.dtype == jnp.float32 else jnp.bfloat16

    # Of each token: its sequence and its position in it. The last tokens are padding.
    token = jnp.arange(num_tokens)
    sequence = jnp.clip(jnp.searchsorted(cu_q_lens[1:], token, side="right"), 0, kv_lens.shape[0] - 1)
    position = kv_lens[sequence] - (cu_q_lens[sequence + 1] - token)
    is_real = token < cu_q_lens[distribution[2]]

    if update_kv_cache:
        page = pages[sequence, jnp.clip(position // page_size, 0, pages.shape[1] - 1)]
        page = jnp.where(is_real, page, num_pages)  # padding goes nowhere: mode="drop"
        merged = _merged(keys, values, kv_cache)
        kv_cache = kv_cache.at[page, position % page_size].set(merged, mode="drop")

    # [num_tokens, length, num_kv_heads, head_dim]: each token's sequence.
    cached = kv_cache[pages].reshape(*pages.shape[:1], -1, kv_cache.shape[2] * kv_cache.shape[3], padded_dim)
    cached = cached[:, :, : num_kv_heads * 2, :head_dim].astype(jnp.float32)[sequence]
    cached_keys, cached_values = cached[:, :, 0::2], cached[:, :, 1::2]

    if q_scale is not None:
        queries = (queries / q_scale).astype(kv_cache.dtype)
    grouped = queries.reshape(num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim).astype(jnp.float32)
    scores = jnp.einsum("thgd,tlhd->thgl", grouped, cached_keys) * (sm_scale * (k_scale or 1.0) * (q_scale or 1.0))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    key = jnp.arange(scores.shape[-1])
    is_seen = key < kv_lens[sequence][:, None]
    if use_causal_mask:
        is_seen &= key <= position[:, None]
        if sliding_window is not None:
            is_seen &= position[:, None] < key + sliding_window
    weights = jax.nn.softmax(jnp.where(is_seen[:, None, None], scores, _MASKED), axis=-1)
    attention = jnp.einsum("thgl,tlhd->thgd", weights, cached_values).reshape(queries.shape) * (v_scale or 1.0)
    return jnp.where(is_real[:, None, None], attention, 0).astype(out_dtype), kv_cache


def _merged(keys: Any, values: Any, kv_cache: Any) -> Any:
    """K and V of each head side by side, padded and packed as in the cache."""
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel

    return kernel.merge_kv(keys, values).astype(kv_cache.dtype)
