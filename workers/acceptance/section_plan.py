"""Section "plan": what was planned for the engine against what it has."""

from __future__ import annotations

from typing import Any

from .probe import Answer
from .report import Section, Table, Verdict

# What is shown of a plan, and what the engine says of the same; None: it doesn't say.
_SHOWN = {
    "weights_bytes": None,
    "kv_bytes_per_token": None,
    "kv_pool_bytes": None,
    "kv_tokens": "num_tokens",
    "block_size": "block_size",
    "resident_sequences": None,
    "resident_sequences_ideal": None,
    "compiled_shapes": None,
}


def plan_section(configured: Answer) -> Section:
    """Judges the type and the size of the KV cache that the engine really has."""
    kv_cache, plan = configured.kv_cache, configured.plan
    verdict, reason = _judged(configured)
    found = "read from its arrays" if kv_cache["is_read"] else "by its settings: its arrays can't be read from here"
    return Section(
        name="plan",
        title="Plan against engine",
        verdict=verdict,
        reason=reason,
        figures={
            "kv_cache_dtype asked for": kv_cache["asked"],
            "KV dtype in use": kv_cache["dtype"],
            "which was": found,
            "KV blocks": kv_cache["num_blocks"],
            "tokens a block": kv_cache["block_size"],
            "KV tokens": kv_cache["num_tokens"],
            "HBM in use then, GiB": sum(device["bytes_in_use"] for device in configured.devices) / 2**30 or None,
            "max_model_len": configured.card["max_model_len"],
            "max_num_seqs": configured.card["max_num_seqs"],
            "max_num_batched_tokens": configured.card.get("max_num_batched_tokens"),
        },
        table=Table(header=("figure", "planned", "engine"), rows=_rows(plan, kv_cache)) if plan else None,
    )


def _judged(configured: Answer) -> tuple[Verdict, str]:
    kv_cache = configured.kv_cache
    wrong = [*([configured.wrong_dtype] if configured.wrong_dtype else []), *configured.off_plan]
    if wrong:
        return Verdict.FAIL, "; ".join(wrong) + "."
    has = f"the KV cache is {kv_cache['dtype']}, {kv_cache['num_tokens']:,} tokens in {kv_cache['num_blocks']:,} blocks"
    if configured.plan is None:
        return Verdict.NOT_POSSIBLE, f"nothing was planned: the planner doesn't know this model or machine; {has}."
    return Verdict.PASS, f"{has}, within 10 % of the plan."


def _rows(plan: dict[str, dict[str, Any]], kv_cache: dict[str, Any]) -> list[list[Any]]:
    shown = {name: field for name, field in _SHOWN.items() if name in plan}
    return [[name, _told(plan[name]), kv_cache[field] if field else None] for name, field in shown.items()]


def _told(figure: dict[str, Any]) -> str:
    """A planned figure: a value, or a range."""
    if figure["value"] is not None:
        return f"{figure['value']:,.0f}"
    low, high = (f"{bound:,.0f}" if bound is not None else "?" for bound in (figure["low"], figure["high"]))
    return f"{low} to {high}"
