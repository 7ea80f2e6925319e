"""The documents of a run, always the same ones, and the streams that put them into the queue."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from lengths import long_tailed
from passages import reference

from ingestq.common.schema import IngestRequest, Sampling

MODEL = "simulated"

# Of the simulated tokenizer.
TOKEN_BYTES = 4

# Seconds between looks while the queue is long enough.
_LOOK = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What documents are like."""

    name: str
    # Tokens of a document's text, at least and at most; the simulated tokenizer's, four bytes each.
    prompt_tokens: tuple[int, int]
    # Output tokens at most. Most documents end before that, by the profile's own lengths: the worker learns them.
    max_tokens: int
    instruction: str = "Summarize."


LONG = Workload(name="long", prompt_tokens=(1_000, 16_000), max_tokens=512)
SHORT = Workload(name="short", prompt_tokens=(32, 256), max_tokens=256)


def documents(workload: Workload, number: int, *, prefix: str = "d", seed: int = 0) -> Iterator[IngestRequest]:
    """Real text of long-tailed lengths; document ids are `prefix/0`, `prefix/1`, ..."""
    rng = random.Random(seed)
    text = _reference(workload.prompt_tokens[1] * TOKEN_BYTES)
    sampling = Sampling(max_tokens=workload.max_tokens)
    for i in range(number):
        num_bytes = long_tailed(rng, *workload.prompt_tokens) * TOKEN_BYTES
        start = rng.randrange(len(text) - num_bytes)
        yield IngestRequest(
            document_id=f"{prefix}/{i}",
            text=text[start : start + num_bytes],
            model=MODEL,
            instruction=workload.instruction,
            chat=False,
            sampling=sampling,
        )


@cache
def _reference(num_bytes: int) -> str:
    """Text that is a few times as long as the longest document."""
    text = reference()
    return text * -(-4 * num_bytes // len(text))


class Throttle:
    """Keeps a stream of documents from filling Redis: lets them pass while the queue is short.

    Args:
        length: asks for the documents in the queue.
        depth: documents at which the stream waits.
        look_every: documents that are sent between looks.
    """

    def __init__(self, length: Callable[[], int], depth: int, look_every: int = 64) -> None:
        self._length = length
        self._depth = depth
        self._look_every = look_every
        self._open = threading.Event()
        self._open.set()
        self._stopped = threading.Event()

    def pause(self) -> None:
        """Nothing passes until `resume`: a step down."""
        self._open.clear()

    def resume(self) -> None:
        """What the queue's depth allows passes at once: a step up."""
        self._open.set()

    def stop(self) -> None:
        """Ends the stream early."""
        self._stopped.set()
        self._open.set()

    def __call__(self, requests: Iterator[IngestRequest]) -> Iterator[IngestRequest]:
        for i, request in enumerate(requests):
            if not self._open.is_set():
                self._open.wait()
            if i % self._look_every == 0:
                while self._length() >= self._depth and not self._stopped.is_set():
                    time.sleep(_LOOK)
            if self._stopped.is_set():
                return
            yield request
