"""`AdmissionLimits`: how much may be in flight, kept in Redis beside the queue and enforced inside lease.lua."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from . import keys
from .errors import SettingsError
from .fields import number, whole
from .settings import MAX_COUNT, MAX_TTFT_MS

if TYPE_CHECKING:
    from redis import Redis


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds on what is leased from a queue; None is no bound. They hold beside the workers' own settings."""

    # Documents that a worker holds in all: it leases from this queue while it holds fewer.
    max_in_flight: int | None = None
    # Documents leased from this queue over all workers.
    max_in_flight_fleet: int | None = None
    # KV tokens that a worker has reserved in all, those of the next document included.
    max_kv_tokens: int | None = None
    # KV tokens reserved from this queue over all workers.
    max_kv_tokens_fleet: int | None = None
    # Milliseconds from an engine's add_request to the first token; 0: none, whatever the workers' settings say.
    ttft_sla_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = MAX_TTFT_MS if name == "ttft_sla_ms" else MAX_COUNT
            if value is not None and not 0 <= value <= most:
                zero = "no bound" if name == "ttft_sla_ms" else "nothing is admitted"
                raise SettingsError(f"{name}={value}: a limit is 0 ({zero}) to {most:.0f}")


LIMITS: Sequence[str] = tuple(field.name for field in fields(AdmissionLimits))


def limits_of(raw: Sequence[bytes | None]) -> AdmissionLimits:
    """The limits from the fields LIMITS of the hash; what is no number there bounds nothing, as in lease.lua."""
    *counts, ttft_sla = raw
    numbers = [_within(whole(value), MAX_COUNT) for value in counts]
    return AdmissionLimits(
        **dict(zip(LIMITS, numbers, strict=False)), ttft_sla_ms=_within(number(ttft_sla), MAX_TTFT_MS)
    )


def _within(value: float | None, most: float) -> Any:
    """What is negative or no number bounds nothing; what is larger than a limit can be bounds nothing either."""
    return None if value is None or value < 0 else min(value, most)


def read_limits(connection: Redis, queue: str) -> AdmissionLimits:
    """The limits of a queue as they stand in Redis; what is no hash bounds nothing, as in lease.lua."""
    from redis.exceptions import ResponseError

    try:
        raw: list[Any] = connection.hmget(keys.limits(queue), LIMITS)
    except ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        return AdmissionLimits()
    return limits_of(raw)


def write_limits(connection: Redis, queue: str, limits: AdmissionLimits) -> None:
    """Replaces the limits of a queue; in force with the next lease of any worker."""
    _write(connection, queue, asdict(limits), replace=True)


def update_limits(connection: Redis, queue: str, changes: Mapping[str, float | None]) -> None:
    """Changes some limits of a queue and leaves the others; None removes one.

    Raises:
        SettingsError: there is no limit of that name, or it can't have that value.
    """
    for name in changes:
        if name not in LIMITS:
            raise SettingsError(f"{name}: there is no such limit; there are {', '.join(LIMITS)}")
    AdmissionLimits(**changes)  # type: ignore[arg-type]  # for its errors
    _write(connection, queue, {name: _number(name, value) for name, value in changes.items()}, replace=False)


def _number(name: str, value: float | None) -> float | None:
    """A count as a whole number."""
    if value is None or name == "ttft_sla_ms":
        return value
    if value != int(value):
        raise SettingsError(f"{name}={value}: must be a whole number")
    return int(value)


def _write(connection: Redis, queue: str, values: Mapping[str, float | None], *, replace: bool) -> None:
    kept: dict[Any, float] = {name: value for name, value in values.items() if value is not None}
    gone = [name for name, value in values.items() if value is None]
    with connection.pipeline() as pipeline:
        if replace:
            pipeline.delete(keys.limits(queue))
        elif gone:
            pipeline.hdel(keys.limits(queue), *gone)
        if kept:
            pipeline.hset(keys.limits(queue), mapping=kept)
        pipeline.execute()
