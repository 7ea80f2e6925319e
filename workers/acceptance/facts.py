"""What the acceptance run asks of an engine beyond the `Engine` protocol; engines that can't tell are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..engines.base import Engine, Prompt
from .arithmetic import Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator as its runtime reports it."""

    # Such as "TPU v6 lite".
    kind: str
    bytes_in_use: int
    bytes_limit: int


@runtime_checkable
class _HasDevices(Protocol):
    def devices(self) -> list[dict[str, Any]]: ...


@runtime_checkable
class _HasScores(Protocol):
    def score(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], list[dict[int, float]]]]: ...


def devices(engine: Engine) -> list[Device]:
    """The devices that the engine holds in this process; none where that can't be told (CPU, simulated)."""
    return [Device(**device) for device in engine.devices()] if isinstance(engine, _HasDevices) else []


def scores(engine: Engine, prompts: Sequence[Prompt]) -> list[Scored] | None:
    """Outputs with log-probabilities; None from an engine that has none (simulated)."""
    if not isinstance(engine, _HasScores):
        return None
    return [Scored(token_ids=ids, logprobs=logprobs) for ids, logprobs in engine.score(prompts)]
