"""What bench_drain.py runs: engines, policies, documents and disturbances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from ingestq.common.limits import AdmissionLimits
from ingestq.workers.drain_bounds import drain_bounds
from ingestq.workers.engines.profiles import planned_profile
from ingestq.workers.engines.simulated_engine import Profile, SimulatedEngine

from . import events
from .baseline import worker_settings
from .fleet import Policy
from .run import DEPTH, Scenario, Stage, Tenant
from .workload import LONG, SHORT, Workload, documents

# Milliseconds: that of the preset `standard`.
SLA_MS = 2100.0

# Times that the ill engine takes for a step.
SLOWER = 4.0

CONTROLLER = Policy(name="controller", settings={"INGEST_TTFT_SLA_MS": f"{SLA_MS:g}"})
# What is leased is started at once, whatever it needs: 1,024 documents, KV tokens and time to first token unbounded.
FIXED_CAP = Policy(
    name="fixed cap",
    worker="UncontrolledWorker",
    settings={
        "INGEST_MAX_IN_FLIGHT": "1024",
        "INGEST_MIN_IN_FLIGHT": "1024",
        "INGEST_MAX_KV_TOKENS": str(2**31 - 1),
        "INGEST_TTFT_SLA_MS": "0",
    },
)
WAVES = Policy(name="waves", settings={**CONTROLLER.settings, "INGEST_FEED": "generate"})

# Tokens of a long document and its output, on average; for the cap on the fleet, which need not be exact.
_MEAN_TOKENS = 5_300


@cache
def long_profile(slowdown: float = 1.0) -> Profile:
    """As vLLM 0.32 allocates the KV cache, for documents of up to 16k tokens."""
    return planned_profile(max_model_len=17_024, prompt_tokens=5_000, output_tokens=256, slowdown=slowdown)


@cache
def short_profile() -> Profile:
    """In the ideal layout, in which 1,024 short documents are resident."""
    return planned_profile(ideal=True, max_model_len=1_024, max_num_seqs=1_024, prompt_tokens=128, output_tokens=256)


def scenarios(num_documents: int) -> list[Scenario]:
    """All runs; the first with so many documents, the others with a fifth of them."""
    fewer = num_documents // 5
    long, short = long_profile(), short_profile()
    return [
        _scenario("fleet-4", 4, long, LONG, num_documents, factor=6, events=disturbances(long, num_documents)),
        _scenario("fleet-1", 1, long, LONG, fewer, factor=20),
        _scenario("fleet-16", 16, long, LONG, fewer, factor=1.5),
        _scenario("short-1024", 1, short, SHORT, fewer, factor=3),
        _scenario("tenants", 4, long, LONG, fewer, factor=6, depths={"a": 3_000, "b": 30}),
        _scenario("fixed-cap", 4, long.model_copy(update={"max_num_seqs": 1024}), LONG, fewer, 6, FIXED_CAP),
        _scenario("waves", 4, long, LONG, fewer, 6, WAVES),
    ]


def disturbances(profile: Profile, num_documents: int) -> Sequence[tuple[int, Callable[[Stage], None]]]:
    """After how many documents what happens to a fleet of four."""
    # Half of what the fleet has in flight otherwise.
    cap = 4 * profile.num_kv_blocks * profile.block_size // _MEAN_TOKENS // 2
    shares: Sequence[tuple[float, Callable[[Stage], None]]] = (
        (0.30, events.kill("engine-1")),
        (0.45, events.kill("engine-2", long_profile(SLOWER))),
        (0.60, events.kill("engine-2", profile)),
        (0.65, events.limit("max_in_flight_fleet", cap)),
        (0.75, events.limit("max_in_flight_fleet", None)),
        (0.80, events.pause_then_burst),
        (0.90, events.pause_then_burst),
    )
    return [(int(num_documents * share), happen) for share, happen in shares]


def _scenario(
    name: str,
    num_engines: int,
    profile: Profile,
    workload: Workload,
    num_documents: int,
    factor: float,
    policy: Policy = CONTROLLER,
    *,
    depths: dict[str, int] | None = None,
    events: Sequence[tuple[int, Callable[[Stage], None]]] = (),
) -> Scenario:
    # Of a small run, less: what is queued at its end can't be paused.
    depths = depths or {"": min(DEPTH, num_documents // 20)}
    each = num_documents // len(depths)
    tenants = [
        Tenant(name=tenant, depth=depth, requests=partial(documents, workload, each, prefix=tenant or "d", seed=seed))
        for seed, (tenant, depth) in enumerate(depths.items())
    ]
    settings = worker_settings(profile, policy.settings)
    bounds = drain_bounds(settings, SimulatedEngine.from_settings(settings))
    return Scenario(
        name=name,
        num_engines=num_engines,
        profile=profile,
        policy=policy,
        bounds=AdmissionLimits(max_in_flight=bounds.max_in_flight, max_kv_tokens=bounds.max_kv_tokens or None),
        workload=workload,
        tenants=tenants,
        num_documents=each * len(depths),
        factor=factor,
        events=events,
    )
