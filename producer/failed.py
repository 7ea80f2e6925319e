"""Documents that failed: `list_failed`, `fetch_failed` and `retry_failed`, over RQ's FailedJobRegistry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..common import keys, payload, scripts
from ..common.connections import persist
from ..common.errors import InvalidJob, SettingsError
from ..common.schema import IngestResult
from ..common.scripts import MAX_CALL_BYTES, FetchedJob
from .group import PATIENCE, check_name
from .rows import terminal_row

if TYPE_CHECKING:
    from .queue import IngestQueue

T = TypeVar("T")

# RQ's words for jobs that are in its FailedJobRegistry.
_ENDED_BADLY = ("failed", "stopped")

# What stands in a job's `groups` for whoever submitted it alone; see enqueue.lua.
_LONE = "(lone)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedDocument:
    """A document that failed or was stopped."""

    # As its readers get it: with the reason in error_class and error_message.
    row: IngestResult
    # When it failed, in milliseconds since the epoch by Redis' clock; None where nothing in Redis tells.
    failed_ms: int | None
    # Seconds since then, when it was read.
    age: float | None
    # Workers that were lost while they held it.
    crashes: int
    # The groups that it is in.
    groups: tuple[str, ...]

    @property
    def job_id(self) -> str:
        return self.row.job_id


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedFilter:
    """Which failed documents are meant: those for which everything that is given here holds."""

    group: str | None = None
    # As in their rows, such as "WorkerLost".
    error_class: str | None = None
    # Seconds since they failed, at least and at most.
    older_than: float | None = None
    newer_than: float | None = None

    def __post_init__(self) -> None:
        if self.group is not None:
            check_name("group", self.group)
        for name in ("older_than", "newer_than"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds >= 0:
                raise SettingsError(f"{name} is {seconds} s; an age is 0 or more")

    def matches(self, document: FailedDocument) -> bool:
        age = float("inf") if document.age is None else document.age  # from before anything told
        return (
            (self.group is None or self.group in document.groups)
            and (self.error_class is None or self.error_class == document.row.error_class)
            and (self.older_than is None or age >= self.older_than)
            and (self.newer_than is None or age <= self.newer_than)
        )


_EVERY = FailedFilter()


def list_failed(
    queue: IngestQueue, which: FailedFilter = _EVERY, *, limit: int | None = None
) -> Iterator[FailedDocument]:
    """Failed and stopped documents of a queue, those that expire first first; streamed, with flat memory.

    Raises:
        QueueUnavailable: Redis can't be reached.
    """
    return islice((document for page in _pages(queue) for document in page if which.matches(document)), limit)


def fetch_failed(queue: IngestQueue, job_ids: Sequence[str]) -> list[FailedDocument | None]:
    """Failed documents by their job ids; None for one that is not failed.

    Raises:
        QueueUnavailable: Redis can't be reached.
    """
    found = {document.job_id: document for part in _chunks(job_ids) for document in _read(queue, part, _now_ms(queue))}
    return [found.get(job_id) for job_id in job_ids]


def retry_failed(
    queue: IngestQueue,
    which: FailedFilter | Sequence[str] = _EVERY,
    *,
    limit: int | None = None,
    on_left: Callable[[str, str], None] | None = None,
) -> int:
    """Puts failed documents back into the queue, with all their attempts; returns how many.

    Their groups wait for them again. RQ's Retry, where it is used up, is not refilled. What fails again meanwhile is
    left for the next call.

    Args:
        which: a filter, or job ids.
        limit: of how many documents, at most; of a filter.
        on_left: takes the job id of each that was left, and why: it can't be run again, or is not failed.

    Raises:
        QueueUnavailable: Redis can't be reached or refuses to write; those before are in the queue, and the same call
            again goes on.
    """
    left = on_left or (lambda job_id, reason: None)
    if not isinstance(which, FailedFilter):
        return sum(_retry(queue, part, left) for part in _chunks(which))
    num_retried = 0
    for page in _pages(queue):
        rest = None if limit is None else limit - num_retried
        part = [document.job_id for document in page if which.matches(document)][:rest]
        num_retried += _retry(queue, part, left)
        if limit is not None and num_retried >= limit:
            break
    return num_retried


# --- reading


def _pages(queue: IngestQueue) -> Iterator[list[FailedDocument]]:
    """Everything that had failed when this began, at most CHUNK at a time."""
    registry = keys.failed(queue.name)
    started_ms = _now_ms(queue)
    rank = 0
    while entries := _entries(queue, registry, rank):
        page = _read(queue, [job_id.decode(errors="replace") for job_id, _ in entries], _now_ms(queue))
        yield [document for document in page if document.failed_ms is None or document.failed_ms <= started_ms]
        rank = _rank_after(queue, registry, entries, rank)


def _entries(queue: IngestQueue, registry: str, rank: int) -> list[tuple[bytes, float]]:
    last = rank + scripts.CHUNK - 1
    entries = _call(lambda: queue.connection.zrange(registry, rank, last, withscores=True))
    return [(job_id, score) for job_id, score in cast(list[Any], entries)]


def _rank_after(queue: IngestQueue, registry: str, entries: Sequence[tuple[bytes, float]], rank: int) -> int:
    """Where to go on after a page: what is retried leaves the registry, some fail again, and others come and go."""

    def look() -> list[Any]:
        with queue.connection.pipeline(transaction=False) as pipeline:
            for job_id, _ in entries:
                pipeline.zrank(registry, job_id)
                pipeline.zscore(registry, job_id)
            return pipeline.execute()

    replies = _call(look)
    stayed = [
        position
        for position, now, (_, score) in zip(replies[0::2], replies[1::2], entries, strict=True)
        if now == score
    ]
    return max(stayed) + 1 if stayed else rank


def _read(queue: IngestQueue, job_ids: Sequence[str], now_ms: int) -> list[FailedDocument]:
    """Those of some jobs that are failed."""
    fetched = [job for job in _call(lambda: scripts.fetch(queue.connection, job_ids)) if job.status in _ENDED_BADLY]

    def look() -> list[Any]:
        with queue.connection.pipeline(transaction=False) as pipeline:
            for job in fetched:
                pipeline.hmget(keys.job(job.job_id), "groups", "crashes", "origin")
                pipeline.xrevrange(keys.results(job.job_id), count=1)
            return [_unless_refused(reply) for reply in pipeline.execute(raise_on_error=False)]

    replies = _call(look)
    documents = (
        _document(job, fields, newest, now_ms, queue.name)
        for job, fields, newest in zip(fetched, replies[0::2], replies[1::2], strict=True)
    )
    return [document for document in documents if document]


def _document(job: FetchedJob, fields: Any, newest: Any, now_ms: int, queue_name: str) -> FailedDocument | None:
    """None for a job of another queue. Anything may be under a key that is none of ours: then nothing is told."""
    groups, crashes, origin = fields if isinstance(fields, list) else (None, None, None)
    row = terminal_row(job)
    if row is None or (origin is not None and origin.decode(errors="replace") != queue_name):
        return None
    failed_ms = int(newest[0][0].partition(b"-")[0]) if isinstance(newest, list) and newest else None
    if failed_ms is not None and failed_ms > now_ms:  # an id that no server of ours gave
        failed_ms = None
    words = (groups or b"").decode(errors="replace").split()
    return FailedDocument(
        row=row,
        failed_ms=failed_ms,
        age=None if failed_ms is None else max(0.0, (now_ms - failed_ms) / 1000),
        crashes=int(crashes) if crashes and crashes.isdigit() and len(crashes) < 10 else 0,
        groups=tuple(word for word in words if word != _LONE),
    )


def _now_ms(queue: IngestQueue) -> int:
    seconds, microseconds = _call(queue.connection.time)
    return seconds * 1000 + microseconds // 1000


# --- retrying


def _retry(queue: IngestQueue, job_ids: Sequence[str], left: Callable[[str, str], None]) -> int:
    runnable = []
    for job_id, reason in _reasons(queue, job_ids):
        if reason:
            left(job_id, reason)
        else:
            runnable.append(job_id)
    if not runnable:
        return 0
    stamp = scripts.now_iso()
    retried = _call(lambda: scripts.retry(queue.connection, queue.name, runnable, stamp=stamp))
    return sum(retried)


def _reasons(queue: IngestQueue, job_ids: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each job with the reason why it can't be run again, or ""."""

    def look() -> list[Any]:
        with queue.connection.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(keys.job(job_id), "status", "origin")
                pipeline.hstrlen(keys.job(job_id), "data")
            return [_unless_refused(reply) for reply in pipeline.execute(raise_on_error=False)]

    replies = _call(look)
    readable: list[tuple[str, int]] = []
    for job_id, fields, length in zip(job_ids, replies[0::2], replies[1::2], strict=True):
        status, origin = _words(fields)
        if status not in _ENDED_BADLY:
            yield job_id, f"it is not failed but {status}" if status else "it is not in Redis"
        elif origin != queue.name:
            yield job_id, f"it is of queue {origin!r}"
        elif length > payload.MAX_PAYLOAD_BYTES:
            yield job_id, f"its payload has {length} bytes, the bound is {payload.MAX_PAYLOAD_BYTES}"
        else:
            readable.append((job_id, length))
    yield from _reasons_in_payloads(queue, readable)


