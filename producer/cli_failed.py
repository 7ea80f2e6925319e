"""`ingestq failed`: documents that failed, and another try for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click
import orjson

from .command import EXIT_CODES, ExitCode, leave, open_session, print_json, say, server_options
from .failed import FailedDocument, FailedFilter, fetch_failed, list_failed, retry_failed
from .progress import printable

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

# Characters of an error's message in a list: a line on a wide terminal. `show` has all of it.
_MAX_MESSAGE = 160


def _age(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", value)
    if not match:
        raise click.BadParameter(f"{value!r} is not an age like 90, 30m, 12h or 7d", ctx, param)
    return float(match[1]) * _UNITS[match[2]]


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="That many at most."),
        click.option("--newer-than", callback=_age, metavar="AGE", help="Failed at most so long ago."),
        click.option(
            "--older-than", callback=_age, metavar="AGE", help="Failed so long ago: seconds, or 30m, 12h, 7d."
        ),
        click.option("--error-class", metavar="NAME", help="Failed with that error, such as WorkerLost."),
        click.option("--group", metavar="NAME", help="In that group."),
    ):
        command = option(command)
    return command


@click.group()
def failed() -> None:
    """Lists failed documents, shows why, and tries them again."""


@failed.command("list", epilog=EXIT_CODES)
@_filter_options
@click.option("--json", "as_json", is_flag=True, help="JSON lines.")
@server_options
def list_(
    group: str | None,
    error_class: str | None,
    older_than: float | None,
    newer_than: float | None,
    limit: int | None,
    as_json: bool,
    url: str | None,
    queue: str | None,
) -> None:
    """Prints one line for each document that failed or was stopped: job id, age, attempts, document, reason."""
    which = FailedFilter(group=group, error_class=error_class, older_than=older_than, newer_than=newer_than)
    for document in list_failed(open_session(url, queue).queue, which, limit=limit):
        if as_json:
            _show(document, as_json)
        else:
            click.echo(printable(_line(document)))


@failed.command(epilog=EXIT_CODES)
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB...")
@click.option("--json", "as_json", is_flag=True, help="JSON lines.")
@server_options
def show(job_ids: tuple[str, ...], as_json: bool, url: str | None, queue: str | None) -> None:
    """Prints the whole rows of failed documents, with the reason."""
    documents = fetch_failed(open_session(url, queue).queue, job_ids)
    for job_id, document in zip(job_ids, documents, strict=True):
        if document is None:
            say(f"job {job_id}: not a failed one of this queue")
        else:
            _show(document, as_json)
    leave(ExitCode.OK if all(documents) else ExitCode.DOCUMENTS)


@failed.command(epilog=EXIT_CODES)
@click.argument("job_ids", nargs=-1, metavar="[JOB...]")
@_filter_options
@click.option("--all", "every", is_flag=True, help="All of the queue.")
@server_options
def retry(
    job_ids: tuple[str, ...],
    group: str | None,
    error_class: str | None,
    older_than: float | None,
    newer_than: float | None,
    limit: int | None,
    every: bool,
    url: str | None,
    queue: str | None,
) -> None:
    """Puts failed documents back into the queue, with all their attempts.

    Those that are named, or those that the options choose. Their groups wait for them again.
    """
    chosen = (group, error_class, older_than, newer_than, limit)
    is_filtered = any(value is not None for value in chosen)
    if bool(job_ids) + is_filtered + every != 1:
        raise click.UsageError("name jobs, or choose by options, or say --all")
    num_left = 0

    def on_left(job_id: str, reason: str) -> None:
        nonlocal num_left
        num_left += 1
        say(f"left: job {job_id}: {reason}")

    which = FailedFilter(group=group, error_class=error_class, older_than=older_than, newer_than=newer_than)
    session = open_session(url, queue)
    num_retried = retry_failed(session.queue, job_ids or which, limit=limit, on_left=on_left)
    say(f"{num_retried} queued again, {num_left} left")
    leave(ExitCode.DOCUMENTS if num_left else ExitCode.OK)


def _show(document: FailedDocument, as_json: bool) -> None:
    fields = _as_json(document)
    if as_json:
        print_json(orjson.dumps(fields))
        return
    for name, value in fields.items():
        shown = " ".join(value) if name == "groups" else value
        click.echo(printable(f"{name}: {shown}"))
    click.echo()


def _line(document: FailedDocument) -> str:
    row = document.row
    age = "-" if document.age is None else f"{_shown(document.age)} ago"
    message = row.error_message or ""
    cut = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
    reason = f"{row.error_class or row.status}: {cut}"
    return f"{row.job_id}  {age}  attempts {row.attempts}  {row.document_id}  {reason}"


def _shown(seconds: float) -> str:
    for unit in "dhm":
        if seconds >= 2 * _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds:.0f}s"


def _as_json(document: FailedDocument) -> dict[str, Any]:
    failed_at = None
    if document.failed_ms is not None:
        failed_at = datetime.fromtimestamp(document.failed_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return {
        **document.row.model_dump(exclude_none=True),
        "failed_at": failed_at,
        "crashes": document.crashes,
        "groups": document.groups,
    }
