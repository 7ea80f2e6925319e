"""Section "kv_cache": fp8 against bf16 KV cache on the same documents, everything else being equal."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .arithmetic import Agreement, agreement
from .probe import Answer
from .report import Section, Verdict

# Documents whose outputs are compared.
NUM_COMPARED = 32

# Share of equal contexts in which both choose the same token, below which fp8 costs more than rounding does. Ours, not
# a published bar: fp8 has 2 or 3 bits of mantissa, and a choice flips only where two tokens are about equally likely.
MIN_AGREEMENT = 0.9

_TITLE = "fp8 against bf16 KV cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Which two engines are compared."""

    # What differs, as INGEST_ENGINE_* of the first engine, the reference; the second is the one that is configured.
    reference: dict[str, str]
    # In words, first and second.
    labels: tuple[str, str]
    # Why it is not fp8 against bf16; "" if it is.
    stands_in: str = ""


def comparison(kv_cache_dtype: str, device: str) -> Comparison | None:
    """What to compare an engine with; None if there is nothing to learn.

    Args:
        kv_cache_dtype: as configured.
        device: "tpu", "cuda", "cpu" or "simulated".
    """
    if kv_cache_dtype.startswith("fp8"):
        return Comparison(
            reference={"INGEST_ENGINE_KV_CACHE_DTYPE": "auto"},
            labels=("kv_cache_dtype auto", f"kv_cache_dtype {kv_cache_dtype}"),
        )
    if device == "cpu":
        return Comparison(
            # Not kv_cache_dtype alone: vLLM's CPU engine (0.32) takes bfloat16 beside float32 weights without a word,
            # and answers with other tokens from the first one on.
            reference={"INGEST_ENGINE_DTYPE": "bfloat16"},
            labels=("bfloat16 weights and KV", "as configured"),
            stands_in="vLLM's CPU engine has no fp8 KV cache without AVX-512 or AMX. In its place, so that the "
            "comparison itself is tried: bfloat16 weights and KV cache against the configured ones.",
        )
    return None


def kv_cache_section(compared: Comparison, reference: Answer, configured: Answer) -> Section:
    """Token agreement and log-probability difference of two probes over the same documents."""
    if reference.scored is None or configured.scored is None:
        return skipped("the engine has no log-probabilities.")
    found = agreement(reference.scored, configured.scored)
    pair = f"{reference.kv_cache['dtype']} and {configured.kv_cache['dtype']} KV cache"
    same = f"{pair}: {found.token_agreement:.2%} of {found.num_compared} choices from equal contexts are the same token"
    if compared.stands_in:
        verdict, reason = Verdict.NOT_POSSIBLE, f"{compared.stands_in} {same}."
    elif found.token_agreement >= MIN_AGREEMENT:
        verdict, reason = Verdict.PASS, f"{same}."
    else:
        verdict, reason = Verdict.FAIL, f"{same}; the bar is {MIN_AGREEMENT:.0%}."
    return Section(
        name="kv_cache",
        title=_TITLE,
        verdict=verdict,
        reason=reason,
        figures=_figures(compared, found, reference, configured),
        notes=[
            "Greedy outputs. Choices are compared up to the first that differs in a document: behind it the contexts "
            "differ, too. Differences are of natural logarithms, of the probability of the reference's token. Random "
            "weights don't reach the bar: their likeliest tokens are all but tied."
        ],
    )


def skipped(reason: str) -> Section:
    return Section(name="kv_cache", title=_TITLE, verdict=Verdict.NOT_POSSIBLE, reason=reason, figures={})


def _figures(compared: Comparison, found: Agreement, reference: Answer, configured: Answer) -> dict[str, object]:
    return {
        "reference": compared.labels[0],
        "against": compared.labels[1],
        "KV dtype in use, reference": reference.kv_cache["dtype"],
        "KV dtype in use": configured.kv_cache["dtype"],
        "KV tokens, reference": reference.kv_cache["num_tokens"],
        "KV tokens": configured.kv_cache["num_tokens"],
        **{name.replace("_", " ").replace("num ", ""): value for name, value in asdict(found).items()},
        "token agreement": found.token_agreement,
    }