def _reasons_in_payloads(queue: IngestQueue, jobs: Sequence[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    waiting = deque(jobs)
    while waiting:
        part: list[str] = []
        num_bytes = 0
        while waiting and (not part or num_bytes + waiting[0][1] <= MAX_CALL_BYTES):
            job_id, length = waiting.popleft()
            part.append(job_id)
            num_bytes += length
        for job_id, data in zip(part, _payloads(queue, part), strict=True):
            try:
                payload.argument(data or b"")
                yield job_id, ""
            except InvalidJob as error:
                yield job_id, f"it can't be run again: {error}"


def _payloads(queue: IngestQueue, job_ids: Sequence[str]) -> list[bytes | None]:
    def look() -> list[bytes | None]:
        with queue.connection.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hget(keys.job(job_id), "data")
            return pipeline.execute()

    return _call(look)


def _unless_refused(reply: Any) -> Any:
    """The reply itself, or the error where a key holds something else; a missing right is no missing job."""
    from redis.exceptions import RedisError

    if isinstance(reply, RedisError) and not str(reply).startswith("WRONGTYPE"):
        raise reply
    return reply


def _words(fields: Any) -> list[str]:
    return [(value or b"").decode(errors="replace") for value in (fields if isinstance(fields, list) else (b"", b""))]


def _chunks(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    unique = list(dict.fromkeys(job_ids))
    for start in range(0, len(unique), scripts.CHUNK):
        yield unique[start : start + scripts.CHUNK]


def _call(operation: Callable[[], T]) -> T:
    return persist(operation, patience=PATIENCE)
