"""`read_fleet`: a queue's waiting lists, its workers, and what is in flight against which limit, at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common import keys
from ..common.engine_card import EngineCard, live_cards
from ..common.fields import count, timestamp
from ..common.limits import AdmissionLimits, read_limits
from ..common.machine_health import MachineHealth, read_health
from ..common.schema import SCHEMA_VERSION
from ..common.worker_load import Closed, WorkerLoad, live_loads

if TYPE_CHECKING:
    from redis import Redis

# Queued documents that are looked at for their age and for the worker that they need, over all lists, but at least the
# first of each.
HEAD = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What one tenant has waiting."""

    queued: int = 0
    # Seconds that the oldest of the first has waited; None where there is none, or nothing tells.
    oldest: float | None = None
    # Of the first, those that wait for workers of a release later than this one.
    num_newer: int = 0
    # Tokens served, as the lease script reckons it: the tenant with the fewest is next.
    tokens_served: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is in flight."""

    documents: int = 0
    # Reserved for them.
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """One queue and its workers."""

    queue: str
    # Seconds since the epoch by Redis' clock.
    now: float
    suspended: bool
    # Tenant -> its list; "" is the list of documents without a tenant, and always there.
    backlogs: Mapping[str, Backlog]
    limits: AdmissionLimits
    # Leased from this queue.
    held: Held
    # Worker -> what it holds, from all of its queues; those that hold or say something.
    workers: Mapping[str, Held]
    cards: Mapping[str, EngineCard]
    loads: Mapping[str, WorkerLoad]
    machines: Mapping[str, MachineHealth]

    @property
    def queued(self) -> int:
        return sum(backlog.queued for backlog in self.backlogs.values())

    @property
    def oldest(self) -> float | None:
        """Seconds that the oldest document has waited."""
        return max((backlog.oldest for backlog in self.backlogs.values() if backlog.oldest is not None), default=None)

    @property
    def documents_per_s(self) -> float:
        """Over the last minute, all workers together."""
        return sum(load.documents_per_s for load in self.loads.values())

    @property
    def eta(self) -> float | None:
        """Seconds until everything that is queued is done, at that rate; None without one."""
        if not self.queued:
            return 0.0
        return self.queued / self.documents_per_s if self.documents_per_s > 0 else None

    @property
    def closed(self) -> list[Closed]:
        """Gates that are closed for the whole queue, whoever asks."""
        closed = []
        if self.suspended:
            closed.append(Closed(gate="suspended", why="`rq suspend` is in force; `rq resume` ends it"))
        for gate, name, number, unit in (
            ("fleet", "max_in_flight_fleet", self.held.documents, "documents"),
            ("kv_fleet", "max_kv_tokens_fleet", self.held.kv_tokens, "KV tokens"),
        ):
            limit = getattr(self.limits, name)
            if limit is not None and number >= limit:
                closed.append(Closed(gate=gate, why=f"{number:,} {unit} are in flight, {name} is {limit:,}"))
        return closed


def read_fleet(connection: Redis, queue: str) -> Fleet:
    cards, loads = live_cards(connection, queue), live_loads(connection, queue)
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.time()
        pipeline.exists(keys.suspended())
        pipeline.zrange(keys.tenants(queue), 0, -1, withscores=True)
        pipeline.smembers(keys.workers_of(queue))
        pipeline.zcard(keys.started(queue))
        pipeline.hgetall(keys.kv_tokens())
        (whole, micros), suspended, tenants, registered, num_started, kv_tokens = pipeline.execute()
    now = whole + micros / 1e6
    # The queue's own list joins as the lease script lets it: beside the one that was served least.
    served = {"": tenants[0][1] if tenants else 0.0} | {name.decode(errors="replace"): score for name, score in tenants}
    reserved = {field.decode(errors="replace"): count(value) for field, value in kv_tokens.items()}
    prefix = keys.worker("")
    names = {key.decode(errors="replace").removeprefix(prefix) for key in registered} | set(cards) | set(loads)
    workers = _read_workers(connection, sorted(names), reserved)
    return Fleet(
        queue=queue,
        now=now,
        suspended=bool(suspended),
        backlogs=_read_backlogs(connection, queue, served, now),
        limits=read_limits(connection, queue),
        held=Held(documents=num_started, kv_tokens=reserved.get(f"queue:{queue}", 0)),
        workers={name: held for name, held in workers.items() if name in cards or name in loads or held.documents},
        cards=cards,
        loads=loads,
        machines=read_health(connection, queue),
    )


def _read_workers(connection: Redis, names: Sequence[str], reserved: Mapping[str, int]) -> dict[str, Held]:
    with connection.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.scard(keys.worker_executions(name))
        counts = pipeline.execute()
    return {
        name: Held(documents=count, kv_tokens=reserved.get(f"worker:{name}", 0))
        for name, count in zip(names, counts, strict=True)
    }


def _read_backlogs(connection: Redis, queue: str, served: Mapping[str, float], now: float) -> dict[str, Backlog]:
    each = max(1, HEAD // len(served))
    with connection.pipeline(transaction=False) as pipeline:
        for tenant in served:
            pipeline.llen(keys.queue(queue, tenant))
            pipeline.lrange(keys.queue(queue, tenant), 0, each - 1)
        # What is under a list's key may be anything, too: whoever may enqueue may write there.
        flat = pipeline.execute(raise_on_error=False)
    lengths = [length if isinstance(length, int) else 0 for length in flat[::2]]
    heads: list[list[bytes]] = [head if isinstance(head, list) else [] for head in flat[1::2]]
    with connection.pipeline(transaction=False) as pipeline:
        for head in heads:
            for job_id in head:
                pipeline.hmget(keys.job(job_id.decode(errors="replace")), ["schema", "enqueued_ms", "enqueued_at"])
        # What is under a job's key may be anything.
        jobs = iter(pipeline.execute(raise_on_error=False))
    backlogs = {}
    for (tenant, score), length, head in zip(served.items(), lengths, heads, strict=True):
        fields = [job for job in (next(jobs) for _ in head) if isinstance(job, list)]
        waits = [now - at for _, *times in fields if (at := enqueued_at(*times)) is not None]
        backlogs[tenant] = Backlog(
            queued=length,
            oldest=max(0.0, max(waits)) if waits else None,
            num_newer=sum(count(schema) > SCHEMA_VERSION for schema, *_ in fields),
            tokens_served=score,
        )
    return backlogs


def enqueued_at(enqueued_ms: bytes | None, iso: bytes | None) -> float | None:
    """Seconds since the epoch when a job was enqueued, from its fields; of a plain RQ client's, by that one's clock."""
    milliseconds = count(enqueued_ms)
    return milliseconds / 1000 if milliseconds else timestamp(iso)
