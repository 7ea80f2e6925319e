"""The `ingestq` command: documents in, rows out, and where they stand. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Any

import click
import orjson
from pydantic import ValidationError

from ..common import keys
from ..common.connections import connect, durability_warnings
from ..common.engine_card import live_cards
from ..common.errors import (
    IngestqError,
    ProducerLost,
    QueueUnavailable,
    RequestRefused,
    ResultTimeout,
    SettingsError,
    UnknownGroup,
)
from ..common.schema import Sampling, Status
from ..common.settings import Settings
from .documents import read_documents
from .group import new_group_id
from .progress import printable, progress
from .queue import MAX_RETRIES, IngestQueue
from .results import iter_results

if TYPE_CHECKING:
    from redis import Redis


class ExitCode(IntEnum):
    """What the command tells a script."""

    # All documents accepted, all rows succeeded.
    OK = 0
    # Some documents were refused or did not succeed, or their producer died; the rest is fine.
    DOCUMENTS = 1
    # Wrong usage, or a wrong setting.
    USAGE = 2
    # Some documents have no row yet.
    OUTSTANDING = 3
    # Redis can't be reached or refuses to write.
    UNAVAILABLE = 4
    # No such group.
    UNKNOWN_GROUP = 5
    # Ctrl-C.
    INTERRUPTED = 130
    # The reader of our output went away.
    BROKEN_PIPE = 141


EXIT_CODES = """\b
Exit codes:
  0  all well
  1  some documents were refused, failed, or were lost with their producer
  2  wrong usage or setting
  3  some documents have no result yet
  4  Redis can't be reached or refuses to write
  5  no such group
  130  interrupted; 141 if the reader of the output went away
"""

_EXIT_CODE_OF: tuple[tuple[type[Exception], ExitCode], ...] = (
    (QueueUnavailable, ExitCode.UNAVAILABLE),
    (UnknownGroup, ExitCode.UNKNOWN_GROUP),
    (ResultTimeout, ExitCode.OUTSTANDING),
    (ProducerLost, ExitCode.DOCUMENTS),
    (IngestqError, ExitCode.USAGE),
    (OSError, ExitCode.USAGE),  # the output file can't be written
)


class _Commands(click.Group):
    """Turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except BrokenPipeError:
            # Python flushes stdout once more at its end: let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = ExitCode.BROKEN_PIPE
        except Exception as error:
            from redis.exceptions import RedisError

            if not isinstance(error, IngestqError | RedisError | OSError):
                raise
            codes = (code for kind, code in _EXIT_CODE_OF if isinstance(error, kind))
            code = next(codes, ExitCode.UNAVAILABLE)
            _say(f"ingestq: {error}")
        ctx.exit(code)


def _say(message: str) -> None:
    click.echo(printable(message), err=True)


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Runs documents through a language model, by way of a queue in Redis.

    Settings come from the environment (RQ_REDIS_URL, INGEST_*); options override them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # What it says of odd pages is ours to say, one line a document.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class _Session:
    settings: Settings
    connection: Redis
    queue: IngestQueue


def _open(url: str | None, queue: str | None) -> _Session:
    overrides = {name: value for name, value in (("redis_url", url), ("queue", queue)) if value is not None}
    try:
        settings = Settings.model_validate({**Settings.from_env().model_dump(), **overrides})
    except ValidationError as error:
        raise SettingsError(f"--queue {queue!r}: {error.errors()[0]['msg']}") from None
    connection = connect(settings.redis_url)
    return _Session(
        settings=settings,
        connection=connection,
        queue=IngestQueue(settings.queue, connection=connection, settings=settings),
    )


def _server_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--queue", metavar="NAME", help="The RQ queue (default: INGEST_QUEUE, or 'ingest')."),
        click.option("--url", help="Redis or Valkey (default: RQ_REDIS_URL, or redis://localhost:6379/0)."),
    ):
        command = option(command)
    return command


