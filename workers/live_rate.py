"""`LiveRate`: how fast an engine is now, from the steps that it really ran."""

from __future__ import annotations

import math

# Full steps in which what was seen before is forgotten to a third (by work, not by time: an idle hour says nothing).
# Fewer would follow the noise of single steps, more would take longer to see that an engine slows down.
_MEMORY = 20

# Full steps that a rate known beforehand counts for: a handful of real ones outvote it.
_SEED_WEIGHT = 2

# Full steps that one step counts for at most, in tokens and in time: one in which a shape was compiled, minutes among
# steps of 0.2 s, must not close the gates for the next hundred.
_MAX_WEIGHT = 8

# Seconds of a step that can be: nothing computes in less than a microsecond, and INGEST_STEP_TIMEOUT ends at a day.
_SHORTEST, _LONGEST = 1e-6, 86400.0

# Tokens per second that no engine reaches: above, a rate is a mistake.
_MAX_RATE = 1e9


class LiveRate:
    """Tokens per second as a ratio of sums, which weighs steps by their length as a mean of rates would not.

    Steps that were *full* count: those that had as much of the work in question as they could take. The others are
    gathered until they make a full one, and that counts if it was faster all the same, for a full one would be. So an
    estimate that is too low doesn't keep itself alive by holding back the work that would correct it, and no single
    short step (an output that was already there, a prompt out of the prefix cache) makes it too high.
    """

    def __init__(self, full_step_tokens: int, seed: float | None = None) -> None:
        """
        Args:
            full_step_tokens: tokens that a step computes at most.
            seed: tokens per second, as known beforehand; what can't be a rate is ignored.
        """
        self._full_step = max(1, full_step_tokens)
        self._tokens = self._seconds = 0.0
        # Of steps that were not full, since they last made a full one.
        self._part_tokens = self._part_seconds = 0.0
        if seed is not None and 0 < seed < _MAX_RATE:
            self._add(_SEED_WEIGHT * self._full_step, _SEED_WEIGHT * self._full_step / seed)

    @property
    def tokens_per_s(self) -> float | None:
        """None: nothing is known yet. Otherwise more than 0, and finite."""
        return self._tokens / self._seconds if self._tokens else None

    def observe(self, num_tokens: int, seconds: float, *, full: bool) -> None:
        """One step; one that can't have been is ignored."""
        if not (_SHORTEST <= seconds <= _LONGEST and 0 <= num_tokens < math.inf):
            return
        num_tokens = min(num_tokens, _MAX_WEIGHT * self._full_step)
        if full:
            self._count(num_tokens, seconds)
            return
        self._part_tokens += num_tokens
        self._part_seconds += seconds
        rate = self.tokens_per_s
        if rate is None or self._part_tokens >= self._full_step:
            if self._part_tokens > self._part_seconds * (rate or 0.0):
                self._count(self._part_tokens, self._part_seconds)
            self._part_tokens = self._part_seconds = 0.0

    def _count(self, num_tokens: float, seconds: float) -> None:
        rate = self.tokens_per_s
        self._add(num_tokens, min(seconds, _MAX_WEIGHT * self._full_step / rate) if rate else seconds)

    def _add(self, num_tokens: float, seconds: float) -> None:
        kept = math.exp(-num_tokens / (self._full_step * _MEMORY))
        self._tokens = self._tokens * kept + num_tokens
        self._seconds = self._seconds * kept + seconds
