"""`ingestq status` and `ingestq forgive`: where everything stands, and what to do about a machine that refuses work."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click
import orjson

from ..common import keys, machine_health
from ..common.engine_card import live_cards
from ..common.errors import SettingsError
from ..common.machine_health import read_health
from ..common.schema import SCHEMA_VERSION, Status
from .command import EXIT_CODES, Session, open_session, print_json, say, server_options, warn
from .progress import printable

if TYPE_CHECKING:
    from redis import Redis

# Queued documents that are looked at for the worker that they need.
_HEAD = 128

# What an engine card may say besides (see `EngineCard`), and how it is shown.
_FOUND = {
    "kv_cache_dtype": "KV cache {}",
    "num_kv_tokens": "{} tokens",
    "num_blocks": "{} blocks",
    "block_size": "of {} tokens",
    "prefill_tokens_per_s": "prefill {:.0f} tokens/s",
    "decode_tokens_per_s": "decode {:.0f} tokens/s",
    "recompiles": "{} recompiles since it was ready",
    "num_preemptions": "{} preemptions",
    "draft_acceptance": "{:.0%} of speculative tokens accepted",
}


@click.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="[GROUP]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@server_options
def status(group_id: str | None, as_json: bool, url: str | None, queue: str | None) -> None:
    """Shows where a group stands; without one, the queue, its workers, and the machines whose engines failed."""
    session = open_session(url, queue)
    warnings = warn(session)
    state = {**(_queue_state(session) if group_id is None else _group_state(session, group_id)), "warnings": warnings}
    if as_json:
        print_json(orjson.dumps(state))
    else:
        _show(state)


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


def _queue_state(session: Session) -> dict[str, Any]:
    name, connection = session.settings.queue, session.connection
    now = connection.time()[0]
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.llen(keys.queue(name))
        pipeline.zcard(keys.started(name))
        pipeline.zcard(keys.scheduled(name))
        for registry in (keys.finished(name), keys.failed(name), keys.canceled(name)):
            pipeline.zcount(registry, now, "+inf")
        pipeline.exists(keys.suspended())
        queued, running, scheduled, finished, failed, cancelled, suspended = pipeline.execute()
    cards = live_cards(connection, name)
    health = read_health(connection, name)
    return {
        "queue": name,
        "queued": queued,
        "running": running,
        "scheduled": scheduled,
        "finished": finished,
        "failed": failed,
        "cancelled": cancelled,
        "suspended": bool(suspended),
        "for_newer_workers": _num_for_newer_workers(connection, name),
        "workers": [{"name": worker, **card.model_dump()} for worker, card in sorted(cards.items())],
        "machines": [
            {"name": machine, "takes_no_work": one.refuses, **asdict(one)} for machine, one in sorted(health.items())
        ],
    }


def _num_for_newer_workers(connection: Redis, queue: str) -> int:
    """How many of the first documents in the queue wait for workers of a release later than this one."""
    with connection.pipeline(transaction=False) as pipeline:
        for job_id in cast(list[bytes], connection.lrange(keys.queue(queue), 0, _HEAD - 1)):
            pipeline.hget(keys.job(job_id.decode(errors="replace")), "schema")
        schemas = pipeline.execute(raise_on_error=False)
    versions = [int(schema) for schema in schemas if isinstance(schema, bytes) and schema.isdigit() and len(schema) < 4]
    return sum(version > SCHEMA_VERSION for version in versions)


def _show(state: dict[str, Any]) -> None:
    for name, value in state.items():
        if name == "workers":
            click.echo(f"workers: {len(value)}")
            for card in value:
                for line in _worker_told(card):
                    click.echo(f"  {printable(line)}")
        elif name == "machines":
            for machine in value:
                click.echo(f"machine {printable(_machine_told(machine))}")
        elif name == "for_newer_workers":
            if value:
                click.echo(f"of the first {_HEAD} queued, {value} wait for a worker of a newer release")
        elif name == "states":
            for word, count in sorted(value.items()):
                click.echo(f"  {word}: {count}")
        elif name != "warnings":
            click.echo(f"{name}: {printable(str(value))}")


def _worker_told(card: dict[str, Any]) -> list[str]:
    """One line on a worker's engine, and one on what its warm-up found and has been counted since, if it says so."""
    lines = [
        f"{card['name']}: {card['model']} on {card['device']}, {card['engine']}, "
        f"max_model_len {card['max_model_len']}, max_num_seqs {card['max_num_seqs']}"
    ]
    found = [form.format(card[name]) for name, form in _FOUND.items() if card[name] is not None]
    return [*lines, f"  {', '.join(found)}"] if found else lines


def _machine_told(machine: dict[str, Any]) -> str:
    failures = machine["start_failures"] + machine["run_failures"]
    state = "takes no work" if machine["takes_no_work"] else "backs off between starts"
    return f"{machine['name']}: {state}: {failures} failures in a row, the last: {machine['reason']}"


@click.command(epilog=EXIT_CODES)
@click.argument("machine", metavar="MACHINE")
@server_options
def forgive(machine: str, url: str | None, queue: str | None) -> None:
    """Forgets the engine failures of a machine that was mended: its workers start at once."""
    session = open_session(url, queue)
    if not machine_health.forgive(session.connection, session.settings.queue, machine):
        raise SettingsError(f"machine {machine!r} has no failures on record; `ingestq status` lists those that have")
    say(f"machine {machine}: forgiven")
