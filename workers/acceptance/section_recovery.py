"""Section "recovery": kill -9 of a worker that holds documents, another one in its place, and the books afterwards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis

from ...common import keys
from ...common.limits import AdmissionLimits, write_limits
from ..processes import is_dead
from .bench import Bench, wait_until
from .documents import Document, enqueue, follow, numbered
from .report import Section, Verdict
from .worker import Worker

# Documents for each one in flight when the worker is killed.
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A worker's end."""

    group_id: str
    num_documents: int
    # Leases held when it was killed.
    num_leases: int
    # Seconds from SIGKILL until it holds none, and until its engine's processes are gone.
    leases_back: float
    engine_gone: float
    # Processes that the engine had besides the worker's own.
    num_engine_processes: int


def kill_in_flight(bench: Bench, worker: Worker, redis: Redis, documents: Sequence[Document]) -> Kill:
    """Kills the worker as soon as it holds as many documents as the lowest level of the ramp."""
    limit = bench.levels[0]
    batch = [numbered(documents[i % len(documents)], f"kill/{i}") for i in range(limit * _ROUNDS)]
    group_id = f"{bench.queue}-kill"
    write_limits(redis, bench.queue, AdmissionLimits(max_in_flight=0))
    enqueue(bench, group_id, batch)
    write_limits(redis, bench.queue, AdmissionLimits(max_in_flight=limit))
    wait_until(lambda: len(worker.leases(redis)) >= limit, f"the worker holds {limit} documents", interval=0.001)
    num_leases, family, start = len(worker.leases(redis)), worker.kill(), time.monotonic()
    wait_until(lambda: not worker.leases(redis), "the guardian hands the leases back", interval=0.001)
    leases_back = time.monotonic() - start
    wait_until(lambda: all(map(is_dead, family)), "the engine's processes are gone")
    return Kill(
        group_id=group_id,
        num_documents=len(batch),
        num_leases=num_leases,
        leases_back=leases_back,
        engine_gone=time.monotonic() - start,
        num_engine_processes=len(family),
    )


def recovery_section(bench: Bench, redis: Redis, kill: Kill) -> Section:
    """Follows the group to its end with whatever worker is there now."""
    rows = follow(bench, kill.group_id)
    job_ids = [str(row["job_id"]) for row in rows]
    lost = kill.num_documents - len({row["document_id"] for row in rows})
    doubled = num_doubled(job_ids, _announced(redis, kill.group_id), _num_results(redis, job_ids))
    bad = [row for row in rows if row["status"] != "succeeded"]
    ok = not (lost or doubled or bad)
    return Section(
        name="recovery",
        title="Kill and recovery",
        verdict=Verdict.PASS if ok else Verdict.FAIL,
        reason=f"{lost} documents lost, {doubled} doubled, {len(bad)} failed, after kill -9 of a worker that held "
        f"{kill.num_leases} of {kill.num_documents}.",
        figures={
            "documents": kill.num_documents,
            "in flight at the kill": kill.num_leases,
            "documents lost": lost,
            "documents doubled": doubled,
            "documents failed": len(bad),
            "documents run twice": sum(int(cast(int, row["attempts"])) > 1 for row in rows),
            "leases back in the queue after, s": kill.leases_back,
            "engine's processes besides the worker": kill.num_engine_processes,
            "all of them gone after, s": kill.engine_gone,
        },
    )


def num_doubled(job_ids: Sequence[str], announced: Sequence[str], num_results: Sequence[int]) -> int:
    """Documents that ended more than once, by any of three books.

    Args:
        job_ids: of the rows that a reader got.
        announced: job ids in the group's done-stream.
        num_results: of each of `job_ids`, the results that Redis has.
    """
    twice = {job_id for book in (job_ids, announced) for job_id, count in Counter(book).items() if count > 1}
    return len(twice | {job_id for job_id, count in zip(job_ids, num_results, strict=True) if count > 1})


def _announced(redis: Redis, group_id: str) -> list[str]:
    entries = cast(list[tuple[bytes, dict[bytes, bytes]]], redis.xrange(keys.group_done(group_id)))
    return [fields[b"j"].decode() for _, fields in entries]


def _num_results(redis: Redis, job_ids: Sequence[str]) -> list[int]:
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.xlen(keys.results(job_id))
        counts: list[Any] = pipeline.execute()
    return [int(count) for count in counts]
