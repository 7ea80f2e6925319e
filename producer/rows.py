"""A job as it stands in Redis -> the row that its reader gets."""

from __future__ import annotations

import re

from pydantic import ValidationError

from ..common import payload
from ..common.errors import InvalidJob
from ..common.schema import IngestResult, Status
from ..common.scripts import FetchedJob

# RQ's type of a result: successful, failed.
_SUCCESSFUL = 1

# "package.Class: message", the last line of a traceback.
_EXCEPTION = re.compile(r"(?:\w+\.)*(\w+)(?:: (.*))?")

# Characters of a document id, or of the RQ description that stands for one.
_MAX_DOCUMENT_ID = 512


def terminal_row(job: FetchedJob, document_id: str | None = None) -> IngestResult | None:
    """The row of a job as it stands; None while it is not terminal.

    Whatever is in Redis, this gives a row: what can't be read becomes a failed one that says so.

    Args:
        document_id: the document's id as its group knows it; default is what the job tells.
    """
    if job.status == "finished":
        return _stored(job, document_id) if job.return_value is not None else _expired(job, document_id)
    if job.status in ("failed", "stopped"):
        # Not the result of an earlier, successful run.
        ours = job.return_value is not None and job.result_type != _SUCCESSFUL
        return _stored(job, document_id) if ours else _without_row(job, document_id)
    if job.status == "":
        return _expired(job, document_id)
    if job.status == "canceled" or not job.in_group:
        return IngestResult(
            document_id=document_id or _document_of(job),
            job_id=job.job_id,
            status=Status.CANCELLED,
            attempts=job.attempts,
        )
    return None


def _stored(job: FetchedJob, document_id: str | None) -> IngestResult:
    try:
        row = IngestResult.model_validate_json(job.return_value or b"")
        if row.job_id == job.job_id:
            return row
        reason = "it names another job"
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        reason = f"{where and where + ': '}{problem['msg']}"
    return _failed(
        job,
        document_id or _document_of(job),
        "InvalidResult",
        f"the stored result is no IngestResult of this job ({reason}); was it written by another version or program?",
    )


def _without_row(job: FetchedJob, document_id: str | None) -> IngestResult:
    """Of a dead letter, by us or by stock RQ: only its exception is there."""
    lines = (job.exception or "").strip().splitlines()
    named = _EXCEPTION.fullmatch(lines[-1]) if lines else None
    error_class = named[1] if named else "UnknownError"
    message = (named[2] if named else "\n".join(lines)) or "RQ says that the job failed, but not why"
    return _failed(job, document_id or _document_of(job), error_class, message)


def _failed(job: FetchedJob, document_id: str, error_class: str, message: str) -> IngestResult:
    return IngestResult(
        document_id=document_id,
        job_id=job.job_id,
        status=Status.STOPPED if job.status == "stopped" else Status.FAILED,
        attempts=job.attempts,
        worker=job.worker,
        error_class=error_class,
        error_message=message,
    )


def _expired(job: FetchedJob, document_id: str | None) -> IngestResult:
    return IngestResult(
        document_id=document_id or _document_of(job),
        job_id=job.job_id,
        status=Status.EXPIRED,
        error_class="ResultExpired",
        error_message="the row is no longer in Redis: it is older than its result_ttl, or the job was deleted; "
        "enqueue the document again",
    )


def _document_of(job: FetchedJob) -> str:
    """The document's id; from the payload if it is there, because a plain RQ client's description is the whole call."""
    try:
        document_id = str(payload.argument(job.data)["document_id"])
    except (InvalidJob, KeyError):
        document_id = job.description
    return document_id[:_MAX_DOCUMENT_ID]
