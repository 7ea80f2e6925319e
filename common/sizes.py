"""`byte_size`: a number of bytes as people read it."""

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
