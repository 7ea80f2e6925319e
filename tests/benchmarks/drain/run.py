"""One run: a server, a fleet, documents flowing, and what happens meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.limits import AdmissionLimits
from ingestq.common.schema import IngestRequest
from ingestq.workers.engines.simulated_engine import Profile

from .fleet import Policy, SimulatedFleet
from .machine import MAX_BUSY_SHARE, BusyShare, next_factor
from .observer import Observed, Observer
from .steps import First, Step, read_firsts, read_steps
from .traffic import Traffic
from .workload import Workload

QUEUE = "ingest"

# Documents in Redis at a time, at most.
DEPTH = 1_500

# Seconds from the first document on after which it is judged how busy the machine is: what is given up, is given up
# early, on a share a little below the bound.
_JUDGED_AFTER = (12.0, 30.0, 60.0)
_EARLY_BUSY_SHARE = MAX_BUSY_SHARE - 0.04

# Runs that may be given up for a busy machine before one is taken as it is.
_MAX_ATTEMPTS = 4


class TooBusy(Exception):
    """The machine is busier than it may be.

    Attributes:
        busy_share: 0 to 1.
    """

    def __init__(self, busy_share: float) -> None:
        super().__init__(f"the machine is {busy_share:.0%} busy; {MAX_BUSY_SHARE:.0%} is the bound")
        self.busy_share = busy_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A stream of documents."""

    requests: Callable[[], Iterator[IngestRequest]]
    name: str = ""
    depth: int = DEPTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is run."""

    name: str
    num_engines: int
    profile: Profile
    policy: Policy
    # Of the workers' settings, for the observer.
    bounds: AdmissionLimits
    workload: Workload
    tenants: Sequence[Tenant]
    # Over all tenants.
    num_documents: int
    # Simulated seconds in a real one, to begin with.
    factor: float
    # What happens when so many documents have ended, in order.
    events: Sequence[tuple[int, Callable[[Stage], None]]] = ()


@dataclass(slots=True, kw_only=True)
class Recovery:
    """After a kill: what the worker held are suspects, and run in small company until they have ended."""

    start: float
    job_ids: list[str]
    # None: some have not ended.
    end: float | None = None

    def look(self, redis: Redis) -> None:
        with redis.pipeline(transaction=False) as pipeline:
            for job_id in self.job_ids:
                pipeline.hget(keys.job(job_id), "status")
            statuses = pipeline.execute()
        running = (b"queued", b"started", b"scheduled")
        self.job_ids = [job_id for job_id, status in zip(self.job_ids, statuses, strict=True) if status in running]
        if not self.job_ids:
            self.end = time.monotonic()


@dataclass(slots=True, kw_only=True)
class Stage:
    """A run under way, for its events."""

    redis: Redis
    fleet: SimulatedFleet
    traffics: Sequence[Traffic]
    observer: Observer
    # Seconds by time.monotonic() at which something was changed, and what.
    marks: list[tuple[float, str]] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)

    def mark(self, what: str) -> None:
        self.marks.append((time.monotonic(), what))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was observed. Times are seconds by time.monotonic(), unless they are called simulated."""

    scenario: Scenario
    # Simulated seconds in a real one.
    factor: float
    # Of the machine, from the first lease to the last row.
    busy_share: float
    start: float
    end: float
    redis_us_per_document: float
    redis_peak_bytes: int
    observed: Observed
    marks: Sequence[tuple[float, str]]
    recoveries: Sequence[Recovery]
    # Worker -> what it did.
    steps: Mapping[str, Sequence[Step]]
    firsts: Mapping[str, Sequence[First]]
    profiles: Mapping[str, Sequence[tuple[float, Profile]]]
    kills: Mapping[str, Sequence[float]]
    traffics: Sequence[Traffic]

    @property
    def num_succeeded(self) -> int:
        return sum(traffic.statuses["succeeded"] for traffic in self.traffics)

    @property
    def num_again(self) -> int:
        """Documents that were leased more than once, hand-backs not counted."""
        return sum(number for traffic in self.traffics for attempts, number in traffic.attempts.items() if attempts > 1)

    @property
    def num_preemptions(self) -> int:
        return sum(step.num_preemptions for steps in self.steps.values() for step in steps)


