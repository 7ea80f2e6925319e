"""`MachineHealth`: how the engine fared on a machine lately, kept in Redis so that back-off survives a restart.

A machine is a host name: workers of one host share its failures. They are counted in a row: of starts until an engine
there has proved itself, of runs until it has finished a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from . import keys, scripts

if TYPE_CHECKING:
    from redis import Redis

# Seconds before another start after the first failure in a row, doubled with each, and at most.
_BACK_OFF, _BACK_OFF_MAX = 1.0, 60.0

# Seconds after which a machine that takes no work tries a start again.
RETRY_AFTER = 3600.0

# Seconds that the records of a queue's machines outlive the last failure.
_TTL = 86400

# Characters of a reason that are kept.
_MAX_REASON = 500

Phase = Literal["start", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineHealth:
    """Failures in a row on one machine."""

    # While the engine was built or proved itself.
    start_failures: int = 0
    # While it ran documents.
    run_failures: int = 0
    # Seconds since the epoch by Redis' clock.
    failed_at: float = 0.0
    # The last failure.
    reason: str = ""
    # INGEST_MAX_FAILURES of the worker that failed last.
    max_failures: int = 5

    @property
    def refuses(self) -> bool:
        """Whether the machine takes no work: it is broken, not one of the documents."""
        return self.start_failures >= self.max_failures

    def wait(self, now: float) -> float:
        """Seconds from `now` (Redis' clock) until the engine may be started; not above 0: at once."""
        failures = self.start_failures + self.run_failures
        if failures == 0:
            return 0.0
        pause = RETRY_AFTER if self.refuses else min(_BACK_OFF * 2.0 ** min(failures - 1, 60), _BACK_OFF_MAX)
        left = self.failed_at + pause - now
        return min(left, pause) if left == left else 0.0  # whatever the clock, or somebody, says

    @classmethod
    def parse(cls, fields: dict[str, str]) -> Self:
        """From Redis' fields, whatever somebody wrote there."""
        try:
            return cls(
                start_failures=int(fields.get("start", 0)),
                run_failures=int(fields.get("run", 0)),
                failed_at=float(fields.get("failed_at", 0.0)),
                reason=fields.get("reason", ""),
                max_failures=int(fields.get("max", 5)),
            )
        except ValueError:
            return cls()


def record_failure(
    connection: Redis, queue: str, machine: str, phase: Phase, reason: str, *, max_failures: int
) -> None:
    """Counts one more failure in a row; also when Redis is full, as its workers are what makes room in it."""
    scripts.machine_failed(
        connection, queue, machine, phase=phase, reason=reason[:_MAX_REASON], max_failures=max_failures, ttl=_TTL
    )


def record_success(connection: Redis, queue: str, machine: str, phase: Phase) -> None:
    """Ends the row of failures of one phase."""
    connection.hdel(keys.machines(queue), f"{phase}:{machine}")


def forgive(connection: Redis, queue: str, machine: str) -> bool:
    """Forgets the failures of a machine that was mended; whether there were any."""
    fields = [f"{name}:{machine}" for name in ("start", "run", "failed_at", "reason", "max")]
    return bool(connection.hdel(keys.machines(queue), *fields))


def read_health(connection: Redis, queue: str) -> dict[str, MachineHealth]:
    """Machine -> health, of those that failed last."""
    raw: dict[Any, Any] = connection.hgetall(keys.machines(queue))
    fields: dict[str, dict[str, str]] = {}
    for field, value in raw.items():
        name, _, machine = field.decode(errors="replace").partition(":")
        fields.setdefault(machine, {})[name] = value.decode(errors="replace")
    parsed = {machine: MachineHealth.parse(values) for machine, values in fields.items()}
    return {machine: health for machine, health in parsed.items() if health.start_failures or health.run_failures}
