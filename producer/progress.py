"""What people read on stderr: `progress` (a bar on a terminal, a line now and then elsewhere) and `printable` text."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# Tells documents done and, once known, documents in all.
Report = Callable[[int, int | None], None]

# Seconds between lines where there is no terminal: seldom enough for a log file, often enough to show life.
LINE_INTERVAL = 10.0


def progress(label: str, *, bar: bool | None = None) -> AbstractContextManager[Report]:
    """A context whose value is called with (done, total or None) and shows it; the last state is a line that stays.

    Args:
        bar: draw a bar; default is whether stderr is a terminal.
    """
    return _bar(label) if (sys.stderr.isatty() if bar is None else bar) else _lines(label)


def printable(text: str) -> str:
    """`text` in one line that can't drive a terminal: control, format and other invisible characters as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@contextmanager
def _bar(label: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(label, total=None, rate="")

        def report(done: int, total: int | None) -> None:
            shown.update(task, completed=done, total=total, rate=_rate(done, start))

        yield report


@contextmanager
def _lines(label: str) -> Iterator[Report]:
    start, ended = time.monotonic(), threading.Event()
    state: tuple[int, int | None] = (0, None)

    def report(done: int, total: int | None) -> None:
        nonlocal state
        state = (done, total)

    def show() -> None:
        done, total = state
        of = "" if total is None else f" of {total:,}"
        print(f"{label}: {done:,}{of} documents, {_rate(done, start)}", file=sys.stderr, flush=True)

    def show_now_and_then() -> None:
        while not ended.wait(LINE_INTERVAL):
            show()

    threading.Thread(target=show_now_and_then, daemon=True).start()
    try:
        yield report
    finally:
        ended.set()
        show()


def _rate(done: int, start: float) -> str:
    return f"{done / max(time.monotonic() - start, 1e-3):,.1f}/s"
