"""The article that the project started from, judged claim by claim.

"KV FP8 with Gemma4 26B" (Codcompass, read 2026-11) tells of google/gemma-4-26B-A4B-it on a TPU v6e-4. What it claims
stands here as constants and in its words; what is said about it is computed by the planner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from ..common.engine_names import gone
from ..common.planner import rates
from ..common.planner.hardware import machine
from ..common.planner.model_layout import load_layout
from ..common.planner.plan import EngineShape, Plan, Workload, make_plan
from ..common.sizes import byte_size
from .units import beside, bounds, duration, rounded, shown

# The machine that it speaks of.
CHIPS = "v6e-4"

# Its configuration template, as printed.
TEMPLATE: dict[str, Any] = {
    "model": "google/gemma-4-26B-A4B-it",
    "dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "max_model_len": 33280,
    "max_num_batched_tokens": 32768,
    "tensor_parallel_size": 4,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "speculative_decoding_method": "ngram",
    "num_speculative_tokens": 4,
    "gpu_memory_utilization": 0.92,
    "swap_space": 4,
    "enforce_eager": False,
    "compile_cache_max_size": 1024,
}
# "16k" is taken as 16,384 throughout, and so on; its documents' output is not told: ours is short.
_K, _OUTPUT = 1024, 256
# vLLM's own default, which the template leaves in place.
_DEFAULT_NUM_SEQS = 256


class Word(StrEnum):
    """The verdict in a word."""

    TRUE = "true"
    # Possible, but not for the reason given or not as told.
    PARTLY = "partly"
    FALSE = "false"
    # Contradicts the layout of the model or the peak of the chips.
    IMPOSSIBLE = "impossible"
    # Neither follows from anything nor contradicts it: to be measured.
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    # The article's words, shortened.
    claim: str
    word: Word
    # With the planner's numbers.
    because: str


def judge() -> list[Verdict]:
    """All verdicts, in the article's order: its table first, then its text, tiers and configuration.

    Raises:
        IngestqError: the shipped layout or machine is missing.
    """
    facts = _Facts()
    return [verdict for part in (_table, _text, _tiers, _configuration) for verdict in part(facts)]


@dataclass(frozen=True)
class _Facts:
    """The article's machine, planned at the lengths that it speaks of."""

    @cached_property
    def bf16(self) -> Plan:
        return self.plan(16 * _K, "bfloat16")

    @cached_property
    def fp8(self) -> Plan:
        return self.plan(16 * _K, "fp8")

    def plan(self, prompt_tokens: int, kv_cache_dtype: str) -> Plan:
        return make_plan(
            load_layout(TEMPLATE["model"]),
            machine(CHIPS),
            Workload(prompt_tokens=prompt_tokens, output_tokens=_OUTPUT),
            EngineShape(
                kv_cache_dtype=kv_cache_dtype,
                max_num_seqs=_DEFAULT_NUM_SEQS,
                max_model_len=TEMPLATE["max_model_len"],
                max_num_batched_tokens=TEMPLATE["max_num_batched_tokens"],
                gpu_memory_utilization=TEMPLATE["gpu_memory_utilization"],
            ),
        )


def render(verdicts: Sequence[Verdict], width: int) -> str:
    """Claim, verdict and reason, one below the other."""
    lines = []
    for verdict in verdicts:
        head = f"{verdict.word.upper():<13}"
        lines += [beside(head, verdict.claim, width), beside(" " * len(head), verdict.because, width), ""]
    return "\n".join(lines[:-1])


# --- its table


def _table(facts: _Facts) -> Iterator[Verdict]:
    yield _concurrency("BF16 KV cache: ~256 users stable at 16k context", 256, facts.bf16)
    yield _concurrency("FP8 KV cache: 1024 users stable at 16k context", 1024, facts.fp8)
    yield _prefill("BF16: peak prefill ~185,000 tok/s", 185_000, facts.bf16)
    yield _prefill("FP8: peak prefill 475,552 tok/s", 475_552, facts.fp8)
    yield _footprint("BF16: 16.7M tokens of KV cache take ~33.4 GB", 33.4e9, facts.bf16)
    yield _footprint("FP8: 16.7M tokens of KV cache take ~16.7 GB", 16.7e9, facts.fp8)
    yield _ttft("BF16: TTFT ~14.8 s at peak load", 14.8, users=256, rate=185_000)
    yield _ttft("FP8: TTFT ~19.2 s at peak load", 19.2, users=1024, rate=475_552)


