"""`CrashReport`: what Python's faulthandler writes when a fatal signal ends the worker, for its guardian to read."""

from __future__ import annotations

import faulthandler
import os
import signal
from typing import Self

# How faulthandler names the signals that it handles.
_SIGNAL_OF = {
    b"Segmentation fault": signal.SIGSEGV,
    b"Aborted": signal.SIGABRT,
    b"Bus error": signal.SIGBUS,
    b"Floating-point exception": signal.SIGFPE,
    b"Illegal instruction": signal.SIGILL,
}

# Bytes that are read: the stacks of all threads.
_MAX_BYTES = 64 * 1024


class CrashReport:
    """A file without a name that outlives the worker."""

    def __init__(self, fd: int) -> None:
        """Args:
        fd: of a file of this class's own making, in this process or inherited.
        """
        self.fd = fd

    @classmethod
    def create(cls) -> Self:
        return cls(os.memfd_create("ingestq-crash-report"))

    def enable(self) -> None:
        """From now on a fatal signal of this process is reported here; its effect is unchanged."""
        faulthandler.enable(file=self.fd)

    def text(self) -> str:
        """The stacks of all threads, or "" if no fatal signal was caught."""
        return os.pread(self.fd, _MAX_BYTES, 0).decode(errors="replace")

    def signal(self) -> int | None:
        """The fatal signal. SIGKILL leaves no report."""
        first = os.pread(self.fd, _MAX_BYTES, 0).partition(b"\n")[0]
        return next((number for name, number in _SIGNAL_OF.items() if name in first), None)
