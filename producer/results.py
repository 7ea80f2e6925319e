"""`fetch_results`: the rows that are there now. `iter_results`: every row of a group, as its documents end."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..common import keys, scripts
from ..common.connections import connect, persist
from ..common.errors import (
    ProducerLost,
    QueueRefused,
    QueueUnavailable,
    ResultTimeout,
    SettingsError,
    UnknownGroup,
)
from ..common.schema import IngestResult
from ..common.settings import Settings
from .group import PATIENCE, Group, check_name
from .rows import terminal_row

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")

# Seconds of silence after which the producer of an open group counts as dead; it gives a sign of life every 10.
PRODUCER_LOST_AFTER = 60.0

# Milliseconds that one read waits at most: how late a seal, the time-out and Ctrl-C are noticed.
_BLOCK_MS = 1000

# Stream entries, ids only, read at once to find what a cursor has behind it.
_HISTORY_PAGE = 1000

# Members looked at by one step of a sweep.
_SWEEP_PAGE = 512

# Seconds without an entry in the stream before the first sweep after that, and at most between two sweeps.
_SWEEP_AFTER, _SWEEP_AFTER_MAX = 2.0, 30.0

# Seconds that a sweep may take before the stream is looked at again, and its share of the time at most.
_SWEEP_SLICE, _SWEEP_SHARE = 0.2, 0.1

_START = "0-0"


def fetch_results(jobs: Group | str | Sequence[str], *, connection: Redis | None = None) -> list[IngestResult | None]:
    """The rows that are there now, in the order asked for; None for a document that has not ended. Never waits.

    One round trip, whatever the number; a group takes one more, for its members. All rows are in memory at once:
    `iter_results` hands out those of a large group one by one.

    Args:
        jobs: a group or its id (rows in the order of submission), or job ids. A job that is not in Redis gives an
            expired row; its document id is known only to a group and "" otherwise.
        connection: default is the group's, or connects to RQ_REDIS_URL.

    Raises:
        UnknownGroup: the group is not in Redis.
        QueueUnavailable: Redis can't be reached.
    """
    connection = _connection_of(jobs, connection)
    if not isinstance(jobs, Group | str):
        fetched = persist(lambda: scripts.fetch(connection, jobs), patience=PATIENCE)
        return [terminal_row(job) for job in fetched]
    group_id = _id_of(jobs)
    raw = persist(lambda: connection.zrange(keys.group_members(group_id), 0, -1), patience=PATIENCE)
    if not raw and not persist(lambda: connection.exists(keys.group(group_id)), patience=PATIENCE):
        raise UnknownGroup(group_id)
    members = [_Member.parse(cast(bytes, member)) for member in raw]
    job_ids = [member.job_id for member in members]
    fetched = persist(lambda: scripts.fetch(connection, job_ids, group_id=group_id), patience=PATIENCE)
    return [terminal_row(job, member.document_id) for job, member in zip(fetched, members, strict=True)]


def iter_results(
    group: Group | str, *, connection: Redis | None = None, timeout: float | None = None, cursor: str | None = None
) -> ResultIterator:
    """Every row of a group in the order in which the documents end, each document once; waits for those to come.

    Ends when the group is sealed and every member has had its row. Rows come as they stand when they are read: a
    failed document that was enqueued again is waited for.

    A user who may only read will do, and a replica. What has no entry in the group's stream (documents that RQ's own
    tools ended) can't be noted there for others then, and may come a second time after a resume.

    Args:
        group: a group or its id.
        connection: default is the group's, or connects to RQ_REDIS_URL.
        timeout: seconds from the first `next()` until ResultTimeout, as in `concurrent.futures.as_completed`; 0 gives
            what is there. Default: none, however long Redis is away.
        cursor: the `cursor` of an earlier iterator of this group: goes on after the row that it had returned last.
            Where the group's stream was trimmed or deleted since, rows may come a second time; none is left out.

    Raises (from `next()`, which may be called again after any but the second):
        ResultTimeout: names what is outstanding.
        UnknownGroup: the group is not in Redis.
        ProducerLost: the group was never sealed, its producer has been silent for a minute, and all it has was given.
        QueueUnavailable: Redis dropped the connection until the time-out, or refuses.
    """
    return ResultIterator(_connection_of(group, connection), _id_of(group), timeout=timeout, cursor=cursor)


def _connection_of(jobs: Group | str | Sequence[str], connection: Redis | None) -> Redis:
    if connection is not None:
        return connection
    return jobs.connection if isinstance(jobs, Group) else connect(Settings.from_env().redis_url)


def _id_of(group: Group | str) -> str:
    return group.id if isinstance(group, Group) else check_name("group", group)


def _is_job_id(raw: bytes) -> bool:
    """Whether RQ might have made it; a stream may hold what none of us wrote."""
    return re.fullmatch(rb"[A-Za-z0-9_-]{1,200}", raw) is not None


def _number(raw: bytes | None) -> int:
    """A number of a group's hash; 0 where it is none, or none that a clock or a TTL could have."""
    return int(raw) if raw and raw.isdigit() and len(raw) < 16 else 0


