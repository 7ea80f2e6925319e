"""Producers and readers of a run: threads of this process, through the library that users have."""

from __future__ import annotations

import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from redis import Redis

from ingestq.common import keys
from ingestq.common.schema import IngestRequest, Status
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue, iter_results

from .workload import MODEL, Throttle

# Seconds that a finished row stays: Redis stays small, and the reader is never that late.
_RESULT_TTL = 120

# Seconds after which a row had to be waited for, and for which others gather then: rows that are read by the dozen cost
# a fraction, and this process is to leave the machine to those that are measured.
_WAITED, _GATHER = 0.0005, 0.2

# Seconds that the documents of one run may take.
_PATIENCE = 7200.0


class Traffic:
    """One tenant's documents: submitted as the queue takes them, their rows read as they come.

    Attributes:
        throttle: pauses the stream, and lets it go on.
        statuses: how many documents have ended, and how.
    """

    def __init__(
        self, url: str, queue: str, requests: Iterator[IngestRequest], *, depth: int, tenant: str = ""
    ) -> None:
        self.statuses: Counter[Status] = Counter()
        # Of the rows, in their order: seconds by time.monotonic(), tokens of prompt and output.
        self.times, self.tokens = array("d"), array("L")
        self.attempts: Counter[int] = Counter()
        self._redis, self._reads = Redis.from_url(url), Redis.from_url(url)
        self._is_ending = False
        self._tenant = tenant
        self._queue = IngestQueue(
            queue,
            connection=Redis.from_url(url),
            settings=Settings(model=MODEL, result_ttl=_RESULT_TTL, failure_ttl=_RESULT_TTL),
        )
        waiting = keys.queue(queue, tenant)
        # A small depth is kept document by document.
        self.throttle = Throttle(lambda: self._redis.llen(waiting), depth, look_every=min(64, depth // 8 + 1))
        self._requests = self.throttle(requests)
        self._group_id = f"bench-{tenant or 'all'}"
        self._failure: BaseException | None = None
        self._opened = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(part,), daemon=True) for part in (self._submit, self._read)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_ending = True
        self.throttle.stop()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def num_ended(self) -> int:
        """Documents whose rows have come."""
        return len(self.times)

    @property
    def is_over(self) -> bool:
        """Whether all rows have come; also when a thread has failed, which leaving the context tells."""
        return self._failure is not None or not any(thread.is_alive() for thread in self._threads)

    def _guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:  # told on leaving the context
            self._failure = error
            self._opened.set()

    def _submit(self) -> None:
        self._queue.enqueue_many(self._opening(), group_id=self._group_id, tenant=self._tenant)

    def _opening(self) -> Iterator[IngestRequest]:
        """The stream; its group is there from the first document on."""
        self._opened.set()
        yield from self._requests

    def _read(self) -> None:
        self._opened.wait()
        if self._failure is not None:
            return
        asked = time.monotonic()
        for row in iter_results(self._group_id, connection=self._reads, timeout=_PATIENCE):
            if self._is_ending:
                return
            if time.monotonic() - asked > _WAITED:
                time.sleep(_GATHER)
            self.statuses[row.status] += 1
            self.attempts[row.attempts] += 1
            self.times.append(time.monotonic())
            self.tokens.append(row.usage.prompt_tokens + row.usage.output_tokens)
            asked = time.monotonic()
