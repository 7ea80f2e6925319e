"""`BatchWorker` as it is, with a simulated engine on a scaled clock that writes down its steps."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ingestq.common.errors import PromptRefused
from ingestq.workers import BatchWorker
from ingestq.workers.engines.base import Completion, Prompt, StepReport
from ingestq.workers.engines.simulated_engine import SimulatedEngine

from .steps import First, Step, StepWriter

# The folder to write to; of the bench, not of ingestq.
FOLDER = "BENCH_DRAIN_FOLDER"


class PacedEngine:
    """Takes a scaled part of the time that each simulated step takes, all in all exactly.

    What is made up for in the following steps, because a real engine has none of it: sleeps that overrun, and the
    CPU that the simulation takes, which writes a prompt's output when it is added. What else passes between two
    steps while prompts are in the engine is the step loop's own work, a fraction of a millisecond whatever the
    step; it counts as the time that it took, not `1 / time_scale` times that. While the engine has nothing to do it
    waits for the queue, and nothing is made up for.

    Attributes:
        debt: seconds that are to be made up for.
    """

    def __init__(self, engine: SimulatedEngine, time_scale: float) -> None:
        self.debt = 0.0
        self._engine = engine
        self._time_scale = time_scale
        self._writer: StepWriter | None = None
        # Of the prompts in the engine.
        self._prompt_ids: set[str] = set()
        # When the last step ended, if it left something to do, and the seconds that new prompts took since.
        self._left_at: float | None = None
        self._adding = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def begin(self, writer: StepWriter) -> None:
        """From now on steps are written down: the warm-up's are no document's."""
        self._writer = writer
        self.debt = 0.0

    def add_request(self, prompt: Prompt) -> None:
        start = time.monotonic()
        self._engine.add_request(prompt)
        self._adding += time.monotonic() - start
        self._prompt_ids.add(prompt.prompt_id)

    def abort(self, prompt_ids: Sequence[str]) -> None:
        self._engine.abort(prompt_ids)
        self._prompt_ids.difference_update(prompt_ids)

    def step(self) -> list[Completion]:
        start, num_seqs = time.monotonic(), len(self._prompt_ids)
        if not self._engine.has_unfinished():
            return []
        if self._left_at is not None:
            self.debt += self._adding + (start - self._left_at - self._adding) * (1 - self._time_scale)
        self._adding = 0.0
        completions = self._engine.step()
        report = self._engine.last_step
        assert report is not None
        due = start + report.seconds * self._time_scale - self.debt
        time.sleep(max(0.0, due - time.monotonic()))
        end = time.monotonic()
        self.debt = end - due
        self._left_at = end if self._engine.has_unfinished() else None
        if self._writer:
            self._write(self._writer, report, start, end, num_seqs)
        self._prompt_ids.difference_update(done.prompt_id for done in completions)
        return completions

    def _write(self, writer: StepWriter, report: StepReport, start: float, end: float, num_seqs: int) -> None:
        step = Step(
            start=start,
            end=end,
            seconds=report.seconds,
            kv_usage=self._engine.counters().kv_usage,
            num_prefilled_tokens=report.num_prefilled_tokens,
            num_output_tokens=report.num_output_tokens,
            num_waiting_tokens=report.num_waiting_tokens,
            num_seqs=num_seqs,
            num_preemptions=report.num_preemptions,
        )
        firsts = [
            First(
                at=end,
                ttft_ms=first.ttft_ms,
                num_prompt_tokens=first.num_prompt_tokens,
                num_tokens_ahead=first.num_tokens_ahead,
            )
            for first in report.first_tokens
        ]
        writer.write(step, firsts)

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """As the engine's own, by the steps above."""
        completions: dict[str, Completion] = {}
        for prompt in prompts:
            try:
                self.add_request(prompt)
            except PromptRefused as error:
                completions[prompt.prompt_id] = Completion.refused(prompt, error)
        while self._engine.has_unfinished():
            completions.update((done.prompt_id, done) for done in self.step())
        return [completions[prompt.prompt_id] for prompt in prompts]


class PacedWorker(BatchWorker):
    """INGEST_ENGINE_TIME_SCALE is the clock's scale, kept by PacedEngine."""

    def load_engine(self) -> PacedEngine:
        args = dict(self._settings.engine_args)
        scale = float(args.pop("time_scale", 1.0))
        settings = self._settings.model_copy(update={"engine_args": {**args, "time_scale": 0.0}})
        return PacedEngine(SimulatedEngine.from_settings(settings), scale)

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        super().bootstrap(*args, **kwargs)
        assert isinstance(self._engine, PacedEngine)
        self._engine.begin(StepWriter(Path(os.environ[FOLDER]), self.name))


class UncontrolledWorker(PacedWorker):
    """Starts whatever is leased at once, as a worker with nothing but a fixed cap does."""

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        super().bootstrap(*args, **kwargs)
        with self._ready_courier().controller() as controller:
            controller.start_gate = lambda *_: "open"
