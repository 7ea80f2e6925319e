"""A worker without an engine or a loop: leases and ends jobs by hand, through the scripts that a real one uses."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Sequence
from typing import Literal

import orjson
from redis import Redis

from ingestq.common import scripts
from ingestq.common.schema import IngestRequest, IngestResult, Sampling, Status
from ingestq.common.scripts import Admission, Finish, LeasedJob


def request(document_id: str, text: str = "", **fields: object) -> IngestRequest:
    values = {"text": text or f"text of {document_id}", "model": "m", "sampling": Sampling(max_tokens=8), **fields}
    return IngestRequest.model_validate({"document_id": document_id, **values})


def lease(redis: Redis, want: int = 128, *, model: str = "m") -> list[LeasedJob]:
    reply = scripts.lease(
        redis,
        "ingest",
        worker="hand",
        model=model,
        admission=Admission(documents=want),
        lease_ttl=60.0,
        call_id=secrets.token_hex(7),
    )
    return reply.jobs


def document_of(job: LeasedJob) -> str:
    data = zlib.decompress(job.data) if job.data[:1] == b"x" else job.data  # RQ compresses what it saves
    return str(orjson.loads(data)[2][0]["document_id"])


def finish(
    redis: Redis,
    jobs: Sequence[LeasedJob],
    kind: Literal["S", "F", "P", "X"] = "S",
    *,
    ttl: int = 1000,
    text: str = "out",
) -> list[str]:
    """Ends leases with a row each."""
    status = {"S": Status.SUCCEEDED, "X": Status.STOPPED}.get(kind, Status.FAILED)
    finishes = [
        Finish(
            job=job,
            kind=kind,
            ttl=ttl,
            result_json=IngestResult(
                document_id=document_of(job),
                job_id=job.job_id,
                status=status,
                text=text if kind == "S" else None,
                attempts=job.attempts,
                error_class=None if kind == "S" else "EngineError",
                error_message=None if kind == "S" else "broken",
            ).to_json(),
            exception="" if kind == "S" else "EngineError: broken",
        )
        for job in jobs
    ]
    return list(scripts.finish(redis, "ingest", worker="hand", model="m", finishes=finishes))


def drain(redis: Redis, kind: Literal["S", "F", "P", "X"] = "S", **options: object) -> list[str]:
    """Leases and ends everything that is queued; returns the documents in the order in which they ended."""
    documents: list[str] = []
    while jobs := lease(redis):
        finish(redis, jobs, kind, **options)
        documents += map(document_of, jobs)
    return documents
