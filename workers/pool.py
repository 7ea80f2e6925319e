"""`ReadyPool`: prompts that are leased and tokenized, and wait for the engine."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from .engines.base import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A prompt and what it needs."""

    prompt: Prompt
    # KV blocks that it takes at most, if it writes no more than is reserved.
    num_blocks: int
    # Output tokens to expect; for the order only.
    expected_output: float
    # KV tokens that are reserved for it.
    kv_tokens: int

    @property
    def prompt_id(self) -> str:
        return self.prompt.prompt_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids)


class ReadyPool:
    """Longest expected work first: the last to run then are short, and leave little of the engine idle (Graham's LPT).

    A prompt is passed by a bounded number of others, so that a short one doesn't wait for ever. Thread-safe; no call
    waits for the engine or for Redis.
    """

    def __init__(self, max_passes: int) -> None:
        """
        Args:
            max_passes: prompts that may be put in after one and go before it. As many as may be in flight keep a narrow
                pool near the order of arrival, where another would only bunch the short ones (bench-feed).
        """
        self._max_passes = max_passes
        # By order of arrival. The heap has (negative expected output, order of arrival), also of some that are gone.
        self._waiting: dict[int, Ready] = {}
        self._heap: list[tuple[float, int]] = []
        self._num_put = 0
        self._num_tokens = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens."""
        return self._num_tokens

    def put(self, ready: Ready) -> None:
        with self._changed:
            self._waiting[self._num_put] = ready
            heapq.heappush(self._heap, (-ready.expected_output, self._num_put))
            self._num_put += 1
            self._num_tokens += ready.num_prompt_tokens
            self._changed.notify_all()

    def reorder(self, expected_output: Callable[[Ready], float]) -> None:
        """Orders what waits by what is expected of it now."""
        with self._changed:
            for number, ready in self._waiting.items():
                self._waiting[number] = replace(ready, expected_output=expected_output(ready))
            self._rebuild()

    def take(self, gate: Callable[[Ready], bool]) -> list[Ready]:
        """Takes out, in order, what `gate` lets pass, up to the first that it doesn't: nobody overtakes that one."""
        taken: list[Ready] = []
        with self._changed:
            while self._waiting and gate(self._waiting[number := self._next()]):
                taken.append(self._waiting.pop(number))
                self._num_tokens -= taken[-1].num_prompt_tokens
            if len(self._heap) > 2 * len(self._waiting) + 64:  # mostly of prompts that are gone
                self._rebuild()
        return taken

    def _next(self) -> int:
        oldest = next(iter(self._waiting))
        if self._num_put - oldest > self._max_passes:
            return oldest
        while self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def drain(self) -> list[Ready]:
        """Takes out everything, in order of arrival."""
        with self._changed:
            drained = list(self._waiting.values())
            self._waiting.clear()
            self._rebuild()
        return drained

    def drop(self, prompt_ids: Collection[str]) -> None:
        """Forgets prompts; unknown ids are ignored."""
        with self._changed:
            self._waiting = {
                number: ready for number, ready in self._waiting.items() if ready.prompt_id not in prompt_ids
            }
            self._rebuild()

    def wait(self, timeout: float) -> bool:
        """Whether something is there, after waiting for it `timeout` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._waiting), timeout)

    def _rebuild(self) -> None:
        self._heap = [(-ready.expected_output, number) for number, ready in self._waiting.items()]
        heapq.heapify(self._heap)
        self._num_tokens = sum(ready.num_prompt_tokens for ready in self._waiting.values())
