"""The drain controller at scale, simulated: fleets of 1, 4 and 16 engines behind one real Redis.

Everything but the engine is what runs in production: a real server, `rq worker` processes with their guardians, the
producer's and the reader's library, real bytes. The engine is the simulated one with the planner's profile of a v6e-4
that runs Gemma 4 26B: nothing here is a measurement of a TPU.

Runs, each on a server of its own (DOCUMENTS documents for the first, default 100,000; a fifth of it for the others):
- fleet-4: 4 engines with the controller. One engine is killed, one comes back four times as slow, then well again; the
  fleet is capped to half of what it had in flight, and let go; producers pause until all is idle, and burst, twice.
- fleet-1, fleet-16: the same documents, undisturbed.
- short-1024: short documents, 1,024 in flight in one engine, in the ideal KV layout.
- tenants: two of them, backlogged 100:1.
- fixed-cap: 1,024 in flight, all of them started at once: no KV tokens, no TTFT, no controller.
- waves: the controller's limits on leases, INGEST_FEED=generate.

Measured:
- `overshoot`: of any limit, documents or KV tokens, of a worker or the fleet, by transactions over limits and counts 50
  times a second (observer.py says what that sees); `wrong_totals`: recounts of KV tokens from the leases that found
  another total.
- `ttft_p95_over_sla`: of first tokens in steady state, that is a simulated minute after each change or later, the
  worst run with the controller; simulated time from the engine's add_request. `return_s`: after a change, simulated
  seconds until the 95th percentile of every two seconds was within the SLA for good.
- `busy`: prompt and output tokens per simulated second while documents waited in the queue, over those of the same
  engines given everything under the same limits (baseline.py); the worst run with the controller. Left out: an engine
  while it is dead, and all while what it held runs in small company, as after any crash (INGEST_MAX_CRASHES), which
  is `recovery_s`; and while the fleet is capped. `busy_fixed_cap`, `busy_waves`: the same for those policies, over
  the controller's baseline.
- `jain`: Jain's index over the two tenants' tokens while both were backlogged.
- `redis_us_per_document`: CPU of the server, everything included that producers, workers and this observer ask of it.

The clock: a step of so many simulated milliseconds takes a fraction of them, 1/factor (INGEST_ENGINE_TIME_SCALE), and
nothing else is scaled. So every real delay of Redis and the courier counts `factor` times in simulated time: figures
are pessimistic by that. The exceptions are the simulation's own CPU, and what the step loop takes between two steps
while the engine has work, which counts once, as it would beside a real engine (worker.py). On a machine that is too
slow for its clock steps take longer than they should, which counts as loss. The factor, at most 20, is lowered until
the machine is less than 70 % busy; both are printed for each run.

Settings: DOCUMENTS, PLOTS (a folder; default bench-drain in the virtual environment), RUNS (names, by commas), LOGS (a
folder that is kept).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drain import analysis
from drain.baseline import Baseline, run_baseline
from drain.plots import plot
from drain.run import Run, Scenario, run
from drain.scenarios import CONTROLLER, SLA_MS, SLOWER, long_profile, scenarios
from drain.workload import LONG, documents
from report import conclude, print_table

from ingestq.workers.engines.simulated_engine import Profile

DOCUMENTS = int(os.environ.get("DOCUMENTS", "100000"))
PLOTS = Path(os.environ.get("PLOTS", Path(sys.prefix, "bench-drain")))
RUNS = os.environ.get("RUNS")
LOGS = os.environ.get("LOGS")

AT_LEAST = {"busy": 0.97, "jain": 0.95}
AT_MOST = {"overshoot": 0, "wrong_totals": 0, "lost": 0, "ttft_p95_over_sla": 1.0}


def baselines(chosen: list[Scenario]) -> dict[Profile, Baseline]:
    """What each engine that occurs does at best with its documents."""
    found: dict[Profile, Baseline] = {}
    for scenario in chosen:
        profile, number = scenario.profile, DOCUMENTS // 5
        if scenario.policy is CONTROLLER and profile not in found:
            requests = documents(scenario.workload, number)
            found[profile] = run_baseline(profile, CONTROLLER.settings, requests)
    if any(scenario.events for scenario in chosen):
        slow = long_profile(SLOWER)
        found[slow] = run_baseline(slow, CONTROLLER.settings, documents(LONG, DOCUMENTS // 20))
    for scenario in chosen:
        # Other policies, on the same machine: what the controller does at best is what it can do.
        found.setdefault(scenario.profile, found[long_profile()])
    return found


def figures_of(done: Run, found: Mapping[Profile, Baseline]) -> dict[str, Any]:
    steady = analysis.steady(done)
    return {
        "factor": done.factor,
        "busy_share": done.busy_share,
        "busy": analysis.busy(done, found),
        "tokens_per_s": analysis.tokens_per_s(done),
        "ttft_p95_ms": analysis.ttft_p95_ms(done, steady),
        "max_in_flight": done.observed.max_in_flight_worker,
        "max_kv_tokens": done.observed.max_kv_tokens_worker,
        "num_preemptions": done.num_preemptions,
        "redis_us_per_document": done.redis_us_per_document,
        "overshoot": sum(done.observed.overshoot.values()),
        "wrong_totals": done.observed.num_wrong_totals,
        "lost": done.scenario.num_documents - done.num_succeeded,
    }


def tell(done: Run, figures: Mapping[str, Any]) -> None:
    """What came of a run, on stderr: all of them take a while."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{done.scenario.name}: {told}", file=sys.stderr)
    for limit, over in done.observed.overshoot.items():
        print(f"{done.scenario.name}: {limit} exceeded by {over}", file=sys.stderr)
    sys.stderr.flush()


