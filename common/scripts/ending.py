"""How leases end: with results, or handed back."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from .. import keys
from ..payload import FINISHED_STUB
from ..settings import key_prefix
from ._call import CHUNK, now_iso, pack_exception, run
from .leasing import LeasedJob

if TYPE_CHECKING:
    from redis import Redis

Outcome = Literal["finished", "failed", "stopped", "scheduled", "queued", "written", "fenced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How one lease ends."""

    job: LeasedJob
    # S succeeded, F failed (RQ's Retry applies), P failed for good, X stopped on request.
    kind: Literal["S", "F", "P", "X"]
    # Seconds that the row is kept; -1 for ever.
    ttl: int
    # The IngestResult as JSON.
    result_json: bytes
    # For RQ's own tools; empty on success.
    exception: str = ""


def finish(connection: Redis, queue: str, *, worker: str, model: str, finishes: Sequence[Finish]) -> list[Outcome]:
    """Writes results, fenced by their leases; one outcome each. Safe to repeat after a lost connection."""
    args: list[Any] = [key_prefix(), queue, worker, model, now_iso(), FINISHED_STUB]
    for item in finishes:
        exception = pack_exception(item.exception) if item.exception else ""
        job = item.job
        args += (job.job_id, job.execution_id, item.kind, item.ttl)
        args += (b64encode(item.result_json), exception, job.leased_ms)
    outcomes = run(
        connection,
        "finish",
        [
            keys.queue(queue),
            keys.started(queue),
            keys.finished(queue),
            keys.failed(queue),
            keys.scheduled(queue),
            keys.worker(worker),
        ],
        args,
    )
    return [cast(Outcome, word.decode()) for word in outcomes]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBack:
    """What became of leases that ended without a result."""

    queued: int = 0
    dead_lettered: int = 0
    # Not held any more.
    lost: int = 0


def hand_back(
    connection: Redis,
    queue: str,
    *,
    failure_ttl: int,
    members: Sequence[str] = (),
    worker: str = "",
    incarnation: str = "",
    max_crashes: int = 0,
    reason: str = "",
    not_after: float | None = None,
) -> HandedBack:
    """Returns at most CHUNK leases to the front of the queue in the order in which they were leased.

    Args:
        failure_ttl: seconds that a dead letter is kept if its job names none.
        members: leases "id:execution", at most CHUNK; none: those of `worker` from this queue, or else those that have
            expired. Of more leases than CHUNK come those leased last.
        incarnation: of `worker`; the leases of another of that name are left alone.
        max_crashes: the leases' worker was lost: a job that lost that many is dead-lettered. 0: the hand-back is
            neither an attempt nor a crash.
        reason: how the worker was lost.
        not_after: seconds since the epoch by Redis' clock after which the call does nothing.
    """
    exception = f"WorkerLost: {max_crashes} workers were lost while they ran this document; the last: {reason}"
    queued, dead_lettered, lost = run(
        connection,
        "hand_back",
        [keys.queue(queue), keys.started(queue), keys.failed(queue)],
        [
            key_prefix(),
            queue,
            now_iso(),
            keys.STOCK_GRACE,
            max_crashes,
            pack_exception(exception) if max_crashes else "",
            failure_ttl,
            CHUNK,
            worker,
            incarnation,
            "" if not_after is None else not_after,
            *members,
        ],
    )
    return HandedBack(queued=queued, dead_lettered=dead_lettered, lost=lost)


def hand_back_all(connection: Redis, queue: str, **options: Any) -> HandedBack:
    """Returns all leases of a worker from the queue, or all expired; takes `hand_back`'s arguments but `members`."""
    queued = dead_lettered = lost = 0
    while True:
        part = hand_back(connection, queue, **options)
        queued, dead_lettered, lost = queued + part.queued, dead_lettered + part.dead_lettered, lost + part.lost
        if part.queued + part.dead_lettered + part.lost < CHUNK:
            return HandedBack(queued=queued, dead_lettered=dead_lettered, lost=lost)
