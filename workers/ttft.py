"""`TtftModel`: the time to first token to expect, and how far such expectations were off of late."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from ..common.settings import MAX_TTFT_MS

# First tokens that are remembered at least. The 95th percentile needs 20 of them, the 99th 100, and twice as many, so
# that one outlier among them is no percentile; more than that, and what went wrong once (an engine that slowed down) is
# held against it for longer.
_WINDOW = 256


class TtftModel:
    """Prompt tokens ahead over the prefill rate, plus what that was short of at the percentile in question.

    The margin is that of split conformal prediction (Vovk et al., Algorithmic Learning in a Random World, 2005): among
    n former errors the ceil((n + 1) * percentile)-th smallest, so that a next one drawn like them stays below it with
    that probability, whatever their distribution.
    """

    def __init__(self, percentile: float, *, first_margin_ms: float = 0.0) -> None:
        """
        Args:
            percentile: 0 to 1, of the first tokens that are to come within what is predicted.
            first_margin_ms: the margin until there are errors.
        """
        self._percentile = percentile
        self._first_margin_ms = first_margin_ms
        self._errors: deque[float] = deque(maxlen=max(_WINDOW, math.ceil(2 / (1 - percentile))))
        self._ttfts: deque[float] = deque(maxlen=_WINDOW)
        self._margin_ms: float | None = None

    def observe(self, ttft_ms: float, num_tokens: int, tokens_per_s: float | None) -> None:
        """A first token came.

        Args:
            ttft_ms: what it took since `add_request`; what can't be is ignored.
            num_tokens: prompt tokens that were ahead of it, its own included.
            tokens_per_s: the prefill rate; None: not known.
        """
        if not 0 <= ttft_ms <= MAX_TTFT_MS or not 0 <= num_tokens <= MAX_TTFT_MS:
            return
        self._ttfts.append(ttft_ms)
        if tokens_per_s:
            self._errors.append(ttft_ms - milliseconds(num_tokens, tokens_per_s))
            self._margin_ms = None

    @property
    def margin_ms(self) -> float:
        """What is added to a prediction; never negative: an engine that was early may have been lucky."""
        if not self._errors:
            return self._first_margin_ms
        if self._margin_ms is None:
            rank = math.ceil((len(self._errors) + 1) * self._percentile)
            # With too few of them, the largest is all there is to say.
            self._margin_ms = max(0.0, sorted(self._errors)[min(rank, len(self._errors)) - 1])
        return self._margin_ms

    def observed_ms(self, percentiles: Iterable[float]) -> list[float | None]:
        """Of the last first tokens: the smallest times that so many (0 to 1) of them were within."""
        ttfts = sorted(self._ttfts)
        return [ttfts[max(0, math.ceil(len(ttfts) * share) - 1)] if ttfts else None for share in percentiles]


def milliseconds(num_tokens: int, tokens_per_s: float) -> float:
    """That so many tokens take."""
    return num_tokens / tokens_per_s * 1e3