# --- enqueue


@dataclass(kw_only=True)
class _Retry:
    """As `rq.Retry`, which takes half a second to import."""

    max: int
    intervals: list[int]


@main.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True, metavar="PATH... | -")
@click.option("--group", metavar="NAME", help="Name of the group (default: a new one).")
@click.option("--model", help="The model's name as its workers serve it (default: INGEST_MODEL_NAME or INGEST_MODEL).")
@click.option("--instruction", metavar="TEXT", help="What to do with each document; goes before its text.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(1, 1_000_000), default=256, show_default=True, help="Output at most.")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0: greedy.")
@click.option("--no-chat", is_flag=True, help="Send the text as it is, without the model's chat template.")
@click.option(
    "--retry", type=click.IntRange(1, MAX_RETRIES), metavar="N", help="More attempts for a document that fails."
)
@click.option(
    "--retry-interval",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="S",
    help="Seconds before such an attempt (default: 0); one for each, or the last for all that follow.",
)
@_server_options
def enqueue(
    paths: tuple[str, ...],
    group: str | None,
    model: str | None,
    instruction: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    no_chat: bool,
    retry: int | None,
    retry_interval: tuple[int, ...],
    url: str | None,
    queue: str | None,
) -> None:
    """Queues documents and prints their group's id.

    PATH is a file (.jsonl, .txt, .md, .html, .htm), a folder, a quoted glob, or - for JSON lines on standard input: one
    object a line with "text" and, if wanted, "document_id", "instruction", "system". The same document with the same
    options is queued once, however often it is submitted.
    """
    if retry_interval and retry is None:
        raise click.UsageError("--retry-interval needs --retry")
    session = _open(url, queue)
    _warn(session)
    group = new_group_id(session.settings.queue) if group is None else group
    refused = 0

    def on_refused(refusal: RequestRefused) -> None:
        nonlocal refused
        refused += 1
        _say(f"refused: {refusal}")

    try:
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    except ValidationError as error:  # click lets a temperature of nan pass
        raise click.UsageError(error.errors()[0]["msg"]) from None
    requests = read_documents(
        paths,
        model=model or session.settings.served_model,
        sampling=sampling,
        system=system,
        instruction=instruction,
        chat=not no_chat,
        on_refused=on_refused,
    )
    try:
        with progress("enqueue") as report:
            done = session.queue.enqueue_many(
                requests,
                group_id=group,
                retry=_Retry(max=retry, intervals=list(retry_interval) or [0]) if retry else None,
                on_refused=on_refused,
                on_progress=lambda accepted: report(accepted, None),
            )
    except KeyboardInterrupt:
        _say(f"interrupted; the same command with --group {group} completes the group and repeats nothing")
        raise
    _say(
        f"group {done.id}: {done.num_enqueued} new, {done.num_joined} already queued or running, "
        f"{done.num_finished} already finished, {refused} refused"
    )
    click.echo(done.id)
    _exit(ExitCode.DOCUMENTS if refused else ExitCode.OK)


# --- results


@main.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="GROUP")
@click.option("--follow/--no-follow", help="Wait until every document has its row (default: print those there are).")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds to follow at most.")
@click.option("-o", "--output", metavar="FILE", help="JSON lines go there, all at once at the end (default: stdout).")
@_server_options
def results(
    group_id: str, follow: bool, timeout: float | None, output: str | None, url: str | None, queue: str | None
) -> None:
    """Prints the rows of a group as JSON lines, each document once, in the order in which they ended."""
    session = _open(url, queue)
    _warn(session)
    group = session.queue.group(group_id)
    num_rows = num_bad = 0
    outstanding: ResultTimeout | None = None
    rows = iter_results(group, timeout=timeout if follow else 0)
    num_members = group.num_members
    # A bar would fall between the rows where they go to the same terminal.
    bar = sys.stderr.isatty() and not (output in (None, "-") and sys.stdout.isatty())
    with _sink(output) as write, progress("results", bar=bar) as report:
        report(0, num_members)
        try:
            for row in rows:
                write(row.to_json())
                num_rows += 1
                num_bad += row.status is not Status.SUCCEEDED
                report(num_rows, max(num_members, rows.num_members, num_rows))
        except ResultTimeout as error:
            outstanding = error  # the rows so far are good: the file is kept
    if outstanding:
        raise outstanding
    _exit(ExitCode.DOCUMENTS if num_bad else ExitCode.OK)