@dataclass(frozen=True, slots=True)
class _Member:
    job_id: str
    document_id: str

    @classmethod
    def parse(cls, raw: bytes) -> _Member:
        job_id, _, document_id = raw.decode(errors="replace").partition(":")
        return cls(job_id, document_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupState:
    sealed: bool
    num_members: int
    # Seconds since the producer's last sign of life.
    silent_for: float
    # Seconds that the group's keys live on.
    ttl: int


class ResultIterator:
    """What `iter_results` returns. Not thread-safe. Keeps the job ids of a group in memory, some 130 bytes each.

    Attributes:
        cursor: where an iterator goes on that is to follow this one; covers the row returned last and those before it.
            Keep it after the row is safely stored.
        num_members: documents in the group, as last seen.
    """

    # The group's stream says which members became terminal, in order; ids only. Where it can't be trusted (stock RQ
    # tools cancel, delete and expire jobs without an entry, and it may be trimmed), a sweep over the members adds what
    # it lacks, so that there is one path to the caller and cursors mean the same to every reader. Where Redis refuses
    # that (a user who may only read, a replica, a full server), the rows go to the caller directly.

    def __init__(self, connection: Redis, group_id: str, *, timeout: float | None, cursor: str | None) -> None:
        if cursor is not None and not re.fullmatch(r"\d{1,20}-\d{1,20}", cursor):
            raise SettingsError(f"cursor {cursor!r}: not one that an iterator gave")
        self.cursor = cursor or _START
        self.num_members = 0
        self._connection = connection
        self._group_id = group_id
        self._done = keys.group_done(group_id)
        self._members = keys.group_members(group_id)
        self._timeout = timeout
        self._deadline: float | None = None
        # Where the next read of the stream starts; None before the first.
        self._position: str | None = None
        self._delivered: set[bytes] = set()
        # Where cursors stay from now on; None while they move.
        self._held_cursor: str | None = None
        # Rows of one read, each with the cursor that covers it.
        self._ready: deque[tuple[str, IngestResult]] = deque()
        self._sweep_rank = 0
        self._next_sweep = 0.0
        self._sweep_after = _SWEEP_AFTER

    def __iter__(self) -> Iterator[IngestResult]:
        return self

    def __next__(self) -> IngestResult:
        if self._position is None:
            self._start()
        while not self._ready:
            self._advance()
        self.cursor, row = self._ready.popleft()
        return row

    def _start(self) -> None:
        self._deadline = None if self._timeout is None else monotonic() + self._timeout
        position = _START
        while page := self._read(position, self.cursor, _HISTORY_PAGE):
            position = page[-1][0]
            self._delivered.update(fields[b"j"] for _, fields in page if b"j" in fields)
        self._position = self.cursor

    def _advance(self) -> None:
        """Gets rows ready, or waits a little for some; raises where there will be none."""
        assert self._position is not None
        if entries := self._read(self._position, "+", scripts.CHUNK):
            self._take(entries)
            self._next_sweep = max(self._next_sweep, monotonic() + _SWEEP_AFTER)
            return
        state = self._state()
        if len(self._delivered) >= state.num_members:
            if state.sealed:
                raise StopIteration
            if state.silent_for > PRODUCER_LOST_AFTER:
                raise ProducerLost(
                    f"group {self._group_id!r} was never sealed and its producer has been silent for "
                    f"{state.silent_for:.0f} s; its {state.num_members} documents so far had their rows. Enqueue the "
                    f"same documents again with group_id={self._group_id!r} to complete it"
                )
        elif monotonic() >= self._next_sweep and self._sweep(state.ttl):
            return
        if self._remaining() == 0.0:
            raise self._timed_out()
        self._wait()

    # --- the stream

    def _read(self, after: str, last: str, count: int) -> list[tuple[str, dict[bytes, bytes]]]:
        """Stream entries after one and up to another, oldest first."""
        entries = cast(Any, self._call(lambda: self._connection.xrange(self._done, f"({after}", last, count=count)))
        return [(entry_id.decode(), fields) for entry_id, fields in entries]

    def _take(self, entries: Sequence[tuple[str, dict[bytes, bytes]]]) -> None:
        """Gets the rows ready that entries announce."""
        before, self._position = self._position or _START, entries[-1][0]
        news: dict[bytes, tuple[str, str | None]] = {}
        for entry_id, fields in entries:
            job_id, document_id = fields.get(b"j"), fields.get(b"d")
            if job_id is not None and _is_job_id(job_id) and job_id not in self._delivered:
                news[job_id] = (entry_id, document_id.decode(errors="replace") if document_id else None)
        rows: dict[str, IngestResult | None] = {}
        for job in self._fetch([job_id.decode(errors="replace") for job_id in news]):
            entry_id, name = news[job.job_id.encode()]
            rows[entry_id] = terminal_row(job, name) if job.status != "" or name is not None else None
        stale = [entry_id for entry_id, row in rows.items() if row is None]
        # Runs again, or is gone and its document's name with it. An entry will tell when it has ended, or a sweep who
        # it was; this one would tell later readers' cursors that the row was given.
        is_kept = bool(stale) and not self._wrote(lambda: self._connection.xdel(self._done, *stale))
        for entry_id, _ in entries:
            row = rows.get(entry_id)
            if row is not None:
                self._deliver(row, entry_id)
            elif is_kept and entry_id in rows:
                self._held_cursor = self._held_cursor or before
            before = entry_id

    def _deliver(self, row: IngestResult, cursor: str) -> None:
        self._delivered.add(row.job_id.encode())
        self._ready.append((self._held_cursor or cursor, row))

    def _wait(self) -> None:
        """Returns when the stream has something new, or after a second."""
        block_ms = float(_BLOCK_MS)
        socket_timeout = self._connection.connection_pool.connection_kwargs.get("socket_timeout")
        for bound in (self._remaining(), socket_timeout and socket_timeout / 2):
            if bound is not None:
                block_ms = min(block_ms, bound * 1000)
        position = self._position or _START
        self._call(lambda: self._connection.xread({self._done: position}, count=1, block=max(1, int(block_ms))))

    # --- what the stream doesn't tell

    def _sweep(self, ttl: int) -> bool:
        """Announces members that ended without an entry in the stream; whether there are any.

        Goes on where the last call stopped, and takes no more than its share of time.
        """
        started = monotonic()
        found = False
        self._next_sweep = started
        while monotonic() - started < _SWEEP_SLICE:
            members = self._page(self._sweep_rank)
            found |= self._settle(members, ttl)
            self._sweep_rank += len(members)
            if len(members) < _SWEEP_PAGE:
                self._sweep_rank = 0
                self._next_sweep = monotonic() + self._sweep_after
                self._sweep_after = _SWEEP_AFTER if found else min(2 * self._sweep_after, _SWEEP_AFTER_MAX)
                break
        self._next_sweep = max(self._next_sweep, monotonic() + (monotonic() - started) / _SWEEP_SHARE)
        return found

    def _page(self, rank: int) -> list[bytes]:
        last = rank + _SWEEP_PAGE - 1
        return cast(list[bytes], self._call(lambda: self._connection.zrange(self._members, rank, last)))

    def _settle(self, raw: Sequence[bytes], ttl: int) -> bool:
        members = {member.job_id: member for member in self._undelivered(raw)}
        ended = {
            job.job_id: row
            for job in self._fetch(list(members))
            if (row := terminal_row(job, members[job.job_id].document_id))
        }

        def announce() -> None:
            with self._connection.pipeline(transaction=False) as pipeline:
                for job_id in ended:
                    pipeline.xadd(self._done, {"j": job_id, "d": members[job_id].document_id})
                pipeline.expire(self._done, ttl)
                pipeline.execute()

        if ended and not self._wrote(announce):
            for row in ended.values():
                self._deliver(row, self.cursor)
        return bool(ended)

    def _undelivered(self, raw: Sequence[bytes]) -> list[_Member]:
        return [_Member.parse(member) for member in raw if member.partition(b":")[0] not in self._delivered]

    def _fetch(self, job_ids: Sequence[str]) -> list[scripts.FetchedJob]:
        if not job_ids:
            return []
        return self._call(lambda: scripts.fetch(self._connection, job_ids, group_id=self._group_id))

    # --- when to stop

    def _state(self) -> _GroupState:
        def look() -> list[Any]:
            with self._connection.pipeline(transaction=False) as pipeline:
                pipeline.hmget(keys.group(self._group_id), ["sealed_ms", "seen_ms", "ttl"])
                pipeline.zcard(self._members)
                pipeline.time()
                return pipeline.execute()

        (sealed_ms, seen_ms, ttl), self.num_members, (seconds, _) = self._call(look)
        if seen_ms is None:
            raise UnknownGroup(self._group_id)
        return _GroupState(
            sealed=sealed_ms is not None,
            num_members=self.num_members,
            silent_for=seconds - _number(seen_ms) / 1000,
            ttl=max(1, _number(ttl)),
        )

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    def _timed_out(self) -> ResultTimeout:
        outstanding: list[str] = []
        number = rank = 0
        while page := self._page(rank):
            rank += len(page)
            part = self._undelivered(page)
            number += len(part)
            outstanding += [member.document_id for member in part][: ResultTimeout.MAX_LISTED - len(outstanding)]
        return ResultTimeout(self._group_id, self._timeout or 0.0, outstanding, number)

    def _call(self, operation: Callable[[], T]) -> T:
        """What a Redis call returns, tried again until the time-out while the connection drops."""
        try:
            return persist(operation, patience=self._remaining())
        except QueueUnavailable as error:
            raise type(error)(
                f"{error}; group {self._group_id!r} can be read on from cursor {self.cursor!r}"
            ) from error

    def _wrote(self, operation: Callable[[], object]) -> bool:
        """Whether Redis let a reader's note be written; it can do without."""
        try:
            self._call(operation)
        except QueueRefused:
            return False
        return True
