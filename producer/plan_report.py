"""A `Plan` as people read it: the verdict, then every figure with its formula and source; and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..common.planner.plan import Figure, Plan, Workload
from .presets import Preset, max_in_flight_within
from .token_counts import Lengths, TokenCounts
from .units import beside, duration, shown

# Columns of the table: what, how much; the formula takes the rest.
_LABEL, _VALUE = 27, 24
_INDENT = 2

# Where a figure stands, and how it is called there; one that is new in `make_plan` comes last, under its own name.
_SECTIONS: dict[str, dict[str, str]] = {
    "MEMORY": {
        "weights_bytes": "weights, resident",
        "kv_pool_bytes": "left for the KV cache",
        "kv_bytes_per_token_ideal": "KV per token, ideal",
        "kv_bytes_per_sequence_ideal": "KV per sequence, ideal",
        "kv_bytes_per_token": "KV per token, as allocated",
        "kv_tokens": "KV cache holds",
        "block_size": "block size",
        "resident_sequences_ideal": "resident documents, ideal",
        "resident_sequences": "resident documents",
    },
    "SPEED": {
        "prefill_flops_per_token": "prefill work",
        "prefill_ceiling_tokens_per_s": "prefill at most",
        "prefill_tokens_per_s": "prefill to expect",
        "decode_ceiling_tokens_per_s": "decode at most",
        "decode_tokens_per_s": "decode to expect",
        "ttft_at_limit_ms": "TTFT at the limit",
    },
    "SETTINGS": {
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "max_in_flight": "documents in flight",
        "compiled_shapes": "shapes to compile",
    },
    "JOB": {
        "documents_per_hour": "documents per hour",
        "hours": "time",
        "cost": "cost",
        "meets_deadline": "deadline",
    },
}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that `ingestq plan` found out."""

    plan: Plan
    # Of the documents given, if any.
    counts: TokenCounts | None = None
    preset: Preset | None = None
    # What stands in the way besides `plan.problems`, and what is odd besides `plan.warnings`.
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.plan.fits and not self.problems

    @property
    def meets_deadline(self) -> bool:
        """False only if the deadline is missed even at the best rate."""
        return "meets_deadline" not in self.plan or self.plan["meets_deadline"].value != 0


def to_json(findings: Findings) -> dict[str, Any]:
    """Everything, in the names of the records that it comes from; values in their base units."""
    plan = findings.plan
    return {
        "model": asdict(plan.model),
        "machine": asdict(plan.machine),
        "workload": asdict(plan.workload),
        "shape": asdict(plan.shape),
        "preset": asdict(findings.preset) if findings.preset else None,
        "documents": asdict(findings.counts) if findings.counts else None,
        "fits": findings.fits,
        "problems": [*plan.problems, *findings.problems],
        "warnings": [*plan.warnings, *findings.warnings],
        "figures": [asdict(figure) for figure in plan.figures],
    }


def render(findings: Findings, width: int) -> str:
    """Args: width: columns of the terminal."""
    sections = list(_by_section(findings.plan))
    sources = list(dict.fromkeys(figure.source for _, rows in sections for figure, _ in rows))
    parts = [_title(findings, width), _verdict(findings, width)]
    for section, rows in sections:
        parts.append("\n".join([section, *(_row(figure, label, sources, width) for figure, label in rows)]))
    if sources:
        numbered = (beside(f"[{number}] ", source, width) for number, source in enumerate(sources, 1))
        parts.append("\n".join(["SOURCES", *numbered]))
    return "\n\n".join(parts)


# --- the first lines


def _title(findings: Findings, width: int) -> str:
    plan, shape = findings.plan, findings.plan.shape
    cached = shape.dtype if shape.kv_cache_dtype == "auto" else shape.kv_cache_dtype
    lines = [
        f"{plan.model.name} on {plan.machine.name}: {shape.dtype} weights, {cached} KV cache, "
        f"tensor parallel {shape.tensor_parallel_size}",
        *(_counts_told(findings.counts) if findings.counts else ()),
        _workload_told(plan.workload, findings.counts),
    ]
    return "\n".join(beside("", line, width) for line in lines)


def _counts_told(counts: TokenCounts) -> list[str]:
    def told(name: str) -> str:
        ends = dict.fromkeys(f"{getattr(lengths, name):,}" for lengths in (counts.low, counts.high))
        return f"{name} {' - '.join(ends)}"

    of_one = ", ".join(told(field.name) for field in fields(Lengths) if field.name != "sum")
    return [
        f"{counts.num_documents:,} documents given, {counts.num_bytes:,} bytes",
        f"tokens: {told('sum')}; of one document: {of_one}",
        f"tokens {counts.method}",
    ]