def print_figures(runs: Mapping[str, Run], figures: Mapping[str, Mapping[str, Any]]) -> None:
    header = ["run", "documents", "wall s", *next(iter(figures.values()))]
    print_table(
        f"Simulated engines (planned v6e-4, Gemma 4 26B), SLA {SLA_MS:g} ms; TTFT in steady state",
        header,
        (
            [name, done.scenario.num_documents, done.end - done.start, *figures[name].values()]
            for name, done in runs.items()
        ),
    )
    for name, done in runs.items():
        for what, seconds in analysis.returns(done, SLA_MS):
            print(f"  {name}: {what}: TTFT p95 within the SLA {seconds:.0f} simulated seconds later")


def conclusion(runs: Mapping[str, Run], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The last line."""
    controlled = [figures[name] for name, done in runs.items() if done.scenario.policy is CONTROLLER]
    told: dict[str, Any] = {"engine": "simulated", "documents": DOCUMENTS, "sla_ms": SLA_MS}
    if controlled:
        told |= {
            "overshoot": sum(each["overshoot"] for each in figures.values()),
            "wrong_totals": sum(each["wrong_totals"] for each in figures.values()),
            "lost": sum(each["lost"] for each in figures.values()),
            "ttft_p95_over_sla": max(each["ttft_p95_ms"] for each in controlled) / SLA_MS,
            "busy": min(each["busy"] for each in controlled),
            "preemptions": sum(each["num_preemptions"] for each in controlled),
        }
    for name, each in figures.items():
        told[f"busy_{name.replace('-', '_')}"] = each["busy"]
    for name in ("fixed-cap", "waves"):
        if name in figures:
            told[f"ttft_p95_over_sla_{name.replace('-', '_')}"] = figures[name]["ttft_p95_ms"] / SLA_MS
            told[f"preemptions_{name.replace('-', '_')}"] = figures[name]["num_preemptions"]
    if "tenants" in runs:
        told["jain"], _ = analysis.fairness(runs["tenants"])
    if "fleet-4" in runs:
        told["redis_us_per_document"] = figures["fleet-4"]["redis_us_per_document"]
        told["recovery_s"] = max(
            (analysis.simulated(runs["fleet-4"], end - start) for start, end in analysis.recovering(runs["fleet-4"])),
            default=0.0,
        )
        told["return_s"] = max((seconds for _, seconds in analysis.returns(runs["fleet-4"], SLA_MS)), default=0.0)
        told["samples"] = sum(done.observed.num_looks for done in runs.values())
    told["factors"] = {name: round(each["factor"], 2) for name, each in figures.items()}
    told["busy_shares"] = {name: round(each["busy_share"], 2) for name, each in figures.items()}
    return told


def main() -> int:
    logging.getLogger("ingestq").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers and servers must not outlive this process
    if find_spec("matplotlib") is None:
        print("the plots need matplotlib: `make bench-drain`, or install ingestq[bench]", file=sys.stderr)
        return 2
    chosen = [each for each in scenarios(DOCUMENTS) if not RUNS or each.name in RUNS.split(",")]
    found = baselines(chosen)
    runs: dict[str, Run] = {}
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ingestq-drain-") as temporary:
        for scenario in chosen:
            done = runs[scenario.name] = run(scenario, Path(LOGS or temporary))
            figures[scenario.name] = figures_of(done, found)
            tell(done, figures[scenario.name])
            plot(done, SLA_MS if scenario.policy is CONTROLLER else None, PLOTS)
    print_figures(runs, figures)
    told = conclusion(runs, figures)
    return conclude(
        told,
        at_least={name: bar for name, bar in AT_LEAST.items() if name in told},
        at_most={name: bar for name, bar in AT_MOST.items() if name in told},
    )


if __name__ == "__main__":
    sys.exit(main())
