"""`SimulatedEngine`: vLLM's scheduling without a model, for scale, faults and speed on a laptop.

It schedules as vLLM does (chunked prefill under a token budget, one token for each running sequence and step, KV
blocks allocated as sequences grow, preemption by recomputation) and takes its times from a `Profile`. Nothing it
reports is a measurement of hardware: texts begin with the word "simulated", cards say "simulated".

A step takes time for the sequences that begin or end in it, not for those that merely go on, so that a laptop can
step fleets of engines: decoding sequences all compute one token a step, so their state follows from the number of steps
and is written down only when one of them leaves (`_Decoding`).
"""

from __future__ import annotations

import math
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...common.engine_card import EngineCard
from ...common.errors import PromptRefused, SettingsError
from ...common.schema import Sampling
from ...common.settings import Settings, nearest
from .base import Completion, EngineCounters, KvCache, Prompt, Rates, StepReport
from .meter import Meter

_ENGINE = "simulated"

# A token of the simulated tokenizer is four bytes of UTF-8 (about what real vocabularies reach on English text), its
# id those bytes as a little-endian number; the last one is padded with zero bytes.
_TOKEN_BYTES = 4

_WEYL = 0x9E3779B9  # odd, so that its multiples modulo 2**32 don't repeat: 2**32 divided by the golden ratio