def _concurrency(claim: str, users: int, plan: Plan) -> Verdict:
    resident, ideal = plan["resident_sequences"].value or 0, plan["resident_sequences_ideal"].value or 0
    if resident >= users:
        return Verdict(claim=claim, word=Word.TRUE, because=f"{resident:,.0f} are resident at once")
    because = (
        f"as a queue: {resident:,.0f} are resident at once ({ideal:,.0f} in the ideal layout), the other "
        f"{users - resident:,.0f} wait inside the engine"
    )
    return Verdict(claim=claim, word=Word.PARTLY, because=because)


def _prefill(claim: str, rate: float, plan: Plan) -> Verdict:
    """Against the peak with every FLOP counted, and without the output projection that vLLM spares most tokens."""
    low, high = bounds(plan["prefill_ceiling_tokens_per_s"])
    expected = plan["prefill_tokens_per_s"]
    because = (
        f"{rate / high:.0%} to {rate / low:.0%} of the chips' peak at 16k, {rounded(low)} to {rounded(high)} tok/s"
    )
    if rate > high:
        because += f": prefix-cache hits, or not this model; plan {shown(expected)} uncached"
        return Verdict(claim=claim, word=Word.IMPOSSIBLE, because=because)
    word = Word.TRUE if rate <= bounds(expected)[1] else Word.UNSUPPORTED
    return Verdict(claim=claim, word=word, because=f"{because}; plan {shown(expected)} uncached")


def _footprint(claim: str, told: float, plan: Plan) -> Verdict:
    ideal, allocated = _value(plan, "kv_bytes_per_token_ideal"), _value(plan, "kv_bytes_per_token")
    tokens = 16.7e6
    because = (
        f"that is {told / tokens:,.0f} bytes a token; the global layers alone need {ideal:,.0f} "
        f"({byte_size(tokens * ideal, rounded)}), the runtime allocates {allocated:,.0f} "
        f"({byte_size(tokens * allocated, rounded)}); "
        f"the machine has {byte_size(_value(plan, 'kv_pool_bytes'), rounded)} for them"
    )
    return Verdict(claim=claim, word=Word.IMPOSSIBLE if told < tokens * ideal else Word.TRUE, because=because)


def _ttft(claim: str, told: float, *, users: int, rate: float) -> Verdict:
    mean = rates.mean_ttft_seconds(users, 16 * _K, rate)
    because = (
        f"first come, first served at its own rate gives {duration(mean)} on average, {duration(2 * mean)} to the "
        f"last: time in a queue, no property of the cache"
    )
    return Verdict(claim=claim, word=Word.TRUE if 0.8 * mean <= told <= 2 * mean else Word.FALSE, because=because)


# --- its text


def _text(facts: _Facts) -> Iterator[Verdict]:
    bf16, fp8 = facts.bf16, facts.fp8
    yield Verdict(
        claim="BF16 runs out of memory at 256-512 users x 16k",
        word=Word.FALSE,
        because=f"the pool of {shown(bf16['kv_pool_bytes'])} is allocated at start and never grows; beyond "
        f"{shown(bf16['resident_sequences'])} documents the rest waits, or is preempted and computed again",
    )
    yield _capacity(bf16, fp8)
    yield _traffic(bf16, fp8)
    yield _prefill("Prefill plateaus near 480k tok/s", 480_000, fp8)
    yield _wait("A 16k prompt alone: TTFT under 3 s", 1, fp8, at_most=3)
    yield _wait("At 128+ users TTFT can exceed 10 s", 128, fp8, at_least=10)
    yield _exact_boundary(facts)
    yield Verdict(
        claim="Fixed context buckets (1k, 4k, 8k, 16k) and 5-10 warm-up requests avoid recompilation",
        word=Word.FALSE,
        because=f"a context length is no compiled shape; {shown(fp8['compiled_shapes'])} are compiled at "
        f"start: {fp8['compiled_shapes'].formula}",
    )
    yield Verdict(
        claim="N-gram speculation saves 15-20 % of decode steps",
        word=Word.UNSUPPORTED,
        because="depends on how much the output repeats the prompt; measure acceptance. It turns async scheduling off",
    )


def _capacity(bf16: Plan, fp8: Plan) -> Verdict:
    gain = _value(bf16, "kv_bytes_per_token") / _value(fp8, "kv_bytes_per_token")
    ideal = _value(bf16, "kv_bytes_per_token_ideal") / _value(fp8, "kv_bytes_per_token_ideal")
    because = (
        f"{gain:.2f} times at tensor parallel {fp8.shape.tensor_parallel_size} as the runtime allocates "
        f"({_value(bf16, 'kv_bytes_per_token'):,.0f} -> {_value(fp8, 'kv_bytes_per_token'):,.0f} bytes a token), "
        f"{ideal:.2f} times in the ideal layout"
    )
    return Verdict(
        claim="FP8 halves the KV cache and doubles capacity",
        word=Word.TRUE if gain >= 2 else Word.PARTLY,
        because=because,
    )