def run(scenario: Scenario, folder: Path) -> Run:
    """Runs it at a clock that this machine keeps up with."""
    factor = scenario.factor
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        place = folder / f"{scenario.name}-{attempt}"
        place.mkdir(parents=True)
        try:
            return _run(scenario, place, factor, is_last=attempt == _MAX_ATTEMPTS)
        except TooBusy as busy:
            slower = next_factor(factor, busy.busy_share)
            print(f"{scenario.name}: factor {factor:.1f}: {busy}; again at {slower:.1f}", file=sys.stderr, flush=True)
            factor = slower
    raise AssertionError("the last attempt is taken as it is")


def _run(scenario: Scenario, folder: Path, factor: float, *, is_last: bool) -> Run:
    names = [f"engine-{i}" for i in range(1, scenario.num_engines + 1)]
    with ExitStack() as stack:
        # Rewriting the file would take a CPU for seconds, again and again: so much passes through so small a queue.
        server = stack.enter_context(EmbeddedServer(auto_aof_rewrite_percentage=0))
        redis = stack.enter_context(Redis.from_url(server.url))
        fleet = stack.enter_context(
            SimulatedFleet(server.url, folder, names, scenario.profile, scenario.policy, 1 / factor)
        )
        tenants = [tenant.name for tenant in scenario.tenants]
        observer = stack.enter_context(Observer(server.url, QUEUE, names, scenario.bounds, tenants))
        cpu, busy, start = _redis_cpu(redis), BusyShare(), time.monotonic()
        traffics = [
            stack.enter_context(Traffic(server.url, QUEUE, tenant.requests(), depth=tenant.depth, tenant=tenant.name))
            for tenant in scenario.tenants
        ]
        stage = Stage(redis=redis, fleet=fleet, traffics=traffics, observer=observer)
        _play(stage, scenario.events, busy, is_last=is_last)
        end, busy_share, cpu = time.monotonic(), busy.look(), _redis_cpu(redis) - cpu
        peak = int(redis.info("memory")["used_memory_peak"])
    if busy_share > MAX_BUSY_SHARE and not is_last:
        raise TooBusy(busy_share)
    return Run(
        scenario=scenario,
        factor=factor,
        busy_share=busy_share,
        start=start,
        end=end,
        redis_us_per_document=cpu / scenario.num_documents * 1e6,
        redis_peak_bytes=peak,
        observed=observer.observed,
        marks=stage.marks,
        recoveries=stage.recoveries,
        steps={name: read_steps(folder, name) for name in names},
        firsts={name: read_firsts(folder, name) for name in names},
        profiles=fleet.profiles,
        kills=fleet.kills,
        traffics=traffics,
    )


def _play(
    stage: Stage, events: Sequence[tuple[int, Callable[[Stage], None]]], busy: BusyShare, *, is_last: bool
) -> None:
    """Lets documents flow, and things happen, until all rows are there."""
    waiting, begun = list(events), time.monotonic()
    judgements = [] if is_last else list(_JUDGED_AFTER)
    while not all(traffic.is_over for traffic in stage.traffics):
        time.sleep(0.1)
        if judgements and time.monotonic() - begun > judgements[0]:
            judgements.pop(0)
            if (share := busy.look(restart=False)) > _EARLY_BUSY_SHARE:
                raise TooBusy(share)
        for recovery in stage.recoveries:
            if recovery.end is None:
                recovery.look(stage.redis)
        num_ended = sum(traffic.num_ended for traffic in stage.traffics)
        if waiting and num_ended >= waiting[0][0]:
            waiting.pop(0)[1](stage)


def _redis_cpu(redis: Redis) -> float:
    """Seconds of the server's CPU, without those of children that rewrite its file."""
    cpu = redis.info("cpu")
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])
