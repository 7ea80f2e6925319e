"""The `ingestq` command: documents in, rows out, and where they stand. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
from pydantic import ValidationError

from ..common.errors import RequestRefused, ResultTimeout
from ..common.schema import Sampling, Status
from .cli_failed import failed
from .cli_limits import limits
from .cli_plan import plan
from .cli_status import forgive, status
from .cli_why import why
from .command import (
    EXIT_CODES,
    Commands,
    ExitCode,
    leave,
    open_session,
    print_json,
    say,
    server_options,
    warn,
    write_line,
)
from .documents import read_documents
from .group import new_group_id
from .progress import progress
from .queue import MAX_RETRIES
from .results import iter_results


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Runs documents through a language model, by way of a queue in Redis.

    Settings come from the environment (RQ_REDIS_URL, INGEST_*); options override them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # What it says of odd pages is ours to say, one line a document.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)


for command in (plan, status, why, limits, failed, forgive):
    main.add_command(command)


# --- enqueue


@dataclass(kw_only=True)
class _Retry:
    """As `rq.Retry`, which takes half a second to import."""

    max: int
    intervals: list[int]


@main.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True, metavar="PATH... | -")
@click.option("--group", metavar="NAME", help="Name of the group (default: a new one).")
@click.option("--tenant", metavar="NAME", help="In whose turn they run (default: INGEST_TENANT, or nobody's).")
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
@server_options
def enqueue(
    paths: tuple[str, ...],
    group: str | None,
    tenant: str | None,
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
    session = open_session(url, queue)
    warn(session)
    group = new_group_id(session.settings.queue) if group is None else group
    refused = 0

    def on_refused(refusal: RequestRefused) -> None:
        nonlocal refused
        refused += 1
        say(f"refused: {refusal}")

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
                tenant=tenant,
                retry=_Retry(max=retry, intervals=list(retry_interval) or [0]) if retry else None,
                on_refused=on_refused,
                on_progress=lambda accepted: report(accepted, None),
            )
    except KeyboardInterrupt:
        say(f"interrupted; the same command with --group {group} completes the group and repeats nothing")
        raise
    say(
        f"group {done.id}: {done.num_enqueued} new, {done.num_joined} already queued or running, "
        f"{done.num_finished} already finished, {refused} refused"
    )
    click.echo(done.id)
    leave(ExitCode.DOCUMENTS if refused else ExitCode.OK)


# --- results


@main.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="GROUP")
@click.option("--follow/--no-follow", help="Wait until every document has its row (default: print those there are).")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds to follow at most.")
@click.option("-o", "--output", metavar="FILE", help="JSON lines go there, all at once at the end (default: stdout).")
@server_options
def results(
    group_id: str, follow: bool, timeout: float | None, output: str | None, url: str | None, queue: str | None
) -> None:
    """Prints the rows of a group as JSON lines, each document once, in the order in which they ended."""
    session = open_session(url, queue)
    warn(session)
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
    leave(ExitCode.DOCUMENTS if num_bad else ExitCode.OK)


@contextmanager
def _sink(path: str | None) -> Iterator[Callable[[bytes], None]]:
    """A function that writes one JSON line; a file appears complete or not at all."""
    if path is None or path == "-":
        yield print_json
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device: nothing to replace
        with open(path, "wb") as file:
            yield lambda line: write_line(file, line)
        return
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(partial, "xb") as file:
            yield lambda line: write_line(file, line)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


# --- cancel


@main.command(epilog=EXIT_CODES)
@click.argument("group_id", metavar="GROUP")
@server_options
def cancel(group_id: str, url: str | None, queue: str | None) -> None:
    """Cancels what a group still has to do; documents that somebody else submitted too go on for them."""
    session = open_session(url, queue)
    warn(session)
    done = session.queue.group(group_id).cancel()
    say(
        f"group {group_id}: {done.num_cancelled} cancelled, {done.num_left} left to others who hold them, "
        f"{done.num_terminal} had ended before"
    )
