"""Into the queue: new jobs, what a plain RQ client's job needs, retries that are due, dead letters tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .. import keys
from ..settings import key_prefix
from ._call import CHUNK, now_iso, run, script, start

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline


class NewJob(NamedTuple):
    """One job to enqueue. A tuple: a frozen dataclass takes three times as long to make, and there are many."""

    job_id: str
    # The job's RQ payload: [function, null, [request], {}] as JSON.
    data: bytes
    document_id: str
    model: str
    # Of the prompt, as the producer estimates; 0: not known.
    tokens: int = 0
    # Of the output, at most; 0: not known.
    max_tokens: int = 0
    # What the documents of one kind have in common, 16 hexadecimal digits; "": not known.
    task: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnqueueOptions:
    """What the jobs of a call have in common."""

    # "": the jobs are submitted alone.
    group_id: str = ""
    # Whose waiting list they go to; "": the queue's own.
    tenant: str = ""
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
    return cast(list[int], run(connection, "enqueue", *_enqueue_call(queue, jobs, options)))


def start_enqueue(
    connection: Redis, queue: str, jobs: Sequence[NewJob], options: EnqueueOptions
) -> Callable[[], list[int]]:
    """Sends jobs without waiting; the function returned waits, and gives what `enqueue` would.

    Either may raise any RedisError, also where `enqueue` would heal it; to `enqueue` the same jobs then is safe.
    """
    return start(connection, "enqueue", *_enqueue_call(queue, jobs, options))


def _enqueue_call(queue: str, jobs: Sequence[NewJob], options: EnqueueOptions) -> tuple[list[str], list[Any]]:
    group_id = options.group_id
    args: list[Any] = [key_prefix(), queue, group_id, options.group_ttl, now_iso()]
    args += (options.result_ttl, options.failure_ttl, "" if options.retries is None else options.retries)
    args += (options.retry_intervals_json, int(options.retry_at_front), options.tenant)
    for job in jobs:
        args += job
    group_keys = [keys.group(group_id), keys.group_members(group_id), keys.group_done(group_id)] if group_id else []
    return [keys.queue(queue, options.tenant), keys.queues(), *group_keys], args


class JobNeeds(NamedTuple):
    """What a job needs of a worker, as its payload says."""

    job_id: str
    # "*": any worker may take it, to refuse it.
    model: str
    # Version of the request's schema.
    schema: int
    # As in `NewJob`.
    tokens: int = 0
    max_tokens: int = 0
    task: str = ""


def adopt(connection: Redis, queue: str, needs: Iterable[JobNeeds]) -> int:
    """Writes down what jobs need of a worker; returns of how many that was news."""
    args = [key_prefix(), queue]
    for job in needs:
        args += map(str, job)
    return cast(int, run(connection, "adopt", [], args))


def promote(connection: Redis, queue: str) -> int:
    """Moves scheduled retries that are due into the queue; returns how many, at most CHUNK."""
    args = [key_prefix(), queue, now_iso(), CHUNK]
    return cast(int, run(connection, "promote", [keys.scheduled(queue), keys.queue(queue)], args))


def retry(connection: Redis, queue: str, job_ids: Sequence[str], *, stamp: str) -> list[bool]:
    """Puts at most CHUNK failed or stopped jobs back into the queue; False for one that is not failed any more.

    Args:
        stamp: `now_iso()`, the same where the call is repeated after a lost connection.
    """
    words = run(
        connection,
        "retry",
        [keys.queue(queue), keys.failed(queue), keys.queues()],
        [key_prefix(), queue, stamp, *job_ids],
    )
    return [word == 1 for word in words]


# Milliseconds that the barrier's key lasts: it is there to be written, not read.
_BARRIER_TTL_MS = 60_000


def write_barrier(pipeline: Pipeline) -> None:
    """Adds a small write to a pipeline: WAITAOF or WAIT after it waits for all that the server took before."""
    source, _ = script("barrier")
    pipeline.eval(source, 1, keys.barrier(), _BARRIER_TTL_MS)
