"""`ingestq why`: what a document waits for."""

from __future__ import annotations

import shutil
from typing import Any

import click

from ..common.connections import persist
from .command import EXIT_CODES, ExitCode, leave, open_session, print_object, say, server_options
from .group import PATIENCE
from .progress import printable
from .status_report import tenant_told
from .units import beside, duration
from .waiting import Snapshot, gather
from .why import Answer, explain

# Columns where there is no terminal, and at most.
_WIDTH = 100


@click.command(epilog=EXIT_CODES)
@click.argument("job_id", metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@server_options
def why(job_id: str, as_json: bool, url: str | None, queue: str | None) -> None:
    """Says what a document waits for: a job id from `IngestQueue.enqueue`, a row, or any RQ client."""
    session = open_session(url, queue)
    snapshot = persist(lambda: gather(session.connection, session.settings.queue, job_id), patience=PATIENCE)
    if snapshot is None:
        say(f"ingestq: job {job_id!r} is not in Redis: it was never enqueued, was deleted, or has expired")
        leave(ExitCode.UNKNOWN)
        return
    answer = explain(snapshot)
    if as_json:
        print_object(_as_json(snapshot, answer))
    else:
        click.echo(_render(snapshot, answer, min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)))


def _as_json(snapshot: Snapshot, answer: Answer) -> dict[str, Any]:
    job = snapshot.job
    return {
        "job_id": job.job_id,
        "document_id": job.document_id,
        "queue": job.queue,
        "tenant": job.tenant,
        "status": job.status,
        "waits_for": answer.reason,
        "why": answer.why,
        "details": answer.details,
    }


def _render(snapshot: Snapshot, answer: Answer, width: int) -> str:
    job = snapshot.job
    enqueued = "" if job.enqueued is None else f", enqueued {duration(max(0.0, snapshot.fleet.now - job.enqueued))} ago"
    tenant = f", {tenant_told(job.tenant)}" if job.tenant else ""
    head = f"{job.document_id or job.job_id}: {job.status} in {job.queue}{tenant}{enqueued}"
    lines = [beside("", printable(head), width), beside(f"{answer.reason}: ", printable(answer.why), width)]
    return "\n".join([*lines, *(beside("  ", printable(detail), width) for detail in answer.details)])
