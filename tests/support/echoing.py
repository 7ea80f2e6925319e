"""A worker whose engine quotes documents in its errors: `rq worker -w support.echoing.EchoingWorker`."""

from __future__ import annotations

from dataclasses import replace

from ingestq.workers.batch_worker import BatchWorker
from ingestq.workers.engines.base import Completion, Prompt
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from support.faulty import Panic

ENGINE_ERRS = "the engine quotes this document"
ENGINE_DIES = "the engine dies of this document"
TOKENIZER_PANICS = "the tokenizer panics at this document"


class EchoingEngine(SimulatedEngine):
    """The simulated engine, with the most that a text can do to an error's message."""

    _quoted: dict[str, str]
    _texts: dict[tuple[int, ...], str]

    def encode(self, text: str) -> list[int]:
        if TOKENIZER_PANICS in text:
            raise Panic(text)
        tokens = super().encode(text)
        self._texts[tuple(tokens)] = text
        return tokens

    def add_request(self, prompt: Prompt) -> None:
        text = self._texts.pop(tuple(prompt.token_ids))
        if ENGINE_ERRS in text or ENGINE_DIES in text:
            self._quoted[prompt.prompt_id] = text
        super().add_request(prompt)

    def step(self) -> list[Completion]:
        for text in self._quoted.values():
            if ENGINE_DIES in text:
                raise RuntimeError(text)
        return [self._quoting(completion) for completion in super().step()]

    def _quoting(self, completion: Completion) -> Completion:
        text = self._quoted.pop(completion.prompt_id, None)
        return replace(completion, finish_reason="error", error=text) if text else completion


class EchoingWorker(BatchWorker):
    def load_engine(self) -> EchoingEngine:
        engine = EchoingEngine.from_settings(self._settings)
        engine._quoted, engine._texts = {}, {}
        return engine
