"""A job as it stands in Redis, with all that it may be waiting for: what `explain` in why.py goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common import keys, payload, scripts
from ..common.engine_card import EngineCard
from ..common.fields import count, number
from ..common.schema import SCHEMA_VERSION, IngestRequest, IngestResult
from ..common.task_id import estimated_tokens
from .fleet import HEAD, Fleet, enqueued_at, read_fleet
from .rows import terminal_row

if TYPE_CHECKING:
    from redis import Redis


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who has a document."""

    worker: str
    # Seconds since the epoch by Redis' clock; None where that can't be read. Past `until` it may be taken over.
    since: float | None
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job as it stands in Redis."""

    job_id: str
    # What a plain RQ client calls it, where it is one's.
    document_id: str
    # RQ's word.
    status: str
    queue: str
    tenant: str = ""
    # None: not known, so that any worker will look at it.
    model: str | None = None
    schema: int = SCHEMA_VERSION
    # Of prompt (the producer's estimate, or as a worker counted them; 0: not known) and of output at most.
    tokens: int = 0
    max_tokens: int = 0
    # Workers that were lost while they held it.
    crashes: int = 0
    # Seconds since the epoch by Redis' clock: enqueued, and first found not to fit.
    enqueued: float | None = None
    blocked: float | None = None
    # Documents that have passed it since.
    passed: int = 0
    # The worker that makes room for it, and until when (seconds) that holds.
    held_for: str = ""
    held_until: float = 0.0
    # The worker that has it, or had it last.
    worker: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that `explain` goes by."""

    job: Waiting
    fleet: Fleet
    # Once it has ended.
    row: IngestResult | None = None
    lease: Lease | None = None
    # Seconds since the epoch.
    scheduled_for: float | None = None
    # Documents before it in its list; None: it isn't there.
    position: int | None = None
    # Of the first HEAD of them, those of other models, which a worker passes over; and the first that isn't one.
    num_others: int = 0
    first: str = ""

    @property
    def num_before(self) -> int:
        """Documents that go before it, as far as that is known."""
        return (self.position or 0) - self.num_others

    @property
    def candidates(self) -> dict[str, EngineCard]:
        """Live workers that could take it."""
        model = self.job.model
        return {name: card for name, card in self.fleet.cards.items() if model in (None, "*", card.model)}


# --- gather


def gather(connection: Redis, queue: str, job_id: str) -> Snapshot | None:
    """What is known of a job; None if it isn't in Redis.

    Args:
        queue: of a job that doesn't say which one it is of.
    """
    job = _read_job(connection, queue, job_id)
    if job is not None and job.status == "queued":
        # Looked for before it is read again: a job that a worker takes in between is seen to run.
        position, before = _find(connection, job)
        job = _read_job(connection, queue, job_id)
        if job is not None and job.status == "queued":
            alike = [other for other, model in before if job.model is None or model in (None, "*", job.model)]
            return Snapshot(
                job=job,
                fleet=read_fleet(connection, job.queue),
                position=position,
                num_others=len(before) - len(alike),
                first=alike[0] if alike else "",
            )
    if job is None:
        return None
    row = terminal_row(scripts.fetch(connection, [job_id])[0])
    due = connection.zscore(keys.scheduled(job.queue), job_id)
    return Snapshot(
        job=job,
        fleet=read_fleet(connection, job.queue),
        row=row,
        lease=_read_lease(connection, job) if job.status == "started" else None,
        scheduled_for=due,
    )


_FIELDS = (
    *("status", "origin", "description", "tenant", "model", "schema", "tokens", "max_tokens", "crashes"),
    *("enqueued_ms", "enqueued_at", "blocked_ms", "passed", "held_for", "held_until", "worker_name"),
)


def _read_job(connection: Redis, queue: str, job_id: str) -> Waiting | None:
    raw: list[Any] = connection.hmget(keys.job(job_id), list(_FIELDS))
    fields = dict(zip(_FIELDS, raw, strict=True))
    if fields["status"] is None:
        return None
    text = {name: value.decode(errors="replace") if value is not None else "" for name, value in fields.items()}
    request = None if fields["model"] else _read_request(connection, job_id)
    return Waiting(
        job_id=job_id,
        document_id=request.document_id if request else text["description"],
        status=text["status"],
        queue=text["origin"] or queue,
        tenant=text["tenant"],
        model=request.model if request else text["model"] or None,
        schema=count(fields["schema"]) or SCHEMA_VERSION,
        tokens=count(fields["tokens"]) or (estimated_tokens(request) if request else 0),
        max_tokens=count(fields["max_tokens"]) or (request.sampling.max_tokens if request else 0),
        crashes=count(fields["crashes"]),
        enqueued=enqueued_at(fields["enqueued_ms"], fields["enqueued_at"]),
        blocked=count(fields["blocked_ms"]) / 1000 or None,
        passed=count(fields["passed"]),
        held_for=text["held_for"],
        held_until=number(fields["held_until"]) or 0.0,
        worker=text["worker_name"],
    )


def _read_request(connection: Redis, job_id: str) -> IngestRequest | None:
    """The request of a plain RQ client's job that no worker has looked at yet."""
    data = connection.hget(keys.job(job_id), "data")
    return payload.request(data) if isinstance(data, bytes) else None


def _find(connection: Redis, job: Waiting) -> tuple[int | None, list[tuple[str, str | None]]]:
    """How many are before a job in its list, and the first HEAD of them with their models, None where not known."""
    name = keys.queue(job.queue, job.tenant)
    position: int | None = connection.lpos(name, job.job_id)  # type: ignore[assignment]
    if not position:
        return position, []
    head: list[Any] = connection.lrange(name, 0, min(position, HEAD) - 1)
    before = [job_id.decode(errors="replace") for job_id in head]
    with connection.pipeline(transaction=False) as pipeline:
        for job_id in before:
            pipeline.hget(keys.job(job_id), "model")
        models = pipeline.execute(raise_on_error=False)  # what is under a job's key may be anything
    known = (model.decode(errors="replace") if isinstance(model, bytes) else None for model in models)
    return position, list(zip(before, known, strict=True))


def _read_lease(connection: Redis, job: Waiting) -> Lease | None:
    """The lease on a job that was started, among those of the worker that it names."""
    held: set[Any] = connection.smembers(keys.worker_executions(job.worker)) if job.worker else set()
    members = (member for raw in held if (member := raw.decode(errors="replace")).startswith(f"{job.job_id}:"))
    if (member := next(members, None)) is None:
        return None
    expiry = connection.zscore(keys.started(job.queue), member)
    if expiry is None:
        return None
    return Lease(worker=job.worker, since=_leased_at(member), until=expiry - keys.STOCK_GRACE)


def _leased_at(member: str) -> float | None:
    """Seconds since the epoch by Redis' clock; an execution id begins with the microseconds, see lease.lua."""
    try:
        return int(member.partition(":")[2][:14], 16) / 1e6
    except ValueError:
        return None
