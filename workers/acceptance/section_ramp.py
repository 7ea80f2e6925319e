"""Section "ramp": more and more documents in flight, on one worker that is never restarted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from ...common.engine_card import EngineCard
from ...common.limits import AdmissionLimits, write_limits
from .arithmetic import percentile
from .bench import AcceptanceError, Bench
from .documents import Document, enqueue, follow, numbered
from .observer import Sample
from .report import Section, Table, Verdict
from .worker import Worker

# Documents of a level for each one in flight: the first fill it, the others keep it full.
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What came of one level."""

    # Documents that might be in flight, and how many were at most.
    limit: int
    max_in_flight: int
    num_documents: int
    num_succeeded: int
    # Seconds that the engine spent in its steps.
    seconds: float
    # Milliseconds from the engine's add_request to the first token.
    ttft_ms: Sequence[float]
    # Of finished prompts, those from the prefix cache left out.
    prompt_tokens: int
    output_tokens: int
    num_preemptions: int
    # Graphs compiled meanwhile, after the warm-up; None where that can't be told.
    num_recompiles: int | None
    # Share of the KV cache, at most.
    kv_usage: float
    # Of the accelerators, or resident memory of the worker where they can't tell; at most.
    memory_bytes: int
    memory_kind: str

    @property
    def ok(self) -> bool:
        return self.num_succeeded == self.num_documents and self.max_in_flight <= self.limit


def run_ramp(bench: Bench, worker: Worker, redis: Redis, documents: Sequence[Document]) -> list[Level]:
    return [_run_level(bench, worker, redis, documents, limit) for limit in bench.levels]


def _run_level(bench: Bench, worker: Worker, redis: Redis, documents: Sequence[Document], limit: int) -> Level:
    """Fills the queue while nothing is admitted, then opens it."""
    number, group_id = limit * _ROUNDS, f"{bench.queue}-ramp-{limit}"
    batch = [numbered(documents[i % len(documents)], f"ramp-{limit}/{i}") for i in range(number)]
    write_limits(redis, bench.queue, AdmissionLimits(max_in_flight=0))
    enqueue(bench, group_id, batch)
    before, start = worker.trace()[-1:], time.monotonic()
    write_limits(redis, bench.queue, AdmissionLimits(max_in_flight=limit))
    rows = follow(bench, group_id)
    samples = [sample for sample in worker.trace() if sample.at >= start]
    if not samples:
        raise AcceptanceError(f"no step was taken with {limit} documents in flight: {worker.said}")
    return level_of(limit, number, rows, before[0] if before else None, samples)


def level_of(
    limit: int,
    num_documents: int,
    rows: Sequence[dict[str, Any]],
    before: Sample | None,
    samples: Sequence[Sample],
) -> Level:
    """The figures of a level.

    Args:
        before: the last sample taken before the queue was opened.
        samples: those taken since, at least one.
    """
    last = samples[-1]
    good = [row for row in rows if row["status"] == "succeeded"]
    on_device = any(sample.device_bytes for sample in samples)
    return Level(
        limit=limit,
        max_in_flight=max(sample.max_in_flight for sample in samples),
        num_documents=num_documents,
        num_succeeded=len(good),
        seconds=last.step_seconds - (before.step_seconds if before else 0.0),
        ttft_ms=[row["ttft_ms"] for row in good],
        prompt_tokens=_grown(before, last, "prompt_tokens") - _grown(before, last, "cached_tokens"),
        output_tokens=_grown(before, last, "output_tokens"),
        num_preemptions=_grown(before, last, "num_preemptions"),
        num_recompiles=None
        if last.num_compilations is None
        else _grown(before or samples[0], last, "num_compilations"),
        kv_usage=max(sample.kv_usage for sample in samples),
        memory_bytes=max(sample.device_bytes if on_device else sample.rss_bytes for sample in samples),
        memory_kind="HBM" if on_device else "RSS",
    )


def _recompiles(before: Sample, after: Sample) -> int | None:
    return None if after.num_compilations is None else _grown(before, after, "num_compilations")


def _grown(before: Sample | None, after: Sample, name: str) -> int:
    return int(getattr(after, name)) - (int(getattr(before, name)) if before else 0)


def ramp_section(levels: Sequence[Level], card: EngineCard) -> Section:
    bad = [level for level in levels if not level.ok]
    kind = levels[0].memory_kind
    header = ["in flight", "documents", "TTFT p50 s", "p95 s", "p99 s", "prompt tok/s", "output tok/s"]
    header += ["KV use at most", "preemptions", "recompiles", f"{kind} at most, GiB", "steps, s"]
    return Section(
        name="ramp",
        title=f"Ramp {levels[0].limit} to {levels[-1].limit} in flight",
        verdict=Verdict.FAIL if bad else Verdict.PASS,
        reason="; ".join(map(_told, bad)) or "every document succeeded, and no limit was exceeded at any step.",
        figures={
            "max_num_seqs": card.max_num_seqs,
            "documents": sum(level.num_documents for level in levels),
            "prefill alone, by the warm-up, tok/s": card.prefill_tokens_per_s,
            "decode alone, by the warm-up, tok/s": card.decode_tokens_per_s,
        },
        table=Table(header=header, rows=[_row(level) for level in levels]),
        notes=[
            f"Documents above max_num_seqs ({card.max_num_seqs}) wait inside the engine: that is what their TTFT is. "
            "Rates are of prompts and outputs at the same time, over the seconds spent in steps, and "
            "without what came from the prefix cache."
        ],
    )


def _row(level: Level) -> list[Any]:
    ttft = [percentile(level.ttft_ms, percent) / 1e3 for percent in (50, 95, 99)]
    rates = [level.prompt_tokens / level.seconds, level.output_tokens / level.seconds]
    memory = level.memory_bytes / 2**30
    return [
        level.limit,
        level.num_documents,
        *ttft,
        *rates,
        f"{level.kv_usage:.1%}",
        level.num_preemptions,
        level.num_recompiles,
        memory,
        level.seconds,
    ]


def _told(level: Level) -> str:
    return (
        f"with {level.limit} in flight {level.num_succeeded} of {level.num_documents} documents succeeded, and "
        f"{level.max_in_flight} were in flight at most"
    )
