"""`AdmissionLimits`: how much may be in flight, kept in Redis beside the queue and enforced inside lease.lua."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import keys
from .errors import SettingsError

if TYPE_CHECKING:
    from redis import Redis


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds on a queue's in-flight documents; None is no bound. They hold beside the workers' own settings."""

    # Documents that one worker may hold leases on.
    max_in_flight: int | None = None
    # Documents leased over all workers of the queue.
    max_in_flight_fleet: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 0:
                raise SettingsError(f"{name}={value}: a limit is 0 (nothing is admitted) or more")


def read_limits(connection: Redis, queue: str) -> AdmissionLimits:
    """The limits of a queue as they stand in Redis; what is no number there bounds nothing, as in lease.lua."""
    raw: list[Any] = connection.hmget(keys.limits(queue), ["max_in_flight", "max_in_flight_fleet"])
    values = [int(value) if value is not None and value.isdigit() else None for value in raw]
    return AdmissionLimits(max_in_flight=values[0], max_in_flight_fleet=values[1])


def write_limits(connection: Redis, queue: str, limits: AdmissionLimits) -> None:
    """Replaces the limits of a queue; in force with the next lease of any worker."""
    values: dict[Any, int] = {name: value for name, value in asdict(limits).items() if value is not None}
    with connection.pipeline() as pipeline:
        pipeline.delete(keys.limits(queue))
        if values:
            pipeline.hset(keys.limits(queue), mapping=values)
        pipeline.execute()
