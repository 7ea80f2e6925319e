"""Out of the queue: what a worker may lease, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from .. import keys
from ..fields import timestamp, whole
from ..limits import AdmissionLimits, limits_of
from ..payload import MAX_PAYLOAD_BYTES
from ..schema import SCHEMA_VERSION
from ..settings import key_prefix
from ._call import CHUNK, MAX_CALL_BYTES, now_iso, pack_exception, run

if TYPE_CHECKING:
    from redis import Redis

# Queue positions that a lease call looks at once jobs of other models are in the way: it reads two fields of each.
_FAR_SCAN = 1024

# Of those behind a job that doesn't fit, how many may pass it, and for how many seconds since it was found not to.
MAX_PASSES, PASS_TIMEOUT = 128, 60.0

# What kept jobs in the queue; see lease.lua.
Gate = Literal["open", "suspended", "worker", "fleet", "company", "kv", "kv_fleet", "prefill", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedJob:
    """A job that this worker holds a lease on."""

    job_id: str
    # Names the lease; with the job id it is the fence of the result.
    execution_id: str
    # The queue that it was leased from.
    queue: str = "ingest"
    # Who submitted it; "" where nobody is named.
    tenant: str = ""
    # The job's RQ payload.
    data: bytes
    # As in `NewJob`; `tokens` is exact once `reserve` has written it.
    task: str = ""
    max_tokens: int = 0
    tokens: int = 0
    # Reserved for it.
    kv_tokens: int = 0
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
class Admission:
    """What one call may take at most, on the worker's side; the limits in Redis hold beside it."""

    # At most; CHUNK holds too.
    documents: int
    # Estimated prompt tokens at most, but always one document; None: no bound.
    prompt_tokens: int | None = None
    # KV tokens that this worker may have reserved in all; 0: no bound.
    max_kv_tokens: int = 0
    # KV tokens reserved from this queue over the fleet; 0: no bound.
    max_kv_tokens_fleet: int = 0
    # Documents leased from this queue over the fleet; 0: no bound.
    max_in_flight_fleet: int = 0
    # Tokens in one KV cache block: reservations are whole blocks.
    block_size: int = 1
    # Task -> output tokens to reserve; of a task that isn't here, as many as the job may have.
    expected_output: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReply:
    """What one lease call brought."""

    jobs: list[LeasedJob]
    # Jobs whose model isn't known yet, with their payloads: see `adopt`.
    unknown: list[tuple[str, bytes]]
    gate: Gate
    # Jobs still in the queue, those of other models and of all tenants included; of more than 256 tenants, those served
    # least only, unless they gave nothing.
    queue_length: int
    # Where in the queue to look next; not 0 when jobs of other models are in the way.
    next_position: int
    # As they stood in Redis in this very step.
    limits: AdmissionLimits


def lease(
    connection: Redis,
    queue: str,
    *,
    worker: str,
    model: str,
    admission: Admission,
    lease_ttl: float,
    call_id: str,
    company: int = 0,
    companies: Sequence[int] = (),
    position: int = 0,
) -> LeaseReply:
    """Leases jobs of `model`, as many as are admitted.

    Args:
        lease_ttl: seconds.
        call_id: 14 hexadecimal characters that no other call uses.
        company: the smallest of `companies` that a job held already is bound to; 0 for none.
        companies: of how many jobs in flight a job that lost 1, 2, ... workers may be one.
        position: where to start looking, in the queue's own list and in each tenant's.
    """
    args: list[Any] = [key_prefix(), queue, worker, model, now_iso(), call_id, lease_ttl, keys.STOCK_GRACE]
    args += (position, CHUNK if position == 0 else _FAR_SCAN, SCHEMA_VERSION, MAX_PAYLOAD_BYTES, _MALFORMED)
    args += (min(admission.documents, CHUNK), MAX_CALL_BYTES)
    args.append("" if admission.prompt_tokens is None else admission.prompt_tokens)
    args += (admission.max_in_flight_fleet, admission.max_kv_tokens, admission.max_kv_tokens_fleet)
    args += (admission.block_size, MAX_PASSES, PASS_TIMEOUT, company, len(companies), *companies)
    for task, num_tokens in admission.expected_output.items():
        args += (task, num_tokens)
    leased, unknown, gate, length, now_ms, next_position, limits = run(connection, "lease", _keys(queue, worker), args)
    return LeaseReply(
        jobs=[_leased(queue, now_ms, *fields) for fields in leased],
        unknown=[(unknown[i].decode(errors="replace"), unknown[i + 1]) for i in range(0, len(unknown), 2)],
        gate=cast(Gate, gate.decode()),
        queue_length=length,
        next_position=next_position,
        limits=limits_of(limits),
    )


def _keys(queue: str, worker: str) -> list[str]:
    return [
        keys.queue(queue),
        keys.started(queue),
        keys.worker_executions(worker),
        keys.limits(queue),
        keys.suspended(),
        keys.failed(queue),
        keys.tenants(queue),
        keys.kv_tokens(),
    ]


def _leased(
    queue: str,
    now_ms: int,
    job_id: bytes,
    execution_id: bytes,
    data: bytes,
    enqueued_ms: bytes,
    enqueued_at: bytes,
    attempts: int,
    result_ttl: bytes,
    failure_ttl: bytes,
    refused: bytes,
    crashes: int,
    tenant: bytes,
    task: bytes,
    max_tokens: int,
    tokens: int,
    kv_tokens: int,
) -> LeasedJob:
    return LeasedJob(
        job_id=job_id.decode(),
        execution_id=execution_id.decode(),
        queue=queue,
        tenant=tenant.decode(),
        data=data,
        task=task.decode(errors="replace"),
        max_tokens=max_tokens,
        tokens=tokens,
        kv_tokens=kv_tokens,
        enqueued_ms=whole(enqueued_ms) or _milliseconds(timestamp(enqueued_at)),
        leased_ms=now_ms,
        attempts=attempts,
        crashes=crashes,
        result_ttl=_ttl(result_ttl),
        failure_ttl=_ttl(failure_ttl),
        refused=refused.decode(),
    )


# Of a dead letter that lease.lua makes.
_MALFORMED = pack_exception(
    "InvalidJob: what is under the key of this job is no job: its type, its status or its model can't be"
)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


# Seconds that anything is kept at most, if not for ever: ten years.
_MAX_TTL = 10 * 365 * 86400


def _ttl(raw: bytes) -> int | None:
    """Seconds from a job hash, -1 for ever; None where there are none."""
    seconds = whole(raw)
    return None if seconds is None else max(-1, min(seconds, _MAX_TTL))
