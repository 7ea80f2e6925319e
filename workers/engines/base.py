"""`Engine`: what the worker needs of an inference engine. Two implementations: vLLM and simulated.

The engine is stepped by one thread. `encode`, `encode_chat` and `counters` may be called from another one meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...common.engine_card import EngineCard
from ...common.errors import PromptRefused
from ...common.planner.plan import Plan
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


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """The KV cache that an engine really has, whatever it was asked for."""

    # Of its values, in vLLM's spelling, such as "bfloat16" or "fp8_e5m2"; several, where layers differ, by commas.
    dtype: str
    # Whether `dtype` was read from the arrays themselves; else it is what the engine's settings come down to.
    is_read: bool
    # The `kv_cache_dtype` that was asked for; "auto": the model's, or what its checkpoint says.
    asked: str
    num_blocks: int
    # Tokens of one block, in one layer.
    block_size: int
    # Tokens that fit at once, as the engine counts them: for sequences of max_model_len, layers with a sliding window
    # counted as such.
    num_tokens: int
    # Whether prompts that begin alike share their blocks.
    prefix_caching: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """What an engine has counted since it was built, and how full it is now."""

    # Sequences that lost their KV blocks to others and are computed again.
    num_preemptions: int = 0
    # Prompt tokens found in the prefix cache.
    prefix_cache_hits: int = 0
    # Speculative tokens proposed, and accepted.
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # Graphs compiled or loaded from the compiler's cache; None where the engine's process can't be asked.
    num_compilations: int | None = None
    # Share of the KV blocks in use, 0 to 1.
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast an engine is, all of its sequences together; the beginning of what a controller knows of it."""

    # Prompt tokens computed in a second, none from the prefix cache.
    prefill_tokens_per_s: float
    # Output tokens in a second while `decode_num_seqs` sequences of short context decode together.
    decode_tokens_per_s: float
    decode_num_seqs: int


class Engine(Protocol):
    """An inference engine that is fed continuously or in waves."""

    @property
    def card(self) -> EngineCard:
        """What this engine is."""

    @property
    def kv_cache(self) -> KvCache:
        """Its KV cache, as it is."""

    @property
    def rates(self) -> Rates | None:
        """Its speed where that is known without trying; None: measure it (warmup.py does)."""

    @property
    def plan(self) -> Plan | None:
        """What was planned for it before it was built; None where model or machine are not known to the planner."""

    def counters(self) -> EngineCounters:
        """What it has counted so far. May be called from any thread, also during a step."""

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
