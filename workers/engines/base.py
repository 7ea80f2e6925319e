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
    # Whether prompts that begin alike share their blocks; `blocks_for` then says what a sequence holds at most.
    prefix_caching: bool
    # Of each group of layers that has blocks of its own (all from one pool): tokens that it looks back on; None: all.
    groups: tuple[int | None, ...] = (None,)
    # Tokens of one block of each group; empty: `block_size`, in all of them.
    group_block_sizes: tuple[int, ...] = ()
    # Steps that may be under way at once: a window is freed behind those that are settled. vLLM's async scheduling: 2.
    max_concurrent_steps: int = 1
    # Slots that a sequence takes beyond its tokens, for speculative ones.
    num_lookahead_tokens: int = 0
    # Blocks that no sequence gets: vLLM's null block, which stands for what a window has left behind.
    num_null_blocks: int = 0

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can hold."""
        return max(0, self.num_blocks - self.num_null_blocks)

    def blocks_for(self, num_tokens: int, max_num_batched_tokens: int) -> int:
        """Blocks that a sequence holds at most while it grows to so many tokens, over all groups.

        Sequences whose blocks add up to no more than `num_usable_blocks` never preempt one another. A layer with a
        window keeps window - 1 tokens and those of the steps under way, which begin anywhere in a block; the tokens of
        a step are the whole budget's at most, though several sequences share it.

        Args:
            num_tokens: prompt and output.
            max_num_batched_tokens: the engine's, which is what one step computes of one sequence at most.

        Source: vllm 0.32.0, v1/core/single_type_kv_cache_manager.py get_num_blocks_to_allocate and
        remove_skipped_blocks, v1/kv_cache_interface.py SlidingWindowSpec.max_admission_blocks_per_request.
        """
        in_flight = max_num_batched_tokens * self.max_concurrent_steps
        sizes = self.group_block_sizes or (self.block_size,) * len(self.groups)
        num_slots = num_tokens + self.num_lookahead_tokens
        num_blocks = 0
        for window, size in zip(self.groups, sizes, strict=True):
            whole = -(-num_slots // size)
            if window is not None:
                held = window - 1 + in_flight + self.num_lookahead_tokens
                whole = min(whole, -(-held // size) + 1)
            num_blocks += whole
        return num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """A prompt that got its first output token, and what it had to wait for."""

    prompt_id: str
    # Milliseconds from add_request, of the engine's own clock; as in its completion.
    ttft_ms: float
    num_prompt_tokens: int
    # Prompt tokens in the engine without a first token when this prompt was added, its own not counted. Tokens of a
    # prompt count in whole until its first one, however much of it is computed.
    num_tokens_ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did."""

    # Of the engine's own clock (simulated, where the engine is), since the step before if there was work all the time.
    seconds: float
    # Prompt tokens of prompts without a first token, before the step.
    num_waiting_tokens: int
    # Prompt tokens of the prompts that got their first token in this step, but for those from the prefix cache. Tokens
    # of a prompt count in the step that ends its prefill, so that over many steps they are what was computed.
    num_prefilled_tokens: int
    # Output tokens of all sequences.
    num_output_tokens: int
    # Sequences that lost their KV blocks, and are computed again.
    num_preemptions: int
    first_tokens: tuple[FirstToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """What an engine has counted since it was built, and how full it is now."""

    # Sequences that lost their KV blocks to others and are computed again.
    num_preemptions: int = 0
    # Prompt tokens looked up in the prefix cache, and found there.
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    # Speculative tokens proposed, and accepted.
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # Graphs compiled or loaded from the compiler's cache; None where the engine's process can't be asked.
    num_compilations: int | None = None
    # Share of the KV blocks in use, 0 to 1.
    kv_usage: float = 0.0

    def prefix_hit_rate(self, before: EngineCounters) -> float | None:
        """Since then: share of the prompt tokens that were found in the prefix cache; None: none was looked up."""
        return _share(
            self.prefix_cache_hits - before.prefix_cache_hits, self.prefix_cache_queries - before.prefix_cache_queries
        )

    def draft_acceptance(self, before: EngineCounters) -> float | None:
        """Since then: share of the speculative tokens that were accepted; None: none was proposed."""
        return _share(
            self.num_accepted_tokens - before.num_accepted_tokens, self.num_draft_tokens - before.num_draft_tokens
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


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

    @property
    def last_step(self) -> StepReport | None:
        """What the last `step` did; None before the first one. A step that raises or has nothing to do changes nothing.

        Steps within `generate` are not reported.
        """

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of prompts in the engine that have no first token yet."""

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
