"""What a worker's other threads tell its courier; it reads them one by one, in the order in which they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import DocumentError
from .engines.base import Completion


@dataclass(frozen=True, slots=True)
class Completed:
    """The engine is done with a prompt, or refused it."""

    prompt_id: str
    outcome: Completion | DocumentError


@dataclass(frozen=True, slots=True)
class Stop:
    """RQ's stop-job or stop-execution command: of a job, or of one of its executions."""

    job_id: str | None
    execution_id: str | None


@dataclass(frozen=True, slots=True)
class Lost:
    """Leases that Redis no longer knows: cancelled, deleted, or taken over."""

    members: Sequence[str]


@dataclass(frozen=True, slots=True)
class Started:
    """Ready prompts went into the engine: others may be readied."""


Message = Completed | Stop | Lost | Started
