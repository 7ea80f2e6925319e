"""`QueueShares`: which of a worker's queues to lease from next."""

from __future__ import annotations

from collections.abc import Collection, Sequence

# Tokens by which the lower queues may be ahead of or behind their share: some 64 large documents. What goes beyond is
# forgotten, so that nobody saves up a claim while there is nothing to claim it for.
_MAX_CLAIM = 2**20

# Tokens that the lower queues have to have a claim to before one looks whether they have documents at all: a call to
# Redis for every large document or so, times 1 / share.
_LOOK_CLAIM = 2**14


class QueueShares:
    """Strict priority, but of the tokens leased while they have documents, the lower queues get a share.

    The lower ones are all but the first. Among themselves they are served in their order.
    """

    def __init__(self, queues: Sequence[str], lower_share: float) -> None:
        """
        Args:
            queues: in order of priority.
            lower_share: of the tokens, 0 to 1; 0: the lower ones wait until the first is empty.
        """
        self._first, *self._lower = queues
        self._share = lower_share
        # Tokens that the lower queues are behind their share; negative: ahead of it.
        self._claim = 0.0
        self._first_backlogged = False
        # Whether the lower ones were asked first the last time, and have given nothing since though there was room.
        self._asked = self._in_vain = False

    def order(self, backlogged: Collection[str]) -> list[str]:
        """All queues, in the order in which to try them.

        Args:
            backlogged: queues that had documents at the last look.
        """
        self._first_backlogged = self._first in backlogged
        known = not self._in_vain and any(queue in backlogged for queue in self._lower)
        self._asked = self._claim > (0 if known else _LOOK_CLAIM)
        return [*self._lower, self._first] if self._asked else [self._first, *self._lower]

    def leased(self, queue: str, num_tokens: int, *, had_room: bool = True) -> None:
        """Tells of tokens leased.

        Args:
            num_tokens: 0 if the queue gave nothing.
            had_room: whether the worker could have taken something.
        """
        if queue != self._first:
            self._leased_lower(num_tokens, had_room)
        else:
            if self._asked:  # all of them, and this one after them: what they have is for others, or nothing
                self._asked, self._in_vain, self._claim = False, True, min(self._claim, 0.0)
            self._claim += self._share * num_tokens
        self._claim = max(-_MAX_CLAIM, min(self._claim, _MAX_CLAIM))

    def _leased_lower(self, num_tokens: int, had_room: bool) -> None:
        if num_tokens:
            self._asked = self._in_vain = False
            if self._first_backlogged:  # what nobody else wanted is no advance
                self._claim -= (1 - self._share) * num_tokens
        elif not had_room:
            self._asked = False
