"""`ExpectedOutput`: how many tokens a task's documents write, learned from those that are finished.

A wrong expectation costs time, never a result: what is reserved too little makes the engine preempt a sequence and
compute it again, what is reserved too much lets fewer documents in.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import accumulate

# Buckets for each doubling of the length: a reservation is up to 19 % more than the quantile that it stands for.
_PER_DOUBLING = 4

# The largest bucket there may be: 2**32 tokens. What a histogram in Redis has beyond is no output length.
_MAX_BUCKET = 32 * _PER_DOUBLING

# Documents of a task before its histogram says more than the request's own max_tokens: of 16, the 95th percentile is
# the longest.
_MIN_OBSERVED = 16

# Of a task's documents, how many write no more than is reserved. The blocks of those that are shorter make up for the
# others: what all of them take together is far closer to its mean.
_RESERVED_QUANTILE = 0.95


def bucket_of(num_tokens: int) -> int:
    """The bucket of an output length: bucket b has the lengths in (2**((b-1)/4), 2**(b/4)], bucket 0 also none."""
    return math.ceil(math.log2(num_tokens) * _PER_DOUBLING) if num_tokens > 1 else 0


def upper_edge(bucket: int) -> int:
    """The longest length in a bucket, in tokens."""
    return int(2 ** (bucket / _PER_DOUBLING))


class ExpectedOutput:
    """What is known of the tasks of one queue. Not thread-safe."""

    def __init__(self, histograms: Mapping[str, Mapping[int, int]] | None = None) -> None:
        """
        Args:
            histograms: task -> bucket -> finished documents.
        """
        # Histograms and what is derived from them: the tokens to reserve, and the mean.
        self._histograms: dict[str, Counter[int]] = {}
        self._known: dict[str, tuple[int, float] | None] = {}
        # Not sent yet.
        self._observed: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.replace(histograms or {})

    def observe(self, task: str, num_output_tokens: int) -> bool:
        """A document finished. It counts at once here, and for others once it is sent (`take_observed`).

        Returns:
            Whether the task is known from now on, or from twice as many documents as when this last was true.
        """
        bucket = min(bucket_of(num_output_tokens), _MAX_BUCKET)
        self._observed[task][bucket] += 1
        histogram = self._histograms.setdefault(task, Counter())
        histogram[bucket] += 1
        self._known.pop(task, None)
        total = histogram.total()
        return total >= _MIN_OBSERVED and total.bit_count() == 1

    @property
    def has_observed(self) -> bool:
        return bool(self._observed)

    def take_observed(self) -> dict[str, dict[int, int]]:
        """What was observed since the last call, for `scripts.learn`."""
        observed = {task: dict(counts) for task, counts in self._observed.items()}
        self._observed.clear()
        return observed

    def replace(self, histograms: Mapping[str, Mapping[int, int]]) -> None:
        """Takes over what the fleet has learned; what can't be a count of lengths is left out."""
        self._histograms = {task: Counter(_sound(histogram)) for task, histogram in histograms.items()}
        for task, observed in self._observed.items():
            self._histograms.setdefault(task, Counter()).update(observed)
        self._known = {}

    def reserve(self, task: str, max_tokens: int) -> int:
        """Output tokens to reserve for a document: a high quantile of its task, `max_tokens` while that isn't known."""
        known = self._of(task)
        return min(known[0], max_tokens) if known else max_tokens

    def mean(self, task: str, max_tokens: int) -> float:
        """Output tokens to expect of a document; `max_tokens` while that isn't known."""
        known = self._of(task)
        return min(known[1], max_tokens) if known else float(max_tokens)

    def reservations(self) -> dict[str, int]:
        """Task -> output tokens to reserve, of the tasks that are known."""
        return {task: known[0] for task in self._histograms if (known := self._of(task))}

    def _of(self, task: str) -> tuple[int, float] | None:
        if task not in self._known:
            histogram = self._histograms.get(task)
            self._known[task] = _summary(histogram) if histogram else None
        return self._known[task]


def _sound(histogram: Mapping[int, int]) -> dict[int, int]:
    return {bucket: count for bucket, count in histogram.items() if 0 <= bucket <= _MAX_BUCKET and count > 0}


def _summary(histogram: Mapping[int, int]) -> tuple[int, float] | None:
    """Tokens to reserve, and the mean; None: too few documents to tell."""
    total = sum(histogram.values())
    if total < _MIN_OBSERVED:
        return None
    mean = sum(_middle(bucket) * count for bucket, count in histogram.items()) / total
    buckets = sorted(histogram)
    reached = accumulate(histogram[bucket] for bucket in buckets)
    quantile = next(b for b, count in zip(buckets, reached, strict=True) if count >= _RESERVED_QUANTILE * total)
    return upper_edge(quantile), mean


def _middle(bucket: int) -> float:
    """Of the bucket's two edges, the geometric mean."""
    return 2 ** ((bucket - 0.5) / _PER_DOUBLING) if bucket else 1.0
