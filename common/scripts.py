"""The Lua scripts, one typed function each; `lua/NAME.lua` documents its keys, arguments and return value.

A call takes at most CHUNK jobs and MAX_CALL_BYTES: a script blocks the server while it runs (128 jobs 3-6 ms, 1024
jobs 41-47 ms, measured on redis-server 7.0).
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from . import keys
from .payload import FINISHED_STUB, MAX_PAYLOAD_BYTES
from .schema import SCHEMA_VERSION
from .settings import key_prefix

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

# Jobs in one script call.
CHUNK = 128

# Queue positions that a lease call looks at once jobs of other models are in the way: it reads two fields of each.
_FAR_SCAN = 1024

# Payload bytes in one script call: one MULTI of 64 MB stalled another client for 69 ms (measured).
MAX_CALL_BYTES = 4 * 1024 * 1024

Gate = Literal["open", "suspended", "worker", "fleet", "company"]
Outcome = Literal["finished", "failed", "stopped", "scheduled", "queued", "written", "fenced"]


@cache
def _script(name: str) -> tuple[str, str]:
    """Source and SHA-1 of a script: its shebang line, the prelude, its body."""
    folder = files(__package__) / "lua"
    shebang, body = (folder / f"{name}.lua").read_text().split("\n", 1)
    source = f"{shebang}\n{(folder / 'prelude.lua').read_text()}\n{body}"
    return source, sha1(source.encode(), usedforsecurity=False).hexdigest()


def _run(connection: Redis, name: str, keys_: Sequence[str], args: Sequence[Any]) -> Any:
    from redis.exceptions import NoScriptError

    source, digest = _script(name)
    try:
        return connection.evalsha(digest, len(keys_), *keys_, *args)
    except NoScriptError:
        return connection.eval(source, len(keys_), *keys_, *args)


def _start(connection: Redis, name: str, keys_: Sequence[str], args: Sequence[Any]) -> Callable[[], Any]:
    """Sends a script call; the function returned waits for its answer. Nothing is tried again."""
    source, _ = _script(name)  # EVAL: a script that isn't loaded would be seen too late
    pool = connection.connection_pool
    link = pool.get_connection()

    def answer() -> Any:
        try:
            return link.read_response()
        finally:
            pool.release(link)

    try:
        link.send_command("EVAL", source, len(keys_), *keys_, *args)  # type: ignore[no-untyped-call]
    except BaseException:
        pool.release(link)
        raise
    return answer


def now_iso() -> str:
    """This host's time in RQ's format. For display only: leases are judged by Redis' clock."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def pack_exception(text: str) -> str:
    """An exception's text as RQ stores it in a result."""
    return b64encode(zlib.compress(text.encode())).decode()


class NewJob(NamedTuple):
    """One job to enqueue. A tuple: a frozen dataclass takes three times as long to make, and there are many."""

    job_id: str
    # The job's RQ payload: [function, null, [request], {}] as JSON.
    data: bytes
    document_id: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnqueueOptions:
    """What the jobs of a call have in common."""

    # "": the jobs are submitted alone.
    group_id: str = ""
    # Seconds.
    group_ttl: int
    result_ttl: int
    failure_ttl: int
    # Attempts beyond the first; None leaves RQ's fields for it away.
    retries: int | None = None
    # Seconds before each of them, a JSON array.
    retry_intervals_json: str = ""
    retry_at_front: bool = False


def enqueue(connection: Redis, queue: str, jobs: Sequence[NewJob], options: EnqueueOptions) -> list[int]:
    """One number a job: 1 enqueued, 2 was already queued, scheduled or running, 3 was already finished."""
    return cast(list[int], _run(connection, "enqueue", *_enqueue_call(queue, jobs, options)))


def start_enqueue(
    connection: Redis, queue: str, jobs: Sequence[NewJob], options: EnqueueOptions
) -> Callable[[], list[int]]:
    """Sends jobs without waiting; the function returned waits, and gives what `enqueue` would.

    Either may raise any RedisError, also where `enqueue` would heal it; to `enqueue` the same jobs then is safe.
    """
    return _start(connection, "enqueue", *_enqueue_call(queue, jobs, options))


