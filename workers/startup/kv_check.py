"""Whether an engine's KV cache is the one that was asked for, and as large as was planned. Decisions only."""

from __future__ import annotations

from ...common.planner.plan import Plan
from ..engines.base import KvCache

# `kv_cache_dtype` as vLLM takes it, and how such values are stored (STR_DTYPE_TO_TORCH_DTYPE in its torch_utils.py,
# 0.32). "auto" and what is packed in other ways are left to the engine.
_STORED = {
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "bfloat16": "bfloat16",
    "float16": "float16",
}

# Share by which a figure may miss its plan before it is said: what the engine takes for activations is no exact figure.
_TOLERANCE = 0.10


def wrong_dtype(kv_cache: KvCache) -> str | None:
    """Why the cache isn't of the type that was asked for, and what to do; None if it is, or can't be told."""
    wanted = _STORED.get(kv_cache.asked)
    if wanted is None or not kv_cache.is_read or wanted in kv_cache.dtype.split(", "):
        return None
    return (
        f"kv_cache_dtype={kv_cache.asked!r} was asked for, the engine's KV cache is {kv_cache.dtype}; ask for what "
        f"this device can store, leave kv_cache_dtype out, or take it as it is with INGEST_MISFIT=warn"
    )


def off_plan(kv_cache: KvCache, plan: Plan) -> list[str]:
    """What the engine has of KV cache against what was planned, where it is more than 10 % off."""
    planned = {"kv_tokens": kv_cache.num_tokens, "block_size": kv_cache.block_size}
    told = []
    for name, found in planned.items():
        bounds = _bounds(plan, name)
        if bounds and not bounds[0] * (1 - _TOLERANCE) <= found <= bounds[1] * (1 + _TOLERANCE):
            told.append(f"{name}: the plan says {_told(bounds)}, the engine has {found}")
    return told


def _bounds(plan: Plan, name: str) -> tuple[float, float] | None:
    """The least and the most that was planned; None where the plan doesn't say."""
    if name not in plan:
        return None
    figure = plan[name]
    low, high = (figure.low, figure.high) if figure.value is None else (figure.value, figure.value)
    return None if low is None or high is None else (low, high)


def _told(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
