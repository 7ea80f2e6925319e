"""How often a worker was told to stop, known to other threads before its main thread knows it; when it is enough."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress


class SignalCount:
    """Counts SIGINT and SIGTERM as they arrive: Python's own handlers wait until the main thread has left C code."""

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        self._former = -1
        self._first = float("inf")

    def install(self) -> None:
        """On the main thread; elsewhere Python takes no signals."""
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._former = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

    def uninstall(self) -> None:
        if self._pipe:
            signal.set_wakeup_fd(self._former)
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    @property
    def came(self) -> bool:
        """Whether there has been one; as of the last `is_cold`."""
        return self._first != float("inf")

    def is_cold(self) -> bool:
        """Whether a second one came, a second or more after the first: RQ's sign for a cold shutdown."""
        if self._pipe is None:
            return False
        with suppress(BlockingIOError):
            if not {signal.SIGINT, signal.SIGTERM}.isdisjoint(os.read(self._pipe[0], 64)):
                self._first = min(self._first, time.monotonic())
                return time.monotonic() - self._first >= 1.0
        return False


def ignore_further_signals() -> None:
    """An impatient third Ctrl-C must not interrupt the handing back, which takes at most seconds."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