def _enqueue_call(queue: str, jobs: Sequence[NewJob], options: EnqueueOptions) -> tuple[list[str], list[Any]]:
    group_id = options.group_id
    args: list[Any] = [key_prefix(), queue, group_id, options.group_ttl, now_iso()]
    args += (options.result_ttl, options.failure_ttl, "" if options.retries is None else options.retries)
    args += (options.retry_intervals_json, int(options.retry_at_front))
    for job in jobs:
        args += job
    group_keys = [keys.group(group_id), keys.group_members(group_id), keys.group_done(group_id)] if group_id else []
    return [keys.queue(queue), keys.queues(), *group_keys], args


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedJob:
    """A job that this worker holds a lease on."""

    job_id: str
    # Names the lease; with the job id it is the fence of the result.
    execution_id: str
    # The job's RQ payload.
    data: bytes
    # Milliseconds since the epoch, by Redis' clock; of a job that a plain RQ client enqueued, by that client's.
    enqueued_ms: int | None
    leased_ms: int
    # 1 for the first time.
    attempts: int
    # Workers that were lost while they held it.
    crashes: int
    # Seconds; None if the job names none.
    result_ttl: int | None
    failure_ttl: int | None
    # What the job asks for that isn't served here: an RQ feature, or "size" for a payload that is too large; or "".
    refused: str

    @property
    def member(self) -> str:
        """The lease as it stands in Redis."""
        return f"{self.job_id}:{self.execution_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReply:
    """What one lease call brought."""

    jobs: list[LeasedJob]
    # Jobs whose model isn't known yet, with their payloads: see `adopt`.
    unknown: list[tuple[str, bytes]]
    gate: Gate
    # Jobs still in the queue, those of other models included.
    queue_length: int
    # Where in the queue to look next; not 0 when jobs of other models are in the way.
    next_position: int


def lease(
    connection: Redis,
    queue: str,
    *,
    worker: str,
    model: str,
    want: int,
    lease_ttl: float,
    max_in_flight_fleet: int,
    call_id: str,
    company: int = 0,
    companies: Sequence[int] = (),
    position: int = 0,
) -> LeaseReply:
    """Leases at most min(want, CHUNK) jobs of `model`.

    Args:
        lease_ttl: seconds.
        max_in_flight_fleet: leases over all workers of the queue; 0 for no bound.
        call_id: 14 hexadecimal characters that no other call uses.
        company: the smallest of `companies` that a job held already is bound to; 0 for none.
        companies: of how many jobs in flight a job that lost 1, 2, ... workers may be one.
        position: where in the queue to start looking.
    """
    leased, unknown, gate, length, now_ms, next_position = _run(
        connection,
        "lease",
        [
            keys.queue(queue),
            keys.started(queue),
            keys.worker_executions(worker),
            keys.limits(queue),
            keys.suspended(),
            keys.failed(queue),
        ],
        [
            key_prefix(),
            queue,
            worker,
            model,
            min(want, CHUNK),
            MAX_CALL_BYTES,
            lease_ttl,
            keys.STOCK_GRACE,
            max_in_flight_fleet,
            call_id,
            now_iso(),
            position,
            CHUNK if position == 0 else _FAR_SCAN,
            MAX_PAYLOAD_BYTES,
            SCHEMA_VERSION,
            pack_exception(
                "InvalidJob: what is under the key of this job is no job: its type, its status or its model can't be"
            ),
            company,
            *companies,
        ],
    )
    jobs = [
        LeasedJob(
            job_id=job_id.decode(),
            execution_id=execution_id.decode(),
            data=data,
            enqueued_ms=_int(enqueued_ms) or _milliseconds(enqueued_at),
            leased_ms=now_ms,
            attempts=attempts,
            result_ttl=_ttl(result_ttl),
            failure_ttl=_ttl(failure_ttl),
            refused=refused.decode(),
            crashes=crashes,
        )
        for (
            job_id,
            execution_id,
            data,
            enqueued_ms,
            enqueued_at,
            attempts,
            result_ttl,
            failure_ttl,
            refused,
            crashes,
        ) in leased
    ]
    return LeaseReply(
        jobs=jobs,
        unknown=[(unknown[i].decode(errors="replace"), unknown[i + 1]) for i in range(0, len(unknown), 2)],
        gate=cast(Gate, gate.decode()),
        queue_length=length,
        next_position=next_position,
    )


def _int(raw: bytes) -> int | None:
    """A number from a job hash, or None where it is missing or not one."""
    try:
        return int(raw)
    except ValueError:
        return None


def _milliseconds(iso: bytes) -> int | None:
    """RQ's own time stamp as milliseconds since the epoch."""
    try:
        return int(datetime.fromisoformat(iso.decode()).timestamp() * 1000)
    except ValueError:
        return None


# Seconds that anything is kept at most, if not for ever: ten years.
_MAX_TTL = 10 * 365 * 86400


def _ttl(raw: bytes) -> int | None:
    """Seconds from a job hash, -1 for ever; None where there are none."""
    seconds = _int(raw)
    return None if seconds is None else max(-1, min(seconds, _MAX_TTL))