def _workload_told(work: Workload, counts: TokenCounts | None) -> str:
    many = f"{work.num_documents:,} documents" if work.num_documents else "documents"
    average = "" if counts is None else "on average " if counts.exact else "on average at most "
    shared = f" ({work.shared_prefix_tokens:,} of them the same in all)" if work.shared_prefix_tokens else ""
    return (
        f"planned for {many} of {average}{work.prompt_tokens:,} tokens{shared}, with {work.output_tokens:,} of output"
    )


def _verdict(findings: Findings, width: int) -> str:
    plan = findings.plan
    verdict = "FITS" if findings.fits else "DOES NOT START" if plan.fits else "DOES NOT FIT"
    lines = [(verdict, _residents_told(plan))]
    lines += [("problem", problem) for problem in (*plan.problems, *findings.problems)]
    if told := _time_told(findings):
        lines.append(("TAKES", told))
    if findings.fits:
        lines.append(("SET", _settings_told(plan)))
    if findings.preset and (told := _tier_told(findings.preset, plan)):
        lines.append((findings.preset.name.upper(), told))
    lines += [("warning", warning) for warning in (*plan.warnings, *findings.warnings)]
    column = max(len(word) for word, _ in lines) + 2
    return "\n".join(beside(" " * _INDENT + word.ljust(column), told, width) for word, told in lines)


def _residents_told(plan: Plan) -> str:
    if "resident_sequences" not in plan:
        return "nothing is resident"
    told = f"{shown(plan['resident_sequences'])} documents resident at once"
    if "resident_sequences_ideal" in plan:
        told += f" (the ideal layout: {shown(plan['resident_sequences_ideal'])})"
    if "max_in_flight" in plan:
        told += f"; up to {shown(plan['max_in_flight'])} in flight"
    return told


def _time_told(findings: Findings) -> str:
    plan, told = findings.plan, []
    if plan.fits and "documents_per_hour" not in plan:
        return f"unknown: a worker measures the rates of {plan.machine.name} at its warm-up"
    if "hours" in plan:
        told.append(f"{shown(plan['hours'])} for {plan.workload.num_documents:,} documents")
    if "documents_per_hour" in plan:
        told.append(f"{shown(plan['documents_per_hour'])} an hour")
    if "cost" in plan:
        told.append(f"cost {shown(plan['cost'])}")
    if "meets_deadline" in plan:
        told.append(f"deadline: {shown(plan['meets_deadline'])}")
    return "; ".join(told)


def _settings_told(plan: Plan) -> str:
    """What to set so that the worker has this shape; what is vLLM's default anyway is left out."""
    shape = plan.shape
    arguments = {
        "MAX_MODEL_LEN": shape.max_model_len,
        "MAX_NUM_SEQS": shape.max_num_seqs,
        "MAX_NUM_BATCHED_TOKENS": shape.max_num_batched_tokens,
        "DTYPE": shape.dtype,
        "KV_CACHE_DTYPE": shape.kv_cache_dtype,
        "BLOCK_SIZE": shape.block_size,
        "TENSOR_PARALLEL_SIZE": shape.tensor_parallel_size,
        "GPU_MEMORY_UTILIZATION": shape.gpu_memory_utilization,
    }
    defaults = {
        "DTYPE": "bfloat16",
        "KV_CACHE_DTYPE": "auto",
        "TENSOR_PARALLEL_SIZE": 1,
        "GPU_MEMORY_UTILIZATION": 0.92,
    }
    told = [f"INGEST_ENGINE_{name}={value}" for name, value in arguments.items() if defaults.get(name) != value]
    if "max_in_flight" in plan:
        told.append(f"INGEST_MAX_IN_FLIGHT={int(plan['max_in_flight'].value or 0)}")
    return " ".join(told)


def _tier_told(preset: Preset, plan: Plan) -> str:
    """Whether the tier's promise holds on this machine; "" if it makes none."""
    within = max_in_flight_within(preset, plan)
    if within is None or preset.max_ttft_ms is None:
        return ""
    (low, high), wanted = within, plan.shape.max_num_seqs
    promise = f"a mean TTFT of {duration(preset.max_ttft_ms / 1000)} holds"
    if low >= wanted:
        return f"{promise} at {wanted:,} in flight"
    many = f"{low:,}" if low == high else f"{low:,} - {high:,}"
    return f"{promise} up to {many} in flight, not at {wanted:,}; the queue keeps the rest"


# --- the table


def _by_section(plan: Plan) -> Iterator[tuple[str, Sequence[tuple[Figure, str]]]]:
    known: set[str] = set()
    for section, labels in _SECTIONS.items():
        known |= labels.keys()
        if figures := [(plan[name], label) for name, label in labels.items() if name in plan]:
            yield section, figures
    if rest := [(figure, figure.name) for figure in plan.figures if figure.name not in known]:
        yield "MORE", rest


def _row(figure: Figure, label: str, sources: Sequence[str], width: int) -> str:
    head = f"{' ' * _INDENT}{label:<{_LABEL}} {shown(figure):<{_VALUE}} "
    return beside(head, f"{figure.formula} [{sources.index(figure.source) + 1}]", width)
