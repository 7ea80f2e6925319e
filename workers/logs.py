"""What is logged, and where: next to RQ's lines, and so that nobody's text can pose as one of them."""

from __future__ import annotations

import logging

# Characters of an error that are logged.
_MAX_LOGGED = 500


def one_line(text: str) -> str:
    """A text as it may be logged: whoever wrote it can neither forge a line nor drive a terminal."""
    return ascii(text[:_MAX_LOGGED])[1:-1]


def described(error: BaseException) -> str:
    """An error in one line that may be logged and shown."""
    return one_line(f"{type(error).__name__}: {error}".rstrip(": "))


def log_where_rq_logs() -> None:
    """Sends ingestq's log lines where RQ's go: its command line sets up its own loggers only."""
    rq_logger, ours = logging.getLogger("rq.worker"), logging.getLogger("ingestq")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers = list(rq_logger.handlers)
        ours.setLevel(rq_logger.level)
        ours.propagate = False
    for handler in rq_logger.handlers:
        handler.addFilter(_plain_traceback)


def _plain_traceback(record: logging.LogRecord) -> bool:
    """Lets every record pass, its traceback in lines that neither drive a terminal nor look like another record's."""
    if record.exc_info and not record.exc_text:
        lines = logging.Formatter().formatException(record.exc_info).split("\n")
        record.exc_text = "\n".join("  " + _escaped(line) for line in lines)
    return True


def _escaped(line: str) -> str:
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
