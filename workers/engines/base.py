"""`Engine`: what the worker needs of an inference engine. Two implementations: vLLM and simulated.

The engine is stepped by one thread. `encode` and `encode_chat` may be called from another thread meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...common.engine_card import EngineCard
from ...common.errors import PromptRefused
from ...common.schema import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One engine request. A document is one prompt or, when it is split, several."""

    # The caller's name of it, unique among the prompts in the engine.
    prompt_id: str
    token_ids: Sequence[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How one prompt ended."""

    prompt_id: str
    text: str
    # Output tokens, shape [num_output_tokens].
    token_ids: Sequence[int]
    # "stop", "length", or "error" with `error` set: this prompt alone failed in the engine.
    finish_reason: Literal["stop", "length", "error"]
    num_prompt_tokens: int
    # Prompt tokens taken from the prefix cache.
    num_cached_tokens: int
    # Milliseconds from add_request to the first output token, and to the last.
    ttft_ms: float
    run_ms: float
    error: str | None = None

    @classmethod
    def refused(cls, prompt: Prompt, error: PromptRefused) -> Completion:
        """How a prompt ends that the engine never took."""
        return cls(
            prompt_id=prompt.prompt_id,
            text="",
            token_ids=(),
            finish_reason="error",
            num_prompt_tokens=len(prompt.token_ids),
            num_cached_tokens=0,
            ttft_ms=0.0,
            run_ms=0.0,
            error=str(error),
        )


class Engine(Protocol):
    """An inference engine that is fed continuously or in waves."""

    @property
    def card(self) -> EngineCard:
        """What this engine is."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens (such as BOS)."""

    def encode_chat(self, system: str | None, user: str) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's turn.

        Raises:
            PromptRefused: the model has no chat template.
        """

    def add_request(self, prompt: Prompt) -> None:
        """Hands one prompt to the engine; returns at once.

        Raises:
            PromptRefused: the engine refuses this prompt or its sampling; nothing of it stays behind.
        """

    def abort(self, prompt_ids: Sequence[str]) -> None:
        """Drops prompts wherever they are; unknown ids are ignored. An aborted prompt has no completion."""

    def has_unfinished(self) -> bool:
        """Whether a step would do something."""

    def step(self) -> list[Completion]:
        """Runs one engine step; returns the prompts that finished in it."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Runs prompts to their end in one call (a wave); completions in the order of `prompts`.

        A prompt that the engine refuses fails alone, with finish_reason "error".
        """

    def close(self) -> None:
        """Releases memory and ends the engine's processes."""
