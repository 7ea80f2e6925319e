"""The stand-in for the attention kernel computes what the runtime's own reference does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_inference.kernels.ragged_paged_attention.v3.kernel import get_kv_cache_shape, ref_ragged_paged_attention

from support.tpu_on_cpu import ragged_paged_attention

# Tokens that each sequence has in all, and of which it is given now: decoding, in the middle of a prompt, at its begin.
_LENGTHS, _NEW = [37, 40, 16, 5], [1, 11, 16, 5]
_PAGE, _PAGES, _MAX_SEQS, _TOKENS = 16, 4, 6, 48


def arguments(dtype: Any, kv_dtype: Any, num_kv_heads: int, head_dim: int) -> tuple[Any, ...]:
    """Sequences in shuffled pages of a cache that is full of other values, and padding behind them."""
    random = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        return jnp.asarray(random.normal(size=shape), dtype)

    keys, queries = values(2, _TOKENS, num_kv_heads, head_dim), values(_TOKENS, 4, head_dim)
    cache = values(*get_kv_cache_shape(_MAX_SEQS * _PAGES, _PAGE, num_kv_heads, head_dim, kv_dtype)).astype(kv_dtype)
    padding = _MAX_SEQS - len(_NEW)
    return (
        queries,
        *keys.astype(kv_dtype),
        cache,
        jnp.array(_LENGTHS + [0] * padding, jnp.int32),
        jnp.array(random.permutation(_MAX_SEQS * _PAGES), jnp.int32),
        jnp.array([0, *np.cumsum(_NEW), *[0] * padding], jnp.int32),
        jnp.array([1, 1, len(_NEW)], jnp.int32),
    )


@pytest.mark.parametrize(
    ("kv_dtype", "num_kv_heads", "options"),
    [
        (jnp.float32, 2, {}),
        (jnp.float32, 4, {"sliding_window": 7}),
        (jnp.float32, 2, {"soft_cap": 2.0}),
        (jnp.bfloat16, 1, {}),
        (jnp.float8_e5m2, 2, {"k_scale": 0.5, "v_scale": 2.0}),
        (jnp.float8_e5m2, 1, {}),  # packed by four, which two of them don't fill
    ],
)
def test_the_stand_in_equals_the_runtimes_reference(kv_dtype: Any, num_kv_heads: int, options: dict[str, Any]) -> None:
    given = arguments(jnp.float32, kv_dtype, num_kv_heads, 128)

    attention, cache = jax.jit(lambda *args: ragged_paged_attention(*args, sm_scale=0.1, **options))(*given)
    expected, expected_cache = ref_ragged_paged_attention(*given, sm_scale=0.1, **options)

    num_real = sum(_NEW)
    assert not np.asarray(attention[num_real:]).any()
    # The reference rounds the weights to the cache's type before it adds up; the kernel and we don't.
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 0.02, jnp.float8_e5m2: 0.3}[kv_dtype]
    np.testing.assert_allclose(np.asarray(attention[:num_real]), np.asarray(expected), atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.asarray(cache, np.float32), np.asarray(expected_cache, np.float32))
