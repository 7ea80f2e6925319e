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

    Prompts are put in *generations*, and one generation goes before the next, so that a short one isn't passed by
    longer ones for ever. Thread-safe; no call waits for the engine or for Redis.
    """

    def __init__(self, generation: int) -> None:
        """
        Args:
            generation: prompts that make one.
        """
        self._generation = max(1, generation)
        # (generation, negative expected output, order of arrival, prompt)
        self._heap: list[tuple[int, float, int, Ready]] = []
        self._num_put = 0
        self._num_tokens = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens."""
        return self._num_tokens

    def put(self, ready: Ready) -> None:
        with self._changed:
            generation = self._num_put // self._generation
            heapq.heappush(self._heap, (generation, -ready.expected_output, self._num_put, ready))
            self._num_put += 1
            self._num_tokens += ready.num_prompt_tokens
            self._changed.notify_all()

    def reorder(self, expected_output: Callable[[Ready], float]) -> None:
        """Orders what waits by what is expected of it now, each in its generation as before."""
        with self._changed:
            self._heap = [
                (generation, -tokens, number, replace(ready, expected_output=tokens))
                for generation, _, number, ready in self._heap
                for tokens in [expected_output(ready)]
            ]
            heapq.heapify(self._heap)

    def take(self, gate: Callable[[Ready], bool]) -> list[Ready]:
        """Takes out, in order, what `gate` lets pass, up to the first that it doesn't: nobody overtakes that one."""
        taken: list[Ready] = []
        with self._changed:
            while self._heap and gate(self._heap[0][-1]):
                taken.append(heapq.heappop(self._heap)[-1])
                self._num_tokens -= taken[-1].num_prompt_tokens
        return taken

    def drain(self) -> list[Ready]:
        """Takes out everything, in order of arrival."""
        with self._changed:
            drained = [entry[-1] for entry in sorted(self._heap, key=lambda entry: entry[2])]
            self._heap.clear()
            self._num_tokens = 0
        return drained

    def drop(self, prompt_ids: Collection[str]) -> None:
        """Forgets prompts; unknown ids are ignored."""
        with self._changed:
            self._heap = [entry for entry in self._heap if entry[-1].prompt_id not in prompt_ids]
            heapq.heapify(self._heap)
            self._num_tokens = sum(entry[-1].num_prompt_tokens for entry in self._heap)

    def wait(self, timeout: float) -> bool:
        """Whether something is there, after waiting for it `timeout` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._heap), timeout)
