"""Numbers as people read them (the precision that they have, the unit that suits their size), and text in columns."""

from __future__ import annotations

import textwrap

from ..common.planner.plan import Figure
from ..common.sizes import byte_size


def bounds(figure: Figure) -> tuple[float, float]:
    """The range that the figure is known to, of no width where it is arithmetic; 0 is what isn't known at all."""
    value = figure.value or 0.0
    return (value if figure.low is None else figure.low), (value if figure.high is None else figure.high)


# Units that say no more than the name of their figure does.
_SILENT = {"sequences", "documents", "shapes", "documents/h", "currency"}
# Above this an exact number is rounded all the same: nobody reads ten digits.
_LONGEST = 10_000_000


def shown(figure: Figure) -> str:
    """The figure with its unit, or its range if it has no value; at the precision that it has."""
    if figure.unit == "1 is yes":
        return "met at the best rate only" if figure.value is None else "met" if figure.value else "missed"
    ends = [figure.value] if figure.value is not None else [figure.low, figure.high]
    known = [end for end in ends if end is not None]
    told = [_with_unit(end, figure.unit, figure.exact, max(known)) for end in known]
    if len(told) == 2 and (number := told[0].partition(" "))[2] == told[1].partition(" ")[2]:
        told[0] = number[0]  # one unit for both
    return " - ".join(dict.fromkeys(told)) or "unknown"


def _with_unit(value: float, unit: str, exact: bool, largest: float) -> str:
    if unit in ("h", "ms"):
        seconds = 3600 if unit == "h" else 1e-3
        return duration(value * seconds, largest * seconds)
    if unit == "currency":
        return f"{value:,.2f}"
    if unit == "bytes" or (unit.startswith("bytes/") and value >= 2**20):
        return byte_size(value, rounded) + unit.removeprefix("bytes")
    number = f"{value:,.0f}" if exact and value == int(value) and value < _LONGEST else rounded(value)
    return number if unit in _SILENT else f"{number} {unit}".rstrip()


def duration(value: float, largest: float | None = None) -> str:
    """Of `value` seconds, in the unit that suits `largest` (default: itself)."""
    for unit, size, enough in (("days", 86400, 3), ("h", 3600, 2), ("min", 60, 2), ("s", 1, 1)):
        if (value if largest is None else largest) >= enough * size:
            return f"{rounded(value / size)} {unit}"
    return f"{rounded(value * 1000)} ms"


def rounded(value: float) -> str:
    """12,300,000 as 12.3M, 392,345 as 392k, 9,364 as 9,360, 63.28 as 63.3, 20 as 20."""
    for suffix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (1e5 if suffix == "k" else size):
            return f"{float(f'{value / size:.3g}'):g}{suffix}"
    return f"{float(f'{value:.3g}'):,g}"


def beside(head: str, text: str, width: int) -> str:
    """`text` beside `head`, its further lines below its first."""
    room = max(width - len(head), 20)
    lines = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]).rstrip()
