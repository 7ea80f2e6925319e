"""Pure arithmetic on what was observed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# A stretch of time: seconds, start and end.
Span = tuple[float, float]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of them don't exceed; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has everything; NaN when nobody has anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else math.nan


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def intersection(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """What lies in both; each is in order and free of overlaps."""
    found = []
    for a_start, a_end in first:
        for b_start, b_end in second:
            start, end = max(a_start, b_start), min(a_end, b_end)
            if start < end:
                found.append((start, end))
    return found


def difference(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """What lies in the first alone."""
    edges = [-math.inf, *(edge for span in second for edge in span), math.inf]
    return intersection(first, list(zip(edges[::2], edges[1::2], strict=True)))


def is_within(at: float, spans: Sequence[Span]) -> bool:
    return any(start <= at < end for start, end in spans)


def spans_where(samples: Iterable[tuple[float, bool]]) -> list[Span]:
    """Stretches between samples (time, whether it holds) that hold at both ends."""
    spans: list[Span] = []
    start = last = None
    for at, holds in samples:
        if holds and start is None:
            start = at
        if holds:
            last = at
        elif start is not None:
            spans.append((start, last))
            start = None
    if start is not None:
        spans.append((start, last))
    return [(a, b) for a, b in spans if b > a]


def tokens_within(steps: Iterable[tuple[float, float, int]], spans: Sequence[Span]) -> float:
    """Tokens of the steps (start, end, tokens) within spans; of a step that lies across an end, its part."""
    total = 0.0
    for start, end, num_tokens in steps:
        if num_tokens:
            inside = length(intersection([(start, end)], spans))
            total += num_tokens * inside / (end - start) if end > start else num_tokens * is_within(start, spans)
    return total


def rolling(events: Sequence[tuple[float, float]], window: float, percent: float) -> list[tuple[float, float]]:
    """(end of window, percentile of the values in it), window by window; those without events are left out."""
    buckets: dict[int, list[float]] = {}
    for at, value in events:
        buckets.setdefault(math.floor(at / window), []).append(value)
    return [((i + 1) * window, percentile(values, percent)) for i, values in sorted(buckets.items())]


def time_to_return(points: Sequence[tuple[float, float]], bound: float, step: float, until: float) -> float:
    """From a step on, how long until the last window that is above the bound has ended; 0 when none is."""
    above = [at for at, value in points if step < at <= until and value > bound]
    return max(above) - step if above else 0.0