@contextmanager
def _sink(path: str | None) -> Iterator[Callable[[bytes], None]]:
    """A function that writes one JSON line; a file appears complete or not at all."""
    if path is None or path == "-":
        yield _print_json
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device: nothing to replace
        with open(path, "wb") as file:
            yield lambda line: _write(file, line)
        return
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(partial, "xb") as file:
            yield lambda line: _write(file, line)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _write(file: IO[bytes], line: bytes) -> None:
    file.write(line + b"\n")
    file.flush()


def _print_json(line: bytes) -> None:
    _write(sys.stdout.buffer, _for_terminal(line) if sys.stdout.isatty() else line)


def _for_terminal(line: bytes) -> bytes:
    """The same JSON; it escapes the first 32 characters only, and others can drive a terminal as well."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line.decode()).encode()


# --- status and cancel


@main.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="[GROUP]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_server_options
def status(group_id: str | None, as_json: bool, url: str | None, queue: str | None) -> None:
    """Shows where a group stands; without one, the queue and its workers."""
    session = _open(url, queue)
    warnings = _warn(session)
    state = {**(_queue_state(session) if group_id is None else _group_state(session, group_id)), "warnings": warnings}
    if as_json:
        _print_json(orjson.dumps(state))
    else:
        _show(state)


def _group_state(session: _Session, group_id: str) -> dict[str, Any]:
    group = session.queue.group(group_id)
    states = group.counts()
    return {
        "group": group_id,
        "sealed": group.is_sealed,
        "documents": sum(states.values()),
        "terminal": sum(states[status] for status in Status),
        "states": states,
    }


def _queue_state(session: _Session) -> dict[str, Any]:
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
    return {
        "queue": name,
        "queued": queued,
        "running": running,
        "scheduled": scheduled,
        "finished": finished,
        "failed": failed,
        "cancelled": cancelled,
        "suspended": bool(suspended),
        "workers": [{"name": worker, **card.model_dump()} for worker, card in sorted(cards.items())],
    }


def _show(state: dict[str, Any]) -> None:
    for name, value in state.items():
        if name == "workers":
            click.echo(f"workers: {len(value)}")
            for card in value:
                click.echo(
                    "  "
                    + printable(
                        f"{card['name']}: {card['model']} on {card['device']}, {card['engine']}, "
                        f"max_model_len {card['max_model_len']}, max_num_seqs {card['max_num_seqs']}"
                    )
                )
        elif name == "states":
            for word, count in sorted(value.items()):
                click.echo(f"  {word}: {count}")
        elif name != "warnings":
            click.echo(f"{name}: {printable(str(value))}")


@main.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="GROUP")
@_server_options
def cancel(group_id: str, url: str | None, queue: str | None) -> None:
    """Cancels what a group still has to do; documents that somebody else submitted too go on for them."""
    session = _open(url, queue)
    _warn(session)
    done = session.queue.group(group_id).cancel()
    _say(
        f"group {group_id}: {done.num_cancelled} cancelled, {done.num_left} left to others who hold them, "
        f"{done.num_terminal} had ended before"
    )


def _warn(session: _Session) -> list[str]:
    warnings = durability_warnings(session.connection)
    for warning in warnings:
        _say(f"warning: {warning}")
    return warnings


def _exit(code: ExitCode) -> None:
    click.get_current_context().exit(code)
