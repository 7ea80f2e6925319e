"""`ingestq limits`: how much of a queue may be in flight, shown beside what is, changed while workers run."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from ..common import scripts
from ..common.connections import persist
from ..common.engine_card import EngineCard, live_cards
from ..common.errors import SettingsError
from ..common.limits import LIMITS, AdmissionLimits, read_limits, update_limits
from .command import EXIT_CODES, ExitCode, leave, open_session, print_object, say, server_options
from .fleet import Fleet, read_fleet
from .group import PATIENCE
from .progress import printable
from .units import beside

# What each bounds.
_BOUNDED = {
    "max_in_flight": "documents that one worker has leased",
    "max_in_flight_fleet": "documents leased from the queue",
    "max_kv_tokens": "KV tokens reserved by one worker",
    "max_kv_tokens_fleet": "KV tokens reserved for the queue's documents",
    "ttft_sla_ms": "time to first token in ms, p95 of a worker",
}
# Those beyond which a document is failed, if it needs more by itself.
_OF_KV_TOKENS = ("max_kv_tokens", "max_kv_tokens_fleet")

# Those that need not be whole.
_FRACTIONAL = ("ttft_sla_ms",)

# The word for no bound.
_NONE = "none"

# Columns where there is no terminal, and at most.
_WIDTH = 100


class _Default(click.Group):
    """Shows where no subcommand is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Default)
def limits() -> None:
    """Shows and changes how much may be in flight; without a subcommand it is `limits show`."""


@limits.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@server_options
def show(as_json: bool, url: str | None, queue: str | None) -> None:
    """Shows each limit, where it comes from, and what is in flight against it now.

    A limit that is not set in Redis bounds nothing there; the workers' own settings hold all the same.
    """
    session = open_session(url, queue)
    fleet = read_fleet(session.connection, session.settings.queue)
    if as_json:
        print_object(_as_json(fleet))
    else:
        click.echo(_render(fleet, min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)))


def _as_json(fleet: Fleet) -> dict[str, Any]:
    return {
        "queue": fleet.queue,
        "limits": {name: {"value": value, "from": _source(value)} for name, value in asdict(fleet.limits).items()},
        "in_flight": asdict(fleet.held),
        "workers": {
            name: {**asdict(held), "ttft_p95_ms": fleet.loads[name].ttft_p95_ms if name in fleet.loads else None}
            for name, held in sorted(fleet.workers.items())
        },
    }


def _render(fleet: Fleet, width: int) -> str:
    lines = [f"queue: {fleet.queue}", f"{'limit':<20} {'value':>12}  from"]
    against = _against(fleet)
    for name, value in asdict(fleet.limits).items():
        shown = _NONE if value is None else f"{value:,.10g}" if name in _FRACTIONAL else f"{value:,}"
        head = f"{name:<20} {shown:>12}  {_source(value):<5}  "
        lines.append(beside(head, f"{_BOUNDED[name]}: {printable(against[name])}", width))
    return "\n".join(lines)


def _against(fleet: Fleet) -> dict[str, str]:
    """Limit -> what is in flight against it now."""
    workers = sorted(fleet.workers.items())
    waits = [(name, load.ttft_p95_ms) for name, load in sorted(fleet.loads.items())]
    return {
        "max_in_flight": _each([f"{name}={held.documents:,}" for name, held in workers]),
        "max_in_flight_fleet": f"{fleet.held.documents:,}",
        "max_kv_tokens": _each([f"{name}={held.kv_tokens:,}" for name, held in workers]),
        "max_kv_tokens_fleet": f"{fleet.held.kv_tokens:,}",
        "ttft_sla_ms": _each([f"{name}={_known(wait)}" for name, wait in waits]),
    }


def _each(told: Sequence[str]) -> str:
    return ", ".join(told) or "no worker"


