"""Sizes: bytes as people read them, tokens in whole KV cache blocks."""

from __future__ import annotations

from collections.abc import Callable

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def byte_size(num_bytes: float, number: Callable[[float], str] = "{:.2f}".format) -> str:
    """In the binary unit that suits it.

    Args:
        number: how the number before the unit is written; default: to two places.
    """
    for unit, size in _UNITS:
        if abs(num_bytes) >= size:
            return f"{number(num_bytes / size)} {unit}"
    return f"{num_bytes:,.0f} B"


def whole_blocks(num_tokens: int, block_size: int) -> int:
    """Tokens, rounded up to whole blocks of `block_size` tokens; as in lease.lua."""
    return -(-num_tokens // block_size) * block_size
