"""`measure_rates`: how fast an engine prefills and decodes, found out with a few steps before there are documents."""

from __future__ import annotations

from random import Random

from ...common.errors import EngineError, PromptRefused
from ...common.schema import Sampling
from ..engines.base import Prompt, Rates
from .rehearsal import Rehearsal

# Prompt tokens of the first trial of prefill, and how many times as many the next one has: a machine that needs seconds
# for thousands of tokens (one CPU core: 280 a second, SmolLM2-135M) is found out with few.
_FIRST_TOKENS, _GROWTH = 64, 4

# Seconds that a trial may be expected to take: the next one of prefill, or the prefill before decoding.
_AFFORDABLE = 0.5

# Tokens of a step, where the engine doesn't say.
_STEP_TOKENS = 2048

# Prompt tokens of one sequence: in prefill as of a document, in decode as few as possible.
_PREFILL_LENGTH, _DECODE_LENGTH = 1024, 8

# Output tokens of each sequence after its first one.
_DECODE_TOKENS = 8

# Any tokens will do: those of letters and digits, and of what the tokenizer puts before them, in random order, so that
# none of them comes from a prefix cache.
_ALPHABET = "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9"


def measure_rates(rehearsal: Rehearsal, random: Random | None = None) -> Rates | None:
    """The rates of an idle engine; None if it fails such prompts.

    Prefill: tokens / seconds of the fastest of a few trials, each with four times the tokens of the one before, up to
    those of one step or half a second. Decode: output tokens / seconds from the last first token to the last token, 8
    tokens a sequence, with as many sequences as the engine runs (or as its KV cache holds, or as prefill in one step or
    in half a second). Their context is short: reading the KV cache of long ones takes time on top. A trial that takes
    long is run twice, for the first may have paid for what is compiled or allocated late. All times are the engine's
    own, from its completions.
    """
    card = rehearsal.engine.card
    max_num_tokens = card.max_num_batched_tokens or _STEP_TOKENS
    trials = _Trials(rehearsal, random or Random())
    try:
        prefill = trials.prefill(max_num_tokens)
        num_tokens = min(int(prefill * _AFFORDABLE), max_num_tokens)
        # More than fit would take turns.
        room = rehearsal.engine.kv_cache.num_tokens // trials.decode_tokens
        num_seqs = max(1, min(card.max_num_seqs, num_tokens // _DECODE_LENGTH, room))
        decode = max(trials.decode(num_seqs) for _ in range(2))
    except (PromptRefused, EngineError):
        return None
    return Rates(prefill_tokens_per_s=prefill, decode_tokens_per_s=decode, decode_num_seqs=num_seqs)


class _Trials:
    def __init__(self, rehearsal: Rehearsal, random: Random) -> None:
        self._rehearsal = rehearsal
        self._random = random
        self._alphabet = rehearsal.engine.encode(_ALPHABET)
        self._max_model_len = rehearsal.engine.card.max_model_len

    @property
    def decode_tokens(self) -> int:
        """Tokens of the blocks that a sequence takes in decode."""
        block_size = self._rehearsal.engine.kv_cache.block_size
        return -(-(_DECODE_LENGTH + 1 + _DECODE_TOKENS) // block_size) * block_size

    def prefill(self, max_num_tokens: int) -> float:
        """Tokens a second."""
        best, num_tokens = 0.0, min(_FIRST_TOKENS, max_num_tokens)
        while True:
            seconds = self._prefill_seconds(num_tokens)
            if seconds * _GROWTH > _AFFORDABLE:
                seconds = min(seconds, self._prefill_seconds(num_tokens))
            best = max(best, num_tokens / max(seconds, 1e-6))
            if seconds * _GROWTH > _AFFORDABLE or num_tokens == max_num_tokens:
                return best
            num_tokens = min(num_tokens * _GROWTH, max_num_tokens)

    def _prefill_seconds(self, num_tokens: int) -> float:
        length = min(_PREFILL_LENGTH, self._max_model_len - 1)
        num_full, rest = divmod(num_tokens, length)
        lengths = [length] * num_full + [rest] * (rest > 0)
        done = self._rehearsal.run([self._prompt(i, length, 1) for i, length in enumerate(lengths)])
        return max(completion.ttft_ms for completion in done) / 1e3

    def decode(self, num_seqs: int) -> float:
        """Tokens a second."""
        num_output = max(2, min(1 + _DECODE_TOKENS, self._max_model_len - 1))
        length = max(1, min(_DECODE_LENGTH, self._max_model_len - num_output))
        done = self._rehearsal.run([self._prompt(i, length, num_output) for i in range(num_seqs)])
        num_tokens = sum(len(completion.token_ids) - 1 for completion in done)
        ms = max(completion.run_ms for completion in done) - max(completion.ttft_ms for completion in done)
        return num_tokens * 1e3 / max(ms, 1e-3)

    def _prompt(self, number: int, length: int, num_output: int) -> Prompt:
        return Prompt(
            prompt_id=f"trial-{number}",
            token_ids=self._random.choices(self._alphabet, k=length),
            sampling=Sampling(max_tokens=num_output, ignore_eos=True),
        )