def _known(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _source(value: float | None) -> str:
    return "unset" if value is None else "Redis"


# --- set


@limits.command("set", epilog=EXIT_CODES)
@click.argument("changes", nargs=-1, required=True, metavar="NAME=VALUE...")
@server_options
def set_(changes: tuple[str, ...], url: str | None, queue: str | None) -> None:
    """Sets limits, all at once, in force with the next lease of any worker; VALUE is a number, or "none".

    What is in flight above a lowered limit ends as it would have; nothing new is taken until there is room. With 0
    nothing is admitted (ttft_sla_ms: there is no bound). A document that by itself needs more KV tokens than a limit
    above 0 is failed, as KvLimitExceeded.

    \b
    max_in_flight        documents that one worker has leased
    max_in_flight_fleet  documents leased from the queue, all workers together
    max_kv_tokens        KV tokens reserved by one worker: prompts and expected output
    max_kv_tokens_fleet  KV tokens reserved for the queue's documents, all workers together
    ttft_sla_ms          milliseconds within which first tokens are to come (INGEST_TTFT_PERCENTILE of them)
    """
    parsed = parse_changes(changes)
    session = open_session(url, queue)
    name = session.settings.queue
    before = asdict(persist(lambda: read_limits(session.connection, name), patience=PATIENCE))
    persist(lambda: update_limits(session.connection, name, parsed), patience=PATIENCE)
    for limit, value in parsed.items():
        say(f"queue {name}: {limit} {_shown(value)}, was {_shown(before[limit])}")
    for warning in _warnings(parsed, live_cards(session.connection, name).values()):
        say(f"warning: {warning}")


def _warnings(changes: Mapping[str, int | float | None], cards: Iterable[EngineCard]) -> Iterator[str]:
    """Limits under which documents are failed that a live worker's engine could run."""
    longest = max((card.max_model_len for card in cards), default=0)
    for limit, value in changes.items():
        if limit in _OF_KV_TOKENS and value and value < longest:
            yield (
                f"{limit} is {value:,}, and the engines run documents of up to {longest:,} tokens: those that need "
                f"more than the limit by themselves are failed (KvLimitExceeded)"
            )


def parse_changes(changes: Sequence[str]) -> dict[str, int | float | None]:
    """Limits by name, from NAME=VALUE; None for "none".

    Raises:
        SettingsError: a name is unknown, named twice, or its value is no number or out of bounds.
    """
    parsed: dict[str, int | float | None] = {}
    for change in changes:
        name, sign, raw = change.partition("=")
        if name not in LIMITS:
            close = difflib.get_close_matches(name, LIMITS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"limits are {', '.join(LIMITS)}"
            raise SettingsError(f"{name!r} is not a limit; {hint}")
        if not sign:
            raise SettingsError(f"{name} needs a value: {name}=NUMBER, or {name}={_NONE}")
        if name in parsed:
            raise SettingsError(f"{name} is named twice; name it once")
        parsed[name] = None if raw.strip().lower() == _NONE else _number(name, raw)
    return parsed


def _number(name: str, raw: str) -> int | float:
    """A limit within its bounds, which are those of `AdmissionLimits`."""
    try:
        value = float(raw) if name in _FRACTIONAL else int(raw)
    except ValueError:
        kind = "a number" if name in _FRACTIONAL else "a whole number"
        raise SettingsError(f"{name}={raw}: not {kind}; or {name}={_NONE} for no bound") from None
    bounded: dict[str, Any] = {name: value}
    AdmissionLimits(**bounded)
    return value


def _shown(value: float | None) -> str:
    return _NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# --- check


@limits.command(epilog=EXIT_CODES)
@server_options
def check(url: str | None, queue: str | None) -> None:
    """Counts again what is reserved, lease by lease, and mends the totals that the limits are held against.

    They can differ where other tools deleted leases or their records. Exit code 1 if they did.
    """
    session = open_session(url, queue)
    name = session.settings.queue
    found = persist(lambda: scripts.recount(session.connection, name), patience=PATIENCE)
    told = f"queue {name}: {found.num_leases:,} leases have {found.kv_tokens_counted:,} KV tokens reserved"
    if found.kv_tokens_counted == found.kv_tokens_held:
        say(f"{told}, and so says the total")
        return
    say(f"{told}; the total said {found.kv_tokens_held:,}, which is mended")
    leave(ExitCode.DOCUMENTS)
