"""From a run and its baselines to the figures of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from ingestq.workers.engines.simulated_engine import Profile

from .baseline import Baseline
from .figures import (
    Span,
    difference,
    intersection,
    is_within,
    jain,
    length,
    percentile,
    rolling,
    spans_where,
    time_to_return,
    tokens_within,
)
from .run import Run

# Simulated seconds after the start, or after something was changed, that are not counted as steady; of a short run, no
# more than a tenth of it.
_SETTLING = 60.0

# Simulated seconds of one point of TTFT over time.
_WINDOW = 2.0


def backlog(run: Run) -> list[Span]:
    """From the first step of any engine: when documents waited in the queue for engines, and for nothing else.

    Left out: while a limit on the fleet is lowered, and while what a dead worker held runs in small company.
    """
    begun = min(steps[0].start for steps in run.steps.values() if steps)
    queued = intersection(spans_where(run.observed.any_queued), [(begun, math.inf)])
    return difference(difference(queued, capped(run)), _merged(recovering(run)))


def simulated(run: Run, seconds: float) -> float:
    """Seconds of the run's own clock."""
    return seconds * run.factor


def recovering(run: Run) -> list[Span]:
    """After each kill, until all that the worker held has ended."""
    return [(recovery.start, recovery.end or run.end) for recovery in run.recoveries]


def capped(run: Run) -> list[Span]:
    """When a limit was lowered live."""
    lowered = [at for at, what in run.marks if what.startswith("max_") and not what.endswith("lifted")]
    lifted = [at for at, what in run.marks if what.endswith("lifted")]
    return list(zip(lowered, [*lifted, run.end], strict=False))


def dead(run: Run, worker: str) -> list[Span]:
    """From each kill of a worker to the first step of the process that took its place."""
    starts = [step.start for step in run.steps[worker]]
    return [(at, min((start for start in starts if start > at), default=run.end)) for at in run.kills[worker]]


def busy(run: Run, baselines: Mapping[Profile, Baseline]) -> float:
    """Tokens per simulated second, over those of the same engines given everything, while there is backlog.

    A second on the clock is `factor` simulated ones, whatever the engine did in it: an engine that waits for the queue
    between two steps loses the time. Engines that are dead count neither way.
    """
    spans, done, possible = backlog(run), 0.0, 0.0
    for worker, steps in run.steps.items():
        alive = difference(spans, dead(run, worker))
        done += tokens_within(((step.start, step.end, step.num_tokens) for step in steps), alive)
        for since, until, profile in _periods(run, worker):
            seconds = length(intersection(alive, [(since, until)])) * run.factor
            possible += seconds * baselines[profile].tokens_per_s
    return done / possible


def _periods(run: Run, worker: str) -> list[tuple[float, float, Profile]]:
    given = [*run.profiles[worker], (math.inf, None)]
    return [(max(since, run.start), until, profile) for (since, profile), (until, _) in pairwise(given) if profile]


def tokens_per_s(run: Run) -> float:
    """Of the fleet, in a simulated second with backlog."""
    spans = backlog(run)
    steps = ((step.start, step.end, step.num_tokens) for steps in run.steps.values() for step in steps)
    return tokens_within(steps, spans) / (length(spans) * run.factor)


def steady(run: Run) -> list[Span]:
    """When nothing had been changed for a while."""
    changes = [run.start, *(at for at, _ in run.marks), *(end for _, end in recovering(run))]
    return difference([(run.start, run.end)], _merged([(at, at + _settling(run)) for at in sorted(changes)]))


def _settling(run: Run) -> float:
    """Seconds."""
    return min(_SETTLING / run.factor, (run.end - run.start) / 10)


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def ttft_p95_ms(run: Run, spans: list[Span] | None = None) -> float:
    """Of the first tokens within spans, simulated milliseconds; of all of them without."""
    firsts = (first for firsts in run.firsts.values() for first in firsts)
    return percentile([first.ttft_ms for first in firsts if spans is None or is_within(first.at, spans)], 95)


def ttft_points(run: Run) -> list[tuple[float, float]]:
    """TTFT's 95th percentile over time: (simulated seconds since the start, milliseconds)."""
    events = [
        ((first.at - run.start) * run.factor, first.ttft_ms) for firsts in run.firsts.values() for first in firsts
    ]
    return rolling(events, _WINDOW, 95)


def returns(run: Run, sla_ms: float) -> list[tuple[str, float]]:
    """What was changed -> simulated seconds until TTFT's 95th percentile was within the SLA for good."""
    points = ttft_points(run)
    marks = [((at - run.start) * run.factor, what) for at, what in run.marks]
    ends = [*(at for at, _ in marks[1:]), (run.end - run.start) * run.factor][: len(marks)]
    return [(what, time_to_return(points, sla_ms, at, until)) for (at, what), until in zip(marks, ends, strict=True)]


def fairness(run: Run) -> tuple[float, list[float]]:
    """Jain's index over the tenants' tokens while all were backlogged, and those tokens."""
    spans = spans_where(run.observed.all_queued)
    # What ends shortly after the start was leased before the other tenants had anything.
    spans = difference(spans, [(run.start, run.start + _settling(run))])
    tokens = [
        float(sum(num for at, num in zip(traffic.times, traffic.tokens, strict=True) if is_within(at, spans)))
        for traffic in run.traffics
    ]
    return jain(tokens), tokens
