"""`ingestq status` and `ingestq forgive`: where everything stands, and what to do about a machine that refuses work."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import click

from ..common import keys, machine_health
from ..common.errors import SettingsError
from ..common.schema import Status
from ..common.worker_load import WorkerLoad
from .command import EXIT_CODES, Session, open_session, print_object, say, server_options, warn
from .fleet import Backlog, Fleet, read_fleet
from .progress import printable
from .status_report import render_queue

# Columns where there is no terminal.
_WIDTH = 100

# Seconds between two looks: workers say how they do every other second.
_WATCH = 2.0

# Shares of the speculative tokens that were accepted under which speculation gains too little, and costs more than it
# gains: each rejected token was computed for nothing, and async scheduling was given up for it (issue 5).
_LOW_ACCEPTANCE, _BAD_ACCEPTANCE = 0.6, 0.4


@click.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="[GROUP]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; one a line with --watch.")
@click.option(
    "--watch",
    is_flag=False,
    flag_value=str(_WATCH),
    type=click.FloatRange(min=0.1, max=86400),
    metavar="[S]",
    help=f"Again every S seconds ({_WATCH:g}), until Ctrl-C.",
)
@server_options
def status(group_id: str | None, as_json: bool, watch: float | None, url: str | None, queue: str | None) -> None:
    """Shows where a group stands; without one, the queue, its limits and workers, and machines whose engines failed."""
    session = open_session(url, queue)
    warnings = warn(session)

    def look() -> dict[str, Any]:
        state = _queue_state(session) if group_id is None else _group_state(session, group_id)
        return {**state, "warnings": warnings}

    _print(look(), as_json)
    while watch is not None:
        time.sleep(watch)
        state = look()
        if not as_json:
            _clear()
        _print(state, as_json)


def _clear() -> None:
    """Makes place for the next look; a file keeps them all."""
    if sys.stdout.isatty():
        click.clear()
    else:
        click.echo()


def _print(state: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_object(state)
    elif "group" in state:
        _show_group(state)
    else:
        click.echo(render_queue(state, shutil.get_terminal_size((_WIDTH, 0)).columns))


# --- a group


def _group_state(session: Session, group_id: str) -> dict[str, Any]:
    group = session.queue.group(group_id)
    states = group.counts()
    return {
        "group": group_id,
        "sealed": group.is_sealed,
        "documents": sum(states.values()),
        "terminal": sum(states[status] for status in Status),
        "states": states,
    }


def _show_group(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if name == "states":
            for word, count in sorted(value.items()):
                click.echo(f"  {word}: {count}")
        elif name != "warnings":
            click.echo(f"{name}: {printable(str(value))}")


# --- the queue


def _queue_state(session: Session) -> dict[str, Any]:
    fleet = read_fleet(session.connection, session.settings.queue)
    return {
        "queue": fleet.queue,
        "queued": fleet.queued,
        "oldest_s": fleet.oldest,
        "eta_s": fleet.eta,
        "running": fleet.held.documents,
        **_registries(session, int(fleet.now)),
        "suspended": fleet.suspended,
        "for_newer_workers": sum(backlog.num_newer for backlog in fleet.backlogs.values()),
        "tenants": {tenant: _tenant(backlog) for tenant, backlog in sorted(fleet.backlogs.items())},
        "fleet": _fleet(fleet),
        "workers": [_worker(fleet, name) for name in sorted(fleet.workers)],
        "machines": [
            {"name": machine, "takes_no_work": one.refuses, **asdict(one)}
            for machine, one in sorted(fleet.machines.items())
        ],
    }


def _registries(session: Session, now: int) -> dict[str, int]:
    name = session.settings.queue
    with session.connection.pipeline(transaction=False) as pipeline:
        pipeline.zcard(keys.scheduled(name))
        for registry in (keys.finished(name), keys.failed(name), keys.canceled(name)):
            pipeline.zcount(registry, now, "+inf")
        counts = pipeline.execute()
    return dict(zip(("scheduled", "finished", "failed", "cancelled"), counts, strict=True))


def _tenant(backlog: Backlog) -> dict[str, Any]:
    return {"queued": backlog.queued, "oldest_s": backlog.oldest, "tokens_served": backlog.tokens_served}


def _fleet(fleet: Fleet) -> dict[str, Any]:
    loads = list(fleet.loads.values())
    return {
        "in_flight": fleet.held.documents,
        "kv_tokens": fleet.held.kv_tokens,
        "limits": asdict(fleet.limits),
        "closed": [closed.model_dump() for closed in fleet.closed],
        "num_live": len(loads),
        "prefill_tokens_per_s": _over(loads, "prefill_tokens_per_s", sum),
        "decode_tokens_per_s": _over(loads, "decode_tokens_per_s", sum),
        # Of the slowest worker: quantiles can't be put together.
        "ttft_p50_ms": _over(loads, "ttft_p50_ms", max),
        "ttft_p95_ms": _over(loads, "ttft_p95_ms", max),
        "ttft_p99_ms": _over(loads, "ttft_p99_ms", max),
        "queue_p50_ms": _over(loads, "queue_p50_ms", max),
        "queue_p95_ms": _over(loads, "queue_p95_ms", max),
        "documents_per_s": fleet.documents_per_s,
        "tokens_per_s": sum(load.tokens_per_s for load in loads),
        "num_preemptions": sum(load.num_preemptions for load in loads),
    }


def _over(loads: list[WorkerLoad], name: str, combine: Callable[[list[float]], float]) -> float | None:
    """One figure of all workers that know it; None if none does."""
    known = [value for load in loads if (value := getattr(load, name)) is not None]
    return combine(known) if known else None


def _worker(fleet: Fleet, name: str) -> dict[str, Any]:
    card, load, held = fleet.cards.get(name), fleet.loads.get(name), fleet.workers[name]
    acceptance = load.draft_acceptance if load else card.draft_acceptance if card else None
    return {
        "name": name,
        **(card.model_dump() if card else {}),
        "in_flight": held.documents,
        "kv_tokens": held.kv_tokens,
        "load": load.model_dump() if load else None,
        "advice": speculation_advice(acceptance),
    }


def speculation_advice(acceptance: float | None) -> list[str]:
    """What to do about speculative decoding.

    Args:
        acceptance: share of the speculative tokens that were accepted, 0 to 1; None without speculation.
    """
    if acceptance is None or acceptance >= _LOW_ACCEPTANCE:
        return []
    found = f"{acceptance:.0%} of the speculative tokens were accepted"
    if acceptance >= _BAD_ACCEPTANCE:
        return [f"{found}: below {_LOW_ACCEPTANCE:.0%} speculation gains little; try fewer num_speculative_tokens."]
    return [
        f"{found}: below {_BAD_ACCEPTANCE:.0%} speculation costs more than it gains.",
        "Turn it off: take speculative_config out of the engine's configuration.",
    ]


@click.command(epilog=EXIT_CODES)
@click.argument("machine", metavar="MACHINE")
@server_options
def forgive(machine: str, url: str | None, queue: str | None) -> None:
    """Forgets the engine failures of a machine that was mended: its workers start at once."""
    session = open_session(url, queue)
    if not machine_health.forgive(session.connection, session.settings.queue, machine):
        raise SettingsError(f"machine {machine!r} has no failures on record; `ingestq status` lists those that have")
    say(f"machine {machine}: forgiven")
