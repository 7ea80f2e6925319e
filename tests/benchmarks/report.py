"""How a measurement ends: a table for people, then one JSON object on the last line, then the bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with aligned columns, numbers to three digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def conclude(figures: Mapping[str, Any], *, at_least: Mapping[str, float], at_most: Mapping[str, float]) -> int:
    """Prints the figures as JSON; returns the exit code: 1 when one misses its bar, each named on stderr."""
    missed = [
        f"{name} is {figures[name]}, the bar is >= {bar}" for name, bar in at_least.items() if figures[name] < bar
    ]
    missed += [
        f"{name} is {figures[name]}, the bar is <= {bar}" for name, bar in at_most.items() if figures[name] > bar
    ]
    for line in missed:
        print(f"MISSED: {line}", file=sys.stderr)
    sys.stderr.flush()
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps(rounded), flush=True)
    return 1 if missed else 0
