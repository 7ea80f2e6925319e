"""`Meter`: which prompts of an engine wait for their first token, and the report of each step; both engines use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .base import FirstToken, StepReport


class _Waiting(NamedTuple):
    num_prompt_tokens: int
    num_tokens_ahead: int


class Meter:
    """Arithmetic on what the engine tells it, between steps and at the end of each; constant time for each prompt.

    Attributes:
        num_waiting_tokens: prompt tokens of prompts without a first token.
        last_step: the latest report; None before the first step.
    """

    def __init__(self) -> None:
        self.num_waiting_tokens = 0
        self.last_step: StepReport | None = None
        # In order of their adding, which is the order in which an engine prefills them.
        self._waiting: dict[str, _Waiting] = {}
        # Of the step that is being told.
        self._first_tokens: list[FirstToken] = []

    def __iter__(self) -> Iterator[str]:
        """Prompts without a first token, the earliest first."""
        return iter(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, prompt_id: str, num_prompt_tokens: int) -> None:
        """The engine has taken a prompt."""
        self._waiting[prompt_id] = _Waiting(num_prompt_tokens, self.num_waiting_tokens)
        self.num_waiting_tokens += num_prompt_tokens

    def first_token(self, prompt_id: str, ttft_ms: float) -> None:
        """A prompt got its first token in the step that `stepped` will report; unknown ones are ignored."""
        waiting = self._waiting.pop(prompt_id, None)
        if waiting is None:
            return
        self.num_waiting_tokens -= waiting.num_prompt_tokens
        self._first_tokens.append(
            FirstToken(
                prompt_id=prompt_id,
                ttft_ms=ttft_ms,
                num_prompt_tokens=waiting.num_prompt_tokens,
                num_tokens_ahead=waiting.num_tokens_ahead,
            )
        )

    def drop(self, prompt_ids: Iterable[str]) -> None:
        """Prompts are no longer in the engine; those that have their first token, or were never there, are ignored."""
        for prompt_id in prompt_ids:
            if waiting := self._waiting.pop(prompt_id, None):
                self.num_waiting_tokens -= waiting.num_prompt_tokens

    def stepped(
        self, *, seconds: float, num_output_tokens: int, num_preemptions: int, num_cached_tokens: int = 0
    ) -> StepReport:
        """Ends a step, with the first tokens told since the last one.

        Args:
            num_cached_tokens: of the prompts that got their first token, those from the prefix cache.
        """
        first_tokens, self._first_tokens = tuple(self._first_tokens), []
        num_tokens = sum(first.num_prompt_tokens for first in first_tokens)
        self.last_step = StepReport(
            seconds=seconds,
            num_waiting_tokens=self.num_waiting_tokens + num_tokens,
            num_prefilled_tokens=max(0, num_tokens - num_cached_tokens),
            num_output_tokens=num_output_tokens,
            num_preemptions=num_preemptions,
            first_tokens=first_tokens,
        )
        return self.last_step
