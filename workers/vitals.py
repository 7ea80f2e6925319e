"""`Vitals`: what a worker's threads promise its guardian, in memory that both processes map.

Each thread says by when it will be heard of again. The guardian reads that without the worker's help, also while a C
call holds the worker's GIL.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from enum import IntEnum
from typing import Self


class Duty(IntEnum):
    """What a deadline is for; the value is its place in the memory."""

    STEP = 0
    COURIER = 1
    HOUSEKEEPER = 2


# Seconds on CLOCK_MONOTONIC, which all processes of a machine share; 0.0: no deadline. Eight bytes are written at once.
_SLOT = struct.Struct("<d")
# Behind the deadlines, the guardian's words: not 0 when the machine is about to be preempted; and once it watches.
_PREEMPTED = len(Duty) * _SLOT.size
_WATCHED = _PREEMPTED + _SLOT.size
_SIZE = _WATCHED + _SLOT.size


class Vitals:
    """Deadlines of a worker's threads, and the guardian's word that it watches, or that the machine is about to go."""

    def __init__(self, fd: int) -> None:
        """Args:
        fd: of a file of this class's own making, in this process or inherited.
        """
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)

    @classmethod
    def create(cls) -> Self:
        """New vitals without any deadline."""
        fd = os.memfd_create("ingestq-vitals")
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def promise(self, duty: Duty, seconds: float) -> None:
        """The caller will be heard of again within `seconds`, or is hung."""
        _SLOT.pack_into(self._memory, duty * _SLOT.size, time.monotonic() + seconds)

    def release(self, duty: Duty) -> None:
        """Nothing is promised any more."""
        _SLOT.pack_into(self._memory, duty * _SLOT.size, 0.0)

    def overdue(self) -> Duty | None:
        """A duty whose deadline has passed."""
        now = time.monotonic()
        for duty in Duty:
            (deadline,) = _SLOT.unpack_from(self._memory, duty * _SLOT.size)
            if 0.0 < deadline < now:
                return duty
        return None

    @property
    def preempted(self) -> bool:
        """Whether the machine is about to be taken away."""
        return _SLOT.unpack_from(self._memory, _PREEMPTED) != (0.0,)

    def announce_preemption(self) -> None:
        _SLOT.pack_into(self._memory, _PREEMPTED, 1.0)

    @property
    def watched(self) -> bool:
        """Whether there has been a guardian at work."""
        return _SLOT.unpack_from(self._memory, _WATCHED) != (0.0,)

    def announce_watch(self) -> None:
        _SLOT.pack_into(self._memory, _WATCHED, 1.0)
