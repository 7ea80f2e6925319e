"""`AdaptiveLimit`: a limit that gives way when things go wrong, and comes back as they go well."""

from __future__ import annotations

# What is left of a limit when it shrinks. KV blocks run out because documents write more than those before them, not
# because twice as many were admitted as fit: halving, as TCP does, would idle half of the engine.
_SHRINK = 0.75

# Of the ceiling, what a limit gains with a generation that went well: back after one shrink in five of them.
_GROW = 0.05


class AdaptiveLimit:
    """Additive increase, multiplicative decrease (Chiu and Jain, 1989) between a floor and a ceiling.

    It moves once in a *generation* at most: until as many documents have passed as may be in flight. Those in flight
    were admitted under the former limit, and what happens to them says nothing of the new one.
    """

    def __init__(self, floor: float, ceiling: float) -> None:
        """Starts at the ceiling; a floor above that is the ceiling."""
        self.ceiling = ceiling
        self.floor = min(floor, ceiling)
        self.value = ceiling
        self._num_passed = 0
        self._was_used = self._went_wrong = False

    def shrink(self) -> None:
        """Something went wrong."""
        if self._went_wrong:
            return
        self.value = max(self.floor, self.value * _SHRINK)
        self._num_passed = 0
        self._went_wrong = True

    def passed(self, num_documents: int, generation: int, *, used: bool) -> None:
        """Documents went through.

        Args:
            generation: how many of them make one.
            used: whether the limit kept something waiting. What isn't used can't prove itself, and does not grow.
        """
        self._num_passed += num_documents
        self._was_used |= used
        if self._num_passed < generation:
            return
        if self._was_used and not self._went_wrong:
            self.value = min(self.ceiling, self.value + self.ceiling * _GROW)
        self._num_passed = 0
        self._was_used = self._went_wrong = False