def adopt(connection: Redis, queue: str, needs: Iterable[tuple[str, str, int]]) -> int:
    """Writes down what jobs need of a worker: id, model, schema version; returns of how many that was news."""
    args = [key_prefix(), queue]
    for job_id, model, schema in needs:
        args += (job_id, model, str(schema))
    return cast(int, _run(connection, "adopt", [], args))


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
    outcomes = _run(
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
        members: leases "id:execution", at most CHUNK; none: those of `worker`, or else those that have expired. Of more
            leases than CHUNK come those leased last.
        incarnation: of `worker`; the leases of another of that name are left alone.
        max_crashes: the leases' worker was lost: a job that lost that many is dead-lettered. 0: the hand-back is
            neither an attempt nor a crash.
        reason: how the worker was lost.
        not_after: seconds since the epoch by Redis' clock after which the call does nothing.
    """
    exception = f"WorkerLost: {max_crashes} workers were lost while they ran this document; the last: {reason}"
    queued, dead_lettered, lost = _run(
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
    """Returns every lease of a worker, or every expired one; takes `hand_back`'s arguments but `members`."""
    queued = dead_lettered = lost = 0
    while True:
        part = hand_back(connection, queue, **options)
        queued, dead_lettered, lost = queued + part.queued, dead_lettered + part.dead_lettered, lost + part.lost
        if part.queued + part.dead_lettered + part.lost < CHUNK:
            return HandedBack(queued=queued, dead_lettered=dead_lettered, lost=lost)


Presence = Literal["known", "forgotten", "replaced"]


def renew(
    connection: Redis, queue: str, *, worker: str, incarnation: str, lease_ttl: float, worker_ttl: int
) -> Presence:
    """Extends all leases of a worker and its record.

    Returns:
        "known"; "forgotten": Redis has no record of the worker; "replaced": another has its name, nothing was extended.
    """
    word = _run(
        connection,
        "renew",
        [keys.started(queue), keys.worker_executions(worker), keys.worker(worker)],
        [lease_ttl, keys.STOCK_GRACE, worker_ttl, now_iso(), incarnation],
    )
    return cast(Presence, word.decode())


def claim(
    connection: Redis,
    queue: str,
    *,
    worker: str,
    incarnation: str,
    dead: str,
    lease_ttl: float,
    worker_ttl: int,
    record: Mapping[str, Any],
) -> int:
    """Registers a worker under its name with RQ, unless a live one has it.

    Args:
        dead: incarnation of a former holder of the name that is known to be dead, or "".
        record: RQ's fields.

    Returns:
        0, or the seconds until the name is free if its holder is dead.
    """
    fields = [part for item in record.items() for part in item]
    claimed, *left = _run(
        connection,
        "claim",
        [keys.worker(worker), keys.workers(), keys.workers_of(queue)],
        [incarnation, dead, lease_ttl, worker_ttl, *fields],
    )
    return 0 if claimed else cast(int, left[0])


def sign_off(connection: Redis, queue: str, *, worker: str, incarnation: str) -> None:
    """Takes a dead worker off RQ's lists, unless another has its name."""
    _run(
        connection,
        "sign_off",
        [
            keys.worker(worker),
            keys.workers(),
            keys.workers_of(queue),
            keys.worker_executions(worker),
            keys.engines(queue),
        ],
        [worker, incarnation, now_iso()],
    )


def write_fields(connection: Redis, key: str, fields: Mapping[str, str], *, ttl: int | None = None) -> None:
    """Sets fields of a hash, also when Redis is full; `ttl` in seconds."""
    _run(
        connection,
        "write_fields",
        [key],
        ["" if ttl is None else ttl, *(part for item in fields.items() for part in item)],
    )


def machine_failed(
    connection: Redis, queue: str, machine: str, *, phase: str, reason: str, max_failures: int, ttl: int
) -> None:
    """Counts one more failure in a row of a machine's engine; see machine_health.py."""
    _run(connection, "machine_failed", [keys.machines(queue)], [machine, phase, reason, max_failures, ttl])


def promote(connection: Redis, queue: str) -> int:
    """Moves scheduled retries that are due into the queue; returns how many, at most CHUNK."""
    return cast(
        int,
        _run(
            connection,
            "promote",
            [keys.scheduled(queue), keys.queue(queue)],
            [key_prefix(), queue, now_iso(), CHUNK],
        ),
    )


def touch_group(connection: Redis, group_id: str, *, queue: str, group_ttl: int, seal: bool | None = None) -> None:
    """Says that the producer of a group is alive; `seal` that it is done (True) or has more to come (False)."""
    _run(
        connection,
        "touch_group",
        [keys.group(group_id), keys.group_members(group_id), keys.group_done(group_id)],
        [queue, group_ttl, "" if seal is None else int(seal)],
    )


def cancel(connection: Redis, group_id: str, *, first: int, ttl: int) -> tuple[int, int, int, int]:
    """Cancels CHUNK members of a group, from rank `first`; a cancelled job is kept `ttl` seconds.

    Returns:
        How many members it looked at, cancelled, left to another holder, and found terminal.
    """
    counts = _run(
        connection,
        "cancel",
        [keys.group_members(group_id), keys.group_done(group_id)],
        [key_prefix(), group_id, first, first + CHUNK - 1, now_iso(), ttl],
    )
    return counts[0], counts[1], counts[2], counts[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedJob:
    """Where a job stands, with its newest result."""

    job_id: str
    # RQ's status; "" for a job that isn't in Redis.
    status: str
    # The group still holds it.
    in_group: bool
    description: str
    # RQ's Result.Type: 1 successful, 2 failed; None without a result.
    result_type: int | None
    return_value: bytes | None
    exception: str | None
    worker: str | None
    attempts: int
    # Payload of a job that ended without a return value.
    data: bytes


def fetch(connection: Redis, job_ids: Sequence[str], *, group_id: str = "") -> list[FetchedJob]:
    """Where jobs stand, with the newest result of each, in the order given. One round trip."""
    source, _ = _script("fetch")
    with connection.pipeline(transaction=False) as pipeline:
        for start in range(0, len(job_ids), CHUNK):  # EVAL: as in `_start`; _RO: a reader need not be allowed more
            pipeline.eval_ro(source, 0, key_prefix(), group_id, *job_ids[start : start + CHUNK])
        flat = [value for reply in pipeline.execute() for value in reply]
    return [_fetched(job_id, flat[9 * i : 9 * i + 9]) for i, job_id in enumerate(job_ids)]


def _fetched(job_id: str, fields: Sequence[bytes]) -> FetchedJob:
    status, in_group, description, result_type, value, exception, worker, attempts, data = fields
    return FetchedJob(
        job_id=job_id,
        status=status.decode(errors="replace"),
        in_group=in_group == b"1",
        description=description.decode(errors="replace"),
        result_type=_int(result_type),
        return_value=_unpacked(value) if value else None,
        exception=unpack_exception(exception) if exception else None,
        worker=worker.decode(errors="replace") or None,
        attempts=max(0, min(_int(attempts) or 0, 2**63 - 1)),
        data=data,
    )


def _unpacked(value: bytes) -> bytes:
    """A stored return value; empty, which is no row, where it can't be read."""
    try:
        return b64decode(value)
    except ValueError:
        return b""


# A stored exception is inflated to this many bytes at most: 512 MiB of zeros fit in 509 KiB of zlib.
_MAX_EXCEPTION_BYTES = 64 * 1024


def unpack_exception(packed: bytes) -> str:
    """An exception's text from an RQ result, cut at 64 KiB; says so where it can't be read."""
    try:
        return zlib.decompressobj().decompress(b64decode(packed), _MAX_EXCEPTION_BYTES).decode(errors="replace")
    except (ValueError, zlib.error):
        return "the stored exception can't be read"


def tally(connection: Redis, group_id: str, *, first: int, last: int) -> dict[str, int]:
    """Members of a group from rank `first` to `last`, counted by RQ status ("" for a job that is gone)."""
    source, _ = _script("tally")
    members = keys.group_members(group_id)
    # Redis 7.0 lets EVAL and EVALSHA have only keys that its user may write.
    flat = cast(list[Any], connection.eval_ro(source, 1, members, key_prefix(), group_id, str(first), str(last)))
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


# Milliseconds that the barrier's key lasts: it is there to be written, not read.
_BARRIER_TTL_MS = 60_000


def write_barrier(pipeline: Pipeline) -> None:
    """Adds a small write to a pipeline: WAITAOF or WAIT after it waits for all that the server took before."""
    source, _ = _script("barrier")
    pipeline.eval(source, 1, keys.barrier(), _BARRIER_TTL_MS)


def retry(connection: Redis, queue: str, job_ids: Sequence[str], *, stamp: str) -> list[bool]:
    """Puts at most CHUNK failed or stopped jobs back into the queue; False for one that is not failed any more.

    Args:
        stamp: `now_iso()`, the same where the call is repeated after a lost connection.
    """
    words = _run(
        connection,
        "retry",
        [keys.queue(queue), keys.failed(queue), keys.queues()],
        [key_prefix(), queue, stamp, *job_ids],
    )
    return [word == 1 for word in words]
