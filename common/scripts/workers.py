"""Workers' records: their names, their lease on life, their machines' health."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from .. import keys
from ._call import now_iso, run

if TYPE_CHECKING:
    from redis import Redis

Presence = Literal["known", "forgotten", "replaced"]


def renew(
    connection: Redis, queues: Sequence[str], *, worker: str, incarnation: str, lease_ttl: float, worker_ttl: int
) -> Presence:
    """Extends all leases of a worker, whichever of its queues they are from, and its record.

    Returns:
        "known"; "forgotten": Redis has no record of the worker; "replaced": another has its name, nothing was extended.
    """
    word = run(
        connection,
        "renew",
        [keys.worker_executions(worker), keys.worker(worker), *map(keys.started, queues)],
        [lease_ttl, keys.STOCK_GRACE, worker_ttl, now_iso(), incarnation],
    )
    return cast(Presence, word.decode())


def claim(
    connection: Redis,
    queues: Sequence[str],
    *,
    worker: str,
    incarnation: str,
    dead: str,
    lease_ttl: float,
    worker_ttl: int,
    record: Mapping[str, Any],
) -> int:
    """Registers a worker under its name with RQ, for all its queues, unless a live one has it.

    Args:
        dead: incarnation of a former holder of the name that is known to be dead, or "".
        record: RQ's fields.

    Returns:
        0, or the seconds until the name is free if its holder is dead.
    """
    fields = [part for item in record.items() for part in item]
    claimed, *left = run(
        connection,
        "claim",
        [keys.worker(worker), keys.workers(), *map(keys.workers_of, queues)],
        [incarnation, dead, lease_ttl, worker_ttl, *fields],
    )
    return 0 if claimed else cast(int, left[0])


def sign_off(connection: Redis, queues: Sequence[str], *, worker: str, incarnation: str) -> None:
    """Takes a dead worker off the lists of its queues, unless another has its name."""
    run(
        connection,
        "sign_off",
        [
            keys.worker(worker),
            keys.workers(),
            keys.worker_executions(worker),
            *map(keys.workers_of, queues),
            *map(keys.engines, queues),
            *map(keys.loads, queues),
        ],
        [worker, incarnation, now_iso()],
    )


def write_fields(connection: Redis, key: str, fields: Mapping[str, str], *, ttl: int | None = None) -> None:
    """Sets fields of a hash, also when Redis is full; `ttl` in seconds."""
    run(
        connection,
        "write_fields",
        [key],
        ["" if ttl is None else ttl, *(part for item in fields.items() for part in item)],
    )


def machine_failed(
    connection: Redis, queue: str, machine: str, *, phase: str, reason: str, max_failures: int, ttl: int
) -> None:
    """Counts one more failure in a row of a machine's engine; see machine_health.py."""
    run(connection, "machine_failed", [keys.machines(queue)], [machine, phase, reason, max_failures, ttl])
