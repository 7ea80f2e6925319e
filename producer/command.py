"""What the `ingestq` commands share: how they open the queue, what they print, and how they end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Any

import click
import orjson
from pydantic import ValidationError

from ..common.connections import connect, durability_warnings
from ..common.errors import (
    IngestqError,
    ProducerLost,
    QueueUnavailable,
    ResultTimeout,
    SettingsError,
    UnknownGroup,
)
from ..common.settings import Settings
from .progress import printable
from .queue import IngestQueue

if TYPE_CHECKING:
    from redis import Redis


class ExitCode(IntEnum):
    """What the command tells a script."""

    # All documents accepted, all rows succeeded.
    OK = 0
    # Some documents were refused or did not succeed, or their producer died, or counts had to be mended; the rest is
    # fine.
    DOCUMENTS = 1
    # Wrong usage, or a wrong setting.
    USAGE = 2
    # Some documents have no row yet.
    OUTSTANDING = 3
    # Redis can't be reached or refuses to write.
    UNAVAILABLE = 4
    # No such group or job.
    UNKNOWN = 5
    # The plan doesn't fit its machine, or will miss its deadline.
    DOES_NOT_FIT = 6
    # Ctrl-C.
    INTERRUPTED = 130
    # The reader of our output went away.
    BROKEN_PIPE = 141


EXIT_CODES = """\b
Exit codes:
  0  all well
  1  some documents were refused, failed, or were lost with their producer; counts were mended
  2  wrong usage or setting
  3  some documents have no result yet
  4  Redis can't be reached or refuses to write
  5  no such group or job
  6  the plan doesn't fit the machine, or misses its deadline
  130  interrupted; 141 if the reader of the output went away
"""

_EXIT_CODE_OF: tuple[tuple[type[Exception], ExitCode], ...] = (
    (QueueUnavailable, ExitCode.UNAVAILABLE),
    (UnknownGroup, ExitCode.UNKNOWN),
    (ResultTimeout, ExitCode.OUTSTANDING),
    (ProducerLost, ExitCode.DOCUMENTS),
    (IngestqError, ExitCode.USAGE),
    (OSError, ExitCode.USAGE),  # the output file can't be written
    (UnicodeEncodeError, ExitCode.USAGE),  # an argument is not UTF-8
)


class Commands(click.Group):
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

            if not isinstance(error, IngestqError | RedisError | OSError | UnicodeEncodeError):
                raise
            codes = (code for kind, code in _EXIT_CODE_OF if isinstance(error, kind))
            code = next(codes, ExitCode.UNAVAILABLE)
            say(f"ingestq: {_told(error)}")
        ctx.exit(code)


def _told(error: Exception) -> str:
    # Python carries bytes of an argument that are no UTF-8 along as halves of characters.
    return f"{error.object!r} is not UTF-8" if isinstance(error, UnicodeEncodeError) else str(error)


def say(message: str) -> None:
    click.echo(printable(message), err=True)


@dataclass(frozen=True, kw_only=True)
class Session:
    settings: Settings
    connection: Redis
    queue: IngestQueue


def open_session(url: str | None, queue: str | None) -> Session:
    overrides = {name: value for name, value in (("redis_url", url), ("queue", queue)) if value is not None}
    try:
        settings = Settings.model_validate({**Settings.from_env().model_dump(), **overrides})
    except ValidationError as error:
        raise SettingsError(f"--queue {queue!r}: {error.errors()[0]['msg']}") from None
    connection = connect(settings.redis_url)
    return Session(
        settings=settings,
        connection=connection,
        queue=IngestQueue(settings.queue, connection=connection, settings=settings),
    )


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--queue", metavar="NAME", help="The RQ queue (default: INGEST_QUEUE, or 'ingest')."),
        click.option("--url", help="Redis or Valkey (default: RQ_REDIS_URL, or redis://localhost:6379/0)."),
    ):
        command = option(command)
    return command


def write_line(file: IO[bytes], line: bytes) -> None:
    file.write(line + b"\n")
    file.flush()


def print_object(fields: Mapping[str, Any]) -> None:
    """As one line of JSON."""
    try:
        line = orjson.dumps(fields)
    except TypeError:  # an integer beyond 64 bits, which somebody wrote into Redis
        line = json.dumps(fields).encode()
    print_json(line)


def print_json(line: bytes) -> None:
    write_line(sys.stdout.buffer, _for_terminal(line) if sys.stdout.isatty() else line)


def _for_terminal(line: bytes) -> bytes:
    """The same JSON; it escapes the first 32 characters only, and others can drive a terminal as well."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line.decode()).encode()


def warn(session: Session) -> list[str]:
    warnings = durability_warnings(session.connection)
    for warning in warnings:
        say(f"warning: {warning}")
    return warnings


def leave(code: ExitCode) -> None:
    click.get_current_context().exit(code)
