"""The tiers of service as presets of `ingestq plan`, each with the promise that the plan then checks."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.planner.plan import Plan
from ..common.planner.rates import mean_ttft_seconds
from ..common.presets import TIERS
from .units import bounds


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a tier chooses where the options don't."""

    name: str
    # Documents at once at most: the upper end of the tier. None: as many as are resident.
    max_num_seqs: int | None = None
    # The tier's mean time to first token at most; None: it makes no promise.
    max_ttft_ms: float | None = None
    # Where the tier is about documents of a certain length.
    prompt_tokens: int | None = None
    max_model_len: int | None = None
    # In every tier; where the machine can't, "auto".
    kv_cache_dtype: str = "fp8"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="interactive",
            max_num_seqs=TIERS["interactive"].ceiling,
            max_ttft_ms=TIERS["interactive"].ttft_sla_ms,
        ),
        Preset(name="standard", max_num_seqs=TIERS["standard"].ceiling, max_ttft_ms=TIERS["standard"].ttft_sla_ms),
        # `make_plan` suggests the tier's 128 to 1024 as far as they are resident.
        Preset(name="batch"),
        # Prompts of 24k to 28k, with headroom for the output up to the article's max_model_len.
        Preset(
            name="long-context",
            max_num_seqs=TIERS["long-context"].ceiling,
            prompt_tokens=28 * 1024,
            max_model_len=33280,
        ),
    )
}


def max_in_flight_within(preset: Preset, plan: Plan) -> tuple[int, int] | None:
    """How many documents in flight keep the tier's mean TTFT, at the lowest and highest rate to expect.

    By `mean_ttft_seconds`, if all arrive at once. At least 1: a document alone is as fast as it gets.

    Returns:
        None if the tier makes no promise or the plan has no rate.
    """
    if preset.max_ttft_ms is None or "prefill_tokens_per_s" not in plan:
        return None
    low, high = (
        int(preset.max_ttft_ms / 1000 / mean_ttft_seconds(1, plan.fresh_tokens, rate)) if rate else 0
        for rate in bounds(plan["prefill_tokens_per_s"])
    )
    return max(low, 1), max(high, 1)
