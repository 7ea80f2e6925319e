"""`ObservedWorker`: a BatchWorker that notes what its engine is at, for the acceptance run.

`rq worker -w ingestq.workers.acceptance.observer.ObservedWorker` writes `trace.jsonl` in its working folder: one
`Sample` each `_INTERVAL` seconds while the engine steps, and one when it has nothing left to do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from ..batch_worker import BatchWorker
from ..engines.base import Completion, Engine
from .facts import devices

TRACE = "trace.jsonl"

# Seconds between samples: reading vLLM's metrics takes about a millisecond.
_INTERVAL = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How things stood at one moment. Counts are since the worker was ready."""

    # Seconds of the machine's monotonic clock, which all of its processes share.
    at: float
    num_steps: int
    # Spent inside them.
    step_seconds: float
    # Leases held now, and the most since the last sample.
    in_flight: int
    max_in_flight: int
    # Of the prompts that are finished.
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    num_preemptions: int
    # None where the engine can't be asked.
    num_compilations: int | None
    # Share of the KV cache's blocks in use, 0 to 1.
    kv_usage: float
    # Of the devices that the engine holds, all together; 0 where it can't tell.
    device_bytes: int
    device_limit_bytes: int
    # Resident memory of the worker's process.
    rss_bytes: int


class Observer:
    """An engine, passed through; what goes by is counted."""

    def __init__(self, engine: Engine, trace: Path, in_flight: Callable[[], int]) -> None:
        self._engine = engine
        self._trace = trace
        self._in_flight = in_flight
        self._next = 0.0
        self._step_seconds = 0.0
        self._num_steps = self._max_in_flight = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[Completion]:
        start = time.monotonic()
        completions = self._engine.step()
        self._step_seconds += time.monotonic() - start
        self._num_steps += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight())
        for completion in completions:
            self._prompt_tokens += completion.num_prompt_tokens
            self._cached_tokens += completion.num_cached_tokens
            self._output_tokens += len(completion.token_ids)
        if time.monotonic() >= self._next or not self._engine.has_unfinished():
            self._note()
        return completions

    def _note(self) -> None:
        with self._trace.open("ab") as file:
            file.write(orjson.dumps(asdict(self._sample())) + b"\n")
        self._max_in_flight = 0
        self._next = time.monotonic() + _INTERVAL

    def _sample(self) -> Sample:
        counters, held = self._engine.counters(), devices(self._engine)
        return Sample(
            at=time.monotonic(),
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
            in_flight=self._in_flight(),
            max_in_flight=self._max_in_flight,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            num_preemptions=counters.num_preemptions,
            num_compilations=counters.num_compilations,
            kv_usage=counters.kv_usage,
            device_bytes=sum(device.bytes_in_use for device in held),
            device_limit_bytes=sum(device.bytes_limit for device in held),
            rss_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        )


class ObservedWorker(BatchWorker):
    """A worker as it is, its engine observed."""

    def load_engine(self) -> Engine:
        return cast(Engine, Observer(super().load_engine(), Path(TRACE), self._num_leases))

    def _num_leases(self) -> int:
        return self._courier.in_flight if self._courier else 0


def read_trace(folder: Path) -> list[Sample]:
    """What a worker in `folder` has noted so far."""
    path = folder / TRACE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last may be half a line
    return [Sample(**orjson.loads(line)) for line in lines]
