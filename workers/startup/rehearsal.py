"""`Rehearsal`: runs prompts that are no document's, before a worker takes any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from ...common.errors import EngineError
from ..engines.base import Completion, Engine, Prompt


class Rehearsal:
    """Runs prompts on an idle engine. However a run ends, no prompt of it stays behind."""

    def __init__(
        self, engine: Engine, before_step: Callable[[], None], after_run: Callable[[], None] = lambda: None
    ) -> None:
        """Args:
        before_step: called before each step; what it raises ends the run.
        after_run: called when a run has ended, in whatever way.
        """
        self.engine = engine
        self._before_step = before_step
        self._after_run = after_run

    def run(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Completions, in the order in which they ended.

        Raises:
            PromptRefused: the engine doesn't take one of the prompts.
            EngineError: it failed one of them.
        """
        completions: list[Completion] = []
        try:
            for prompt in prompts:
                self.engine.add_request(prompt)
            while self.engine.has_unfinished():
                self._before_step()
                completions += self.engine.step()
        except BaseException:  # a signal's, too
            with suppress(Exception):
                self.engine.abort([prompt.prompt_id for prompt in prompts])
            raise
        finally:
            self._after_run()
        for completion in completions:
            if completion.finish_reason == "error":
                raise EngineError(completion.error or f"the engine failed the prompt {completion.prompt_id!r}")
        return completions