def _traffic(bf16: Plan, fp8: Plan) -> Verdict:
    """Bytes that a decode step reads, of as many documents as bf16 can hold."""
    model, target, size = bf16.model, bf16.machine, bf16.shape.tensor_parallel_size
    num_documents = int(_value(bf16, "resident_sequences"))
    weights = rates.weight_bytes_read(model, target, size, 2, num_documents)
    wide, narrow = (
        weights + num_documents * rates.kv_bytes_read(model, target, size, value_bytes, 16 * _K)
        for value_bytes in (2, 1)
    )
    saved = 1 - narrow / wide
    return Verdict(
        claim="FP8 reduces HBM traffic by 50 %",
        word=Word.TRUE if saved >= 0.5 else Word.FALSE,
        because=f"a decode step of {num_documents} documents reads {byte_size(weights, rounded)} of weights and "
        f"{byte_size(wide - weights, rounded)} of KV cache, {byte_size(narrow - weights, rounded)} with fp8: "
        f"{saved:.0%} less",
    )


def _exact_boundary(facts: _Facts) -> Verdict:
    exact = make_plan(
        load_layout(TEMPLATE["model"]),
        machine(CHIPS),
        Workload(prompt_tokens=32 * _K, output_tokens=1),
        EngineShape(kv_cache_dtype="fp8", max_model_len=32 * _K),
    )
    return Verdict(
        claim="A prompt of exactly max_model_len fails; set 33280 for 32k",
        word=Word.FALSE if exact.fits else Word.TRUE,
        because="; ".join(exact.problems) or "it fits",
    )


def _wait(
    claim: str, users: int, plan: Plan, *, at_most: float | None = None, at_least: float | None = None
) -> Verdict:
    """About the time to first token of the last of `users` that come at once, at the rates to expect."""
    soonest, latest = _last_ttft(users, plan)
    holds = latest <= at_most if at_most is not None else latest >= (at_least or 0)
    rate = shown(plan["prefill_tokens_per_s"])
    because = f"the last of {users} has waited {_span(soonest, latest)} at {rate}"
    if users == 1:
        because = f"{_span(soonest, latest)} at {rate}"
    return Verdict(claim=claim, word=Word.TRUE if holds else Word.FALSE, because=because)


# --- its tiers


def _tiers(facts: _Facts) -> Iterator[Verdict]:
    yield _wait("Interactive, 1-8 users: TTFT < 1.5 s", 8, facts.fp8, at_most=1.5)
    yield _prefill("Standard, 32-64 users: 213k tok/s", 213_000, facts.fp8)
    yield _ttft("Standard, 64 users: TTFT ~2.1 s", 2.1, users=64, rate=213_000)
    yield _prefill("Batch, 128-1024 users: from 379k tok/s", 379_000, facts.fp8)
    yield _concurrency("Long context: 16-32 users at 24-28k prompts, no OOM", 32, facts.plan(28 * _K, "fp8"))


# --- its configuration


def _configuration(facts: _Facts) -> Iterator[Verdict]:
    fp8 = facts.fp8
    hbm = fp8.machine.num_devices * fp8.machine.hbm_bytes
    yield Verdict(
        claim="4 chips of v6e have 128 GB of HBM",
        word=Word.TRUE if hbm >= 128e9 else Word.FALSE,
        because=f"{byte_size(hbm, rounded)} usable; weights take {shown(fp8['weights_bytes'])}, the KV cache gets "
        f"{shown(fp8['kv_pool_bytes'])} at gpu_memory_utilization {TEMPLATE['gpu_memory_utilization']}",
    )
    names = gone()
    wrong = {name: names[name] for name in TEMPLATE if name in names}
    yield Verdict(
        claim="The configuration template starts vLLM",
        word=Word.FALSE if wrong else Word.TRUE,
        because=f"vLLM has no {', '.join(wrong)}; `ingestq plan --engine-config` says what to write instead",
    )
    yield Verdict(
        claim="The template serves 1024 users at once",
        word=Word.FALSE,
        because=f"it doesn't set max_num_seqs: vLLM's default is {_DEFAULT_NUM_SEQS}, and at 16k "
        f"{shown(fp8['resident_sequences'])} are resident",
    )


# --- what they have in common


def _value(plan: Plan, name: str) -> float:
    value = plan[name].value
    assert value is not None, name  # arithmetic, not an estimate
    return value


def _last_ttft(users: int, plan: Plan) -> tuple[float, float]:
    """Seconds until the last of `users` has its first token: soonest and latest."""
    low, high = bounds(plan["prefill_tokens_per_s"])
    tokens = users * plan.workload.prompt_tokens
    return tokens / high, tokens / low


def _span(low: float, high: float) -> str:
    return f"{duration(low, high)} to {duration(high)}"
