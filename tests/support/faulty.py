"""A worker whose engine fails where a document's text says so: `rq worker -w support.faulty.FaultyWorker`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

from ingestq.workers.batch_worker import BatchWorker
from ingestq.workers.engines.base import Completion, Prompt
from ingestq.workers.engines.simulated_engine import SimulatedEngine

STEP_RAISES = "the engine raises"
DOCUMENT_ERRS = "the engine fails this document"
TOKENIZER_PANICS = "the tokenizer panics"

# Seconds that loading takes, from the environment.
LOAD_SECONDS = "FAULTY_LOAD_SECONDS"


class Panic(BaseException):
    """As Rust's panics reach Python: no Exception."""


class FaultyEngine(SimulatedEngine):
    """The simulated engine with faults on demand."""

    _raises = False

    def encode(self, text: str) -> list[int]:
        if TOKENIZER_PANICS in text:
            raise Panic
        self._raises |= STEP_RAISES in text
        tokens = super().encode(text)
        if DOCUMENT_ERRS in text:
            self._erring.add(tuple(tokens))
        return tokens

    def step(self) -> list[Completion]:
        if self._raises:
            raise RuntimeError("injected: out of memory at a step")
        return [self._failed(completion) for completion in super().step()]

    def add_request(self, prompt: Prompt) -> None:
        if tuple(prompt.token_ids) in self._erring:
            self._erring_ids.add(prompt.prompt_id)
        super().add_request(prompt)

    def _failed(self, completion: Completion) -> Completion:
        if completion.prompt_id in self._erring_ids:
            return replace(completion, finish_reason="error", error="injected: this document failed")
        return completion

    _erring: set[Sequence[int]]
    _erring_ids: set[str]


class FaultyWorker(BatchWorker):
    def load_engine(self) -> FaultyEngine:
        print("loading the engine", flush=True)
        time.sleep(float(os.environ.get(LOAD_SECONDS, "0")))
        engine = FaultyEngine.from_settings(self._settings)
        engine._erring, engine._erring_ids = set(), set()
        return engine
