"""Documents and jobs for tests, put into the queue without the producer's comforts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq.job import Job

from ingestq.common import payload, scripts
from ingestq.common.schema import IngestRequest, IngestResult, Sampling, job_id
from ingestq.common.scripts import EnqueueOptions, FetchedJob, NewJob
from ingestq.common.serializer import OrjsonSerializer
from ingestq.common.task_id import estimated_tokens, task_id

QUEUE = "ingest"


def request(number: int, *, model: str = "sim", max_tokens: int = 4, **fields: Any) -> IngestRequest:
    """A short document of its own; its output has exactly `max_tokens` tokens."""
    fields = {"text": f"This is document number {number}.", **fields}
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return IngestRequest.model_validate(
        {"document_id": f"doc-{number}", "model": model, "chat": False, "sampling": sampling, **fields}
    )


def new_job(item: IngestRequest) -> NewJob:
    request_json = item.to_json()
    return NewJob(
        job_id=job_id(request_json),
        data=payload.encode(request_json),
        document_id=item.document_id,
        model=item.model,
        tokens=estimated_tokens(item),
        max_tokens=item.sampling.max_tokens,
        task=task_id(item),
    )


def put(redis: Redis, requests: Sequence[IngestRequest], **options: Any) -> list[str]:
    """Enqueues in chunks; returns the job ids."""
    jobs = [new_job(item) for item in requests]
    defaults = {"group_ttl": 3600, "result_ttl": 3600, "failure_ttl": 3600}
    chosen = EnqueueOptions(**{**defaults, **options})
    for start in range(0, len(jobs), scripts.CHUNK):
        scripts.enqueue(redis, QUEUE, jobs[start : start + scripts.CHUNK], chosen)
    return [job.job_id for job in jobs]


def fetched(redis: Redis, job_ids: Sequence[str]) -> list[FetchedJob]:
    return [job for start in range(0, len(job_ids), 128) for job in scripts.fetch(redis, job_ids[start : start + 128])]


def statuses(redis: Redis, job_ids: Sequence[str]) -> list[str]:
    return [job.status for job in fetched(redis, job_ids)]


def row(redis: Redis, job_id: str) -> IngestResult:
    """The terminal row of a job that has one."""
    value = fetched(redis, [job_id])[0].return_value
    assert value is not None, "the job has no result"
    return IngestResult.model_validate_json(value)


def rq_job(redis: Redis, job_id: str) -> Job:
    """The job as RQ's users see it."""
    return Job.fetch(job_id, connection=redis, serializer=OrjsonSerializer)


def contents(redis: Redis) -> dict[bytes, object]:
    """Everything that a producer writes. (Of a large hash DUMP may differ from one time to the next.)"""
    read = {
        b"hash": redis.hgetall,
        b"string": redis.get,
        b"zset": lambda name: redis.zrange(name, 0, -1, withscores=True),
    }
    read |= {b"list": lambda name: redis.lrange(name, 0, -1), b"set": redis.smembers, b"stream": redis.xrange}
    return {name: read[redis.type(name)](name) for name in redis.scan_iter()}
