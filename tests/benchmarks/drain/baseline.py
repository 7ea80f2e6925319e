"""The same engine given everything under the same limits: no Redis, no leases, no threads; nothing passes but steps.

The clock is virtual: the engine's own, the sum of its steps. What the queue, the courier and Python cost is what a
fleet lacks of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ingestq.common.schema import IngestRequest
from ingestq.common.settings import Settings
from ingestq.common.task_id import task_id
from ingestq.workers.drain import EngineLoad
from ingestq.workers.drain_bounds import drain_controller
from ingestq.workers.engines.simulated_engine import Profile, SimulatedEngine
from ingestq.workers.lengths import ExpectedOutput
from ingestq.workers.pool import Ready
from ingestq.workers.prompts import build_prompt

from .figures import percentile
from .workload import MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What one engine does at best."""

    num_documents: int
    # Prompt and output, in a simulated second, until nothing waits outside of the engine any more.
    tokens_per_s: float
    # Of first tokens until then, simulated milliseconds.
    ttft_p95_ms: float
    num_preemptions: int


def worker_settings(profile: Profile, settings: Mapping[str, str]) -> Settings:
    """A worker's settings with the profile's fields as engine arguments, on a virtual clock."""
    parsed = Settings.from_env({"INGEST_ENGINE": "simulated", "INGEST_MODEL": MODEL, **settings})
    return parsed.model_copy(update={"engine_args": {**profile.model_dump(), "time_scale": 0.0}})


def run_baseline(profile: Profile, settings: Mapping[str, str], requests: Iterator[IngestRequest]) -> Baseline:
    """Runs documents through one engine, in their order, each as soon as the limits admit it."""
    everything = _Everything(worker_settings(profile, settings), requests)
    seconds, num_tokens, ttfts_ms = 0.0, 0, []
    while everything.fill():
        report = everything.step()
        seconds += report.seconds
        num_tokens += report.num_prefilled_tokens + report.num_output_tokens
        ttfts_ms += [first.ttft_ms for first in report.first_tokens]
    return Baseline(
        num_documents=everything.num_started,
        tokens_per_s=num_tokens / seconds,
        ttft_p95_ms=percentile(ttfts_ms, 95),
        num_preemptions=everything.engine.num_preemptions,
    )


class _Everything:
    """An engine, its controller, and all documents at hand."""

    def __init__(self, settings: Settings, requests: Iterator[IngestRequest]) -> None:
        self.engine = SimulatedEngine.from_settings(settings)
        self.num_started = 0
        self._settings = settings
        self._controller = drain_controller(settings, self.engine, self.engine.rates)
        self._lengths = ExpectedOutput()
        self._requests = enumerate(requests)
        self._next: tuple[str, Ready] | None = None
        # Prompt id -> its task, and what is reserved for it.
        self._running: dict[str, tuple[str, Ready]] = {}
        self._num_blocks = self._kv_tokens = 0

    def fill(self) -> bool:
        """Starts what the limits admit; whether anything is left outside."""
        while True:
            if self._next is None:
                found = next(islice(self._requests, 1), None)
                if found is None:
                    return False
                self._next = self._ready(*found)
            task, ready = self._next
            if not self._admits(ready):
                return True
            self.engine.add_request(ready.prompt)
            self._running[ready.prompt_id] = (task, ready)
            self._num_blocks += ready.num_blocks
            self._kv_tokens += ready.kv_tokens
            self.num_started += 1
            self._next = None

    def _ready(self, number: int, request: IngestRequest) -> tuple[str, Ready]:
        task, cache = task_id(request), self.engine.kv_cache
        prompt = build_prompt(request, str(number), self.engine, "refuse")
        num_tokens = len(prompt.token_ids) + self._lengths.reserve(task, request.sampling.max_tokens)
        return task, Ready(
            prompt=prompt,
            num_blocks=cache.blocks_for(num_tokens, self.engine.card.max_num_batched_tokens or num_tokens),
            expected_output=0.0,
            kv_tokens=math.ceil(num_tokens / cache.block_size) * cache.block_size,
        )

    def _admits(self, ready: Ready) -> bool:
        limit = self._controller.bounds.max_kv_tokens
        if self._running and limit and self._kv_tokens + ready.kv_tokens > limit:
            return False
        load = EngineLoad(
            num_seqs=len(self._running), num_blocks=self._num_blocks, waiting_tokens=self.engine.num_waiting_tokens
        )
        return self._controller.start_gate(load, len(ready.prompt.token_ids), ready.num_blocks) == "open"

    def step(self):
        """One engine step, as the controller and the lengths hear of it."""
        for done in self.engine.step():
            task, ready = self._running.pop(done.prompt_id)
            self._num_blocks -= ready.num_blocks
            self._kv_tokens -= ready.kv_tokens
            self._lengths.observe(task, len(done.token_ids))
        report = self.engine.last_step
        assert report is not None
        self._controller.observe(report, limit_used=True)
        return report