class Profile(BaseModel):
    """What is simulated; the names that vLLM has are vLLM's. `INGEST_ENGINE_<NAME>` overrides a field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_model_len: int = Field(default=32768, ge=2)
    max_num_seqs: int = Field(default=256, ge=1)
    # Tokens that one step computes at most.
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    # KV cache: 900,000 tokens.
    num_kv_blocks: int = Field(default=56250, ge=1)
    # Tokens of one block.
    block_size: int = Field(default=16, ge=1)
    # Milliseconds of a step: fixed, for each sequence in it, for each prefill token. Assumed, not measured, like the
    # KV cache and the output lengths: those of the toy model by which continuous feeding was chosen over waves.
    step_ms: float = Field(default=20.0, ge=0)
    step_ms_per_seq: float = Field(default=0.04, ge=0)
    step_ms_per_prefill_token: float = Field(default=1 / 40, ge=0)
    # The same for each token of KV cache that the decoding sequences of a step read, which is all of their contexts.
    step_ms_per_kv_token: float = Field(default=0.0, ge=0)
    # Output tokens before the simulated model stops by itself: lognormal, its median and the logarithm's deviation.
    output_tokens_median: float = Field(default=270.0, gt=0)
    output_tokens_sigma: float = Field(default=1.0, ge=0, le=10)
    # Another seed, other outputs and output lengths for the same prompts.
    seed: int = Field(default=0, ge=0, lt=2**32)
    # Real seconds for each simulated second. 1: steps sleep as long as they would take. 0: they take no time, for
    # measuring everything else.
    time_scale: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_model_len > self.num_kv_blocks * self.block_size:  # vLLM refuses to start, too
            raise ValueError(
                f"max_model_len={self.max_model_len} doesn't fit num_kv_blocks * block_size = "
                f"{self.num_kv_blocks * self.block_size} tokens"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}"
            )
        return self

    @classmethod
    def from_settings(cls, settings: Settings) -> Profile:
        """The profile file of the settings, with their engine arguments laid over it.

        Raises:
            SettingsError: the file can't be read, or a field is unknown or out of bounds.
        """
        values: dict[str, Any] = {}
        path = settings.simulated_profile
        if path is not None:
            try:
                values = orjson.loads(Path(path).read_bytes())
            except (OSError, orjson.JSONDecodeError) as error:
                raise SettingsError(f"INGEST_SIMULATED_PROFILE={path!r}: {error}") from None
            if not isinstance(values, dict):
                raise SettingsError(f"INGEST_SIMULATED_PROFILE={path!r}: a JSON object of profile fields is expected")
        try:
            return cls.model_validate({**values, **settings.engine_args})
        except ValidationError as error:
            raise SettingsError(f"simulated engine: {'; '.join(map(_describe, error.errors()))}") from None

    def step_time_ms(self, num_seqs: int, num_prefill_tokens: int, num_kv_tokens: int = 0) -> float:
        """Milliseconds of one step.

        Args:
            num_kv_tokens: tokens of the contexts of all sequences that decode in it.
        """
        return (
            self.step_ms
            + self.step_ms_per_seq * num_seqs
            + self.step_ms_per_prefill_token * num_prefill_tokens
            + self.step_ms_per_kv_token * num_kv_tokens
        )


def _describe(error: Any) -> str:
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{field} is no field of the profile; {nearest(field, list(Profile.model_fields))}"
    return f"{field}={error['input']!r}: {error['msg']}" if field else str(error["msg"])


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    """A prompt in the engine. KV is kept for all tokens but the newest, as in vLLM.

    While it decodes, its numbers are what they were when it began to; `_Decoding` knows what they are.
    """

    prompt: Prompt
    num_prompt_tokens: int
    output_ids: Sequence[int]
    text: str
    finish_reason: Literal["stop", "length"]
    added_ms: float
    first_token_ms: float = 0.0
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    num_blocks: int = 0
    # Place in the order of scheduling, among all that were ever scheduled.
    number: int = 0
    # While it decodes: computed tokens less the decode steps of the engine, and the decode step of its last token.
    offset: int = 0
    ends_at: int = 0

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_prompt_tokens + self.num_output_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        return self.ends_at > 0


class _Decoding:
    """The sequences that compute one token in every step, as sums.

    Attributes:
        num_seqs: how many.
        num_steps: decode steps so far.
    """

    def __init__(self, block_size: int) -> None:
        self.num_seqs = 0
        self.num_steps = 0
        self._block_size = block_size
        # Sequences by offset modulo block size: those of one number fill their blocks in the same step.
        self._num_seqs_by_phase = [0] * block_size
        self._sum_offsets = 0
        # Decode step -> sequences that were to end in it when they came.
        self._ending: dict[int, list[_Sequence]] = {}

    @property
    def num_kv_tokens(self) -> int:
        """Computed tokens of them all."""
        return self._sum_offsets + self.num_seqs * self.num_steps

    @property
    def num_blocks_to_allocate(self) -> int:
        """Blocks that the next step takes: one for each sequence whose blocks are full."""
        return self._num_seqs_by_phase[-self.num_steps % self._block_size]

    def add(self, seq: _Sequence) -> None:
        """A sequence that has one token to compute, whose sampling gives the next."""
        seq.offset = seq.num_computed_tokens - self.num_steps
        seq.ends_at = self.num_steps + len(seq.output_ids) - seq.num_output_tokens
        self._count(seq, 1)
        self._ending.setdefault(seq.ends_at, []).append(seq)

    def remove(self, seq: _Sequence) -> None:
        """Takes a sequence out and brings its numbers up to date."""
        computed = seq.offset + self.num_steps
        seq.num_output_tokens += computed - seq.num_computed_tokens
        seq.num_computed_tokens = computed
        seq.num_blocks = -(-computed // self._block_size)
        seq.ends_at = 0  # what is left in _ending is known by this
        self._count(seq, -1)

    def _count(self, seq: _Sequence, change: int) -> None:
        self.num_seqs += change
        self._sum_offsets += change * seq.offset
        self._num_seqs_by_phase[seq.offset % self._block_size] += change

    def step(self) -> list[_Sequence]:
        """One token for each; takes out those that end with it, in the order of their scheduling."""
        self.num_steps += 1
        ended = [seq for seq in self._ending.pop(self.num_steps, ()) if seq.ends_at == self.num_steps]
        for seq in ended:
            self.remove(seq)
        return sorted(ended, key=lambda seq: seq.number)


class SimulatedEngine:
    """vLLM's scheduler over a profile's clock.

    `ttft_ms` and `run_ms` are in simulated time: the sum of step times since `add_request`, whatever `time_scale`.

    Attributes:
        num_steps: steps that did something.
        num_preemptions: how often a sequence lost its KV blocks to an earlier one.
    """

    def __init__(self, profile: Profile, card: EngineCard) -> None:
        self.num_steps = 0
        self.num_preemptions = 0
        self._profile = profile
        self._card = card
        self._waiting: deque[_Sequence] = deque()
        # In order of scheduling: the last is the first to be preempted. All decode but, at most, the last, which is a
        # prompt larger than the token budget has left: nothing starts behind such a one, as the budget is used up.
        self._running: dict[_Sequence, None] = {}
        self._decoding = _Decoding(profile.block_size)
        self._num_scheduled = 0
        self._num_free_blocks = profile.num_kv_blocks
        self._now_ms = 0.0
        self._meter = Meter()

    @classmethod
    def from_settings(cls, settings: Settings) -> SimulatedEngine:
        """Raises:
        SettingsError: the profile is unreadable, or a field of it unknown or out of bounds.
        """
        profile = Profile.from_settings(settings)
        digest = blake2b(profile.model_dump_json().encode(), digest_size=8).hexdigest()
        card = EngineCard(
            model=settings.served_model,
            tokenizer_digest=f"utf8-{_TOKEN_BYTES}",
            max_token_bytes=_TOKEN_BYTES,
            max_model_len=profile.max_model_len,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            device=_ENGINE,
            engine=_ENGINE,
            engine_digest=digest,
            over_length=settings.over_length,
        )
        return cls(profile, card)

    @property
    def card(self) -> EngineCard:
        return self._card

    @property
    def kv_cache(self) -> KvCache:
        profile = self._profile
        return KvCache(
            dtype=_ENGINE,
            is_read=False,
            asked="auto",
            num_blocks=profile.num_kv_blocks,
            block_size=profile.block_size,
            num_tokens=profile.num_kv_blocks * profile.block_size,
            prefix_caching=False,
        )

    @property
    def rates(self) -> Rates:
        """By the profile: a step full of prefill, and a step in which every sequence decodes."""
        profile = self._profile
        prefill_ms = profile.step_time_ms(1, profile.max_num_batched_tokens)
        decode_ms = profile.step_time_ms(profile.max_num_seqs, 0)
        return Rates(
            prefill_tokens_per_s=_per_second(profile.max_num_batched_tokens, prefill_ms),
            decode_tokens_per_s=_per_second(profile.max_num_seqs, decode_ms),
            decode_num_seqs=profile.max_num_seqs,
        )

    @property
    def plan(self) -> None:
        """There is no model to plan for."""

    @property
    def last_step(self) -> StepReport | None:
        return self._meter.last_step

    @property
    def num_waiting_tokens(self) -> int:
        return self._meter.num_waiting_tokens

    def counters(self) -> EngineCounters:
        in_use = 1 - self._num_free_blocks / self._profile.num_kv_blocks
        return EngineCounters(num_preemptions=self.num_preemptions, num_compilations=0, kv_usage=in_use)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._num_free_blocks

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        raw += bytes(-len(raw) % _TOKEN_BYTES)
        return list(struct.unpack(f"<{len(raw) // _TOKEN_BYTES}I", raw))

    def encode_chat(self, system: str | None, user: str) -> list[int]:
        head = f"<|system|>\n{system}\n" if system is not None else ""
        return self.encode(f"{head}<|user|>\n{user}\n<|assistant|>\n")

    def add_request(self, prompt: Prompt) -> None:
        self._waiting.append(self._sequence(prompt))
        self._meter.add(prompt.prompt_id, len(prompt.token_ids))

    def abort(self, prompt_ids: Sequence[str]) -> None:
        dropped = set(prompt_ids)
        self._waiting = deque(seq for seq in self._waiting if seq.prompt.prompt_id not in dropped)
        for seq in [seq for seq in self._running if seq.prompt.prompt_id in dropped]:
            self._end(seq)
        self._meter.drop(dropped)

    def has_unfinished(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> list[Completion]:
        if not self.has_unfinished():
            return []
        num_preemptions = self.num_preemptions
        prefilling = self._schedule()
        profile, decoding = self._profile, self._decoding
        num_decoding = decoding.num_seqs
        step_ms = profile.step_time_ms(
            num_decoding + len(prefilling),
            sum(num_tokens for _, num_tokens in prefilling),
            decoding.num_kv_tokens,
        )
        if profile.time_scale:
            try:
                time.sleep(step_ms * profile.time_scale / 1e3)
            except BaseException:  # a signal's: there was no such step
                for seq, _ in reversed(prefilling):
                    self._put_back(seq)
                raise
        self.num_steps += 1
        self._now_ms += step_ms
        self._num_free_blocks -= decoding.num_blocks_to_allocate
        finished = decoding.step()
        sampled = [seq for seq, num_tokens in prefilling if self._prefill(seq, num_tokens)]
        finished += [seq for seq in sampled if seq.num_output_tokens == len(seq.output_ids)]
        for seq in finished:
            self._end(seq)
        self._meter.stepped(
            seconds=step_ms / 1e3,
            num_output_tokens=num_decoding + len(sampled),
            num_preemptions=self.num_preemptions - num_preemptions,
        )
        return [self._completion(seq) for seq in finished]

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        completions: dict[str, Completion] = {}
        for prompt in prompts:
            try:
                self.add_request(prompt)
            except PromptRefused as error:
                completions[prompt.prompt_id] = Completion.refused(prompt, error)
        before = self._meter.last_step
        try:
            while self.has_unfinished():
                completions.update((done.prompt_id, done) for done in self.step())
        except BaseException:
            self.abort([prompt.prompt_id for prompt in prompts])
            raise
        finally:
            self._meter.last_step = before
        return [completions[prompt.prompt_id] for prompt in prompts]

    def close(self) -> None:
        self.abort([seq.prompt.prompt_id for seq in (*self._running, *self._waiting)])

    # --- what vLLM's scheduler does in a step

    def _schedule(self) -> list[tuple[_Sequence, int]]:
        """Which sequences compute how many tokens in this step, besides those that decode; allocates their blocks.

        The blocks of those that decode are left free, not yet taken.
        """
        profile, decoding = self._profile, self._decoding
        scheduled: list[tuple[_Sequence, int]] = []
        preempted = False
        while self._running:
            # The sequence that isn't decoding is the last: it gets what the others leave of the budget.
            last = next(reversed(self._running))
            num_tokens = 0
            if not last.is_decoding:
                num_tokens = min(last.num_pending_tokens, profile.max_num_batched_tokens - decoding.num_seqs)
            if self._allocate(last, num_tokens):
                if num_tokens:
                    scheduled.append((last, num_tokens))
                break
            self._put_back(last)
            self.num_preemptions += 1
            preempted = True
        if preempted:
            return scheduled  # as in vLLM: nothing new starts in a step that had to take blocks away
        budget = profile.max_num_batched_tokens - decoding.num_seqs - sum(num_tokens for _, num_tokens in scheduled)
        while self._waiting and budget and len(self._running) < profile.max_num_seqs:
            seq = self._waiting[0]
            num_tokens = min(seq.num_pending_tokens, budget)
            if not self._allocate(seq, num_tokens):
                break
            self._num_scheduled += 1
            seq.number = self._num_scheduled
            self._running[self._waiting.popleft()] = None
            scheduled.append((seq, num_tokens))
            budget -= num_tokens
        return scheduled

    def _allocate(self, seq: _Sequence, num_tokens: int) -> bool:
        """Gives a sequence the blocks for its next tokens, or says that too few are free beside the decoding ones'."""
        needed = -(-(seq.num_computed_tokens + num_tokens) // self._profile.block_size) - seq.num_blocks
        needed = needed if num_tokens else 0
        if needed + self._decoding.num_blocks_to_allocate > self._num_free_blocks:
            return False
        seq.num_blocks += needed
        self._num_free_blocks -= needed
        return True

    def _put_back(self, seq: _Sequence) -> None:
        """Takes a sequence's blocks; it starts over, before all that wait, but keeps its output."""
        self._end(seq)
        seq.num_computed_tokens = 0
        self._waiting.appendleft(seq)

    def _end(self, seq: _Sequence) -> None:
        """Takes a sequence, and its blocks, from those that run."""
        if seq.is_decoding:
            self._decoding.remove(seq)
        del self._running[seq]
        self._num_free_blocks += seq.num_blocks
        seq.num_blocks = 0

    def _prefill(self, seq: _Sequence, num_tokens: int) -> bool:
        """Computes a sequence's tokens and samples one after the last; whether it did."""
        seq.num_computed_tokens += num_tokens
        sampled = not seq.num_pending_tokens
        if sampled:
            seq.num_output_tokens += 1
            if seq.num_output_tokens == 1:
                seq.first_token_ms = self._now_ms
                self._meter.first_token(seq.prompt.prompt_id, self._now_ms - seq.added_ms)
        # One token to go decodes, also where a preempted sequence's last chunk has left it.
        if 0 < seq.num_output_tokens < len(seq.output_ids) and seq.num_pending_tokens == 1:
            self._decoding.add(seq)
        return sampled

    def _completion(self, seq: _Sequence) -> Completion:
        return Completion(
            prompt_id=seq.prompt.prompt_id,
            text=seq.text,
            token_ids=seq.output_ids,
            finish_reason=seq.finish_reason,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=0,
            ttft_ms=seq.first_token_ms - seq.added_ms,
            run_ms=self._now_ms - seq.added_ms,
        )

    # --- what the model would say

    def _sequence(self, prompt: Prompt) -> _Sequence:
        """A new sequence with its output, which depends on nothing but the prompt, its sampling and the profile.

        Raises:
            PromptRefused: what vLLM refuses, too.
        """
        num_prompt_tokens, sampling = len(prompt.token_ids), prompt.sampling
        room = self._profile.max_model_len - num_prompt_tokens
        if not num_prompt_tokens:
            raise PromptRefused("the prompt is empty")
        if room < 1:
            raise PromptRefused(
                f"the prompt has {num_prompt_tokens} tokens; with one of output, max_model_len is "
                f"{self._profile.max_model_len}"
            )
        if (sampling.min_tokens or 0) > sampling.max_tokens:
            raise PromptRefused(f"min_tokens={sampling.min_tokens} is more than max_tokens={sampling.max_tokens}")
        noise = self._noise(prompt.token_ids)
        length, finish_reason = self._output_length(noise, sampling, room)
        output_ids = [(noise + _WEYL * i) & 0xFFFFFFFF for i in range(length)]
        words = _words(output_ids)
        text = "".join(words)
        if sampling.stop and (end := _first_stop(words, sampling.stop, sampling.min_tokens or 0)):
            finish_reason = "stop"
            output_ids, text = output_ids[: end[0]], text[: end[1]]
        return _Sequence(
            prompt=prompt,
            num_prompt_tokens=num_prompt_tokens,
            output_ids=output_ids,
            text=text,
            finish_reason=finish_reason,
            added_ms=self._now_ms,
        )

    def _noise(self, token_ids: Sequence[int]) -> int:
        """64 bits that depend on the prompt and the seed alone."""
        try:
            packed = array("I", token_ids)
        except (TypeError, OverflowError) as error:
            raise PromptRefused(f"a token id is outside the vocabulary of 2**32: {error}") from None
        if sys.byteorder == "big":
            packed.byteswap()
        digest = blake2b(packed.tobytes(), digest_size=8, key=self._profile.seed.to_bytes(4, "little")).digest()
        return int.from_bytes(digest, "little")

    def _output_length(self, noise: int, sampling: Sampling, room: int) -> tuple[int, Literal["stop", "length"]]:
        """Output tokens, and why not more."""
        limit = min(sampling.max_tokens, room)  # vLLM, too, cuts without a word at max_model_len
        if sampling.ignore_eos:
            return limit, "length"
        # The upper 52 bits as a number between 0 and 1, exclusively: exact in a float.
        deviation = NormalDist().inv_cdf(((noise >> 12) + 0.5) / 2**52)
        natural = self._profile.output_tokens_median * math.exp(self._profile.output_tokens_sigma * deviation)
        wanted = max(1, sampling.min_tokens or 0, round(natural))
        return (limit, "length") if wanted > limit else (wanted, "stop")


def _per_second(num_tokens: int, step_ms: float) -> float:
    """Tokens of a second; of a step that takes no time, those of one that takes a microsecond."""
    return num_tokens * 1e3 / max(step_ms, 1e-3)


def _words(output_ids: Sequence[int]) -> list[str]:
    """The text of each output token."""
    return ["simulated", *(f" {token_id:x}" for token_id in output_ids[1:])]


def _first_stop(words: Sequence[str], stops: Sequence[str], min_tokens: int) -> tuple[int, int] | None:
    """Tokens up to the first that completes a stop string, and characters before that string."""
    text = ""
    for num_tokens, word in enumerate(words, 1):
        searched = len(text)
        text += word
        if num_tokens <= min_tokens:
            continue
        for stop in stops:
            position = text.find(stop, max(0, searched - len(stop) + 1))
            if position >= 0:
                return num_tokens, position
    return None
