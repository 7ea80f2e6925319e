"""Facts about processes from /proc: which one it is, how it ended, which ones a worker left behind. Linux only."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

# struct pidfd_info of linux/pidfd.h in its first, 64 byte form (mask, cgroup, eleven ids, exit status), and its ioctl.
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 0xC040FF0B

# Seconds to wait for killed processes to be gone: they free gigabytes, and accelerators.
_REAP_TIMEOUT = 30.0


def identity(pid: int) -> str:
    """Names a process for good: boot/PID namespace/PID/start time. "" where that can't be told.

    A PID alone is no name: it is used again, and every container has its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{pid}/{_stat(pid)[19]}"
    except (OSError, IndexError):
        return ""


def is_dead(process: str) -> bool:
    """Whether the process that `identity` named is surely gone. False for one of another machine or namespace."""
    here, parts = identity(os.getpid()).split("/"), process.split("/")
    if len(parts) != 4 or parts[:2] != here[:2] or not parts[2].isdecimal():
        return False
    pid = int(parts[2])
    try:
        return identity(pid) != process or _stat(pid)[0] in ("Z", "X")
    except (OSError, IndexError):  # it went in between
        return True


class Watched:
    """A process of which one wants to know how it ends, without being its parent."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Args:
        pidfd: opened while the process ran; it still tells of it when its PID doesn't.
        """
        self._pid = pid
        self._pidfd = pidfd

    def has_ended(self, timeout: float) -> bool:
        """Whether it has ended, waiting up to `timeout` seconds."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1e3))

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def exit_status(self) -> int | None:
        """As `os.waitpid` gives it; None if the process runs, or if its parent has made it forgotten."""
        if (status := self._kept_status()) is not None:
            return status
        with suppress(OSError, IndexError, ValueError):
            stat = _stat(self._pid)
            return int(stat[49]) if stat[0] in ("Z", "X") or int(stat[49]) else None
        return None

    def _kept_status(self) -> int | None:
        """What Linux >= 6.15 keeps for whoever has a pidfd (PIDFD_GET_INFO of linux/pidfd.h), or None."""
        info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
        with suppress(OSError):
            fcntl.ioctl(self._pidfd, _PIDFD_GET_INFO, info)
            mask, *_, status = _PIDFD_INFO.unpack(info)
            return status if mask & _PIDFD_INFO_EXIT else None
        return None


def told(status: int) -> str:
    """An exit status in words: "killed by signal 9 (SIGKILL)"."""
    if os.WIFSIGNALED(status):
        return signal_told(os.WTERMSIG(status))
    return f"exited with code {os.WEXITSTATUS(status)}"


def signal_told(number: int) -> str:
    with suppress(ValueError):
        return f"killed by signal {number} ({signal.Signals(number).name})"
    return f"killed by signal {number}"


def descendants(pids: Collection[int]) -> set[str]:
    """Identities of the children of processes, of their children, and so on.

    By parentage, as it is now: a process title that was set (vLLM's are) has overwritten the environment in /proc.
    """
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError, ValueError):  # it is gone
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    family = set(pids)
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return {name for pid in family.difference(pids) if (name := identity(pid))}


def kill_all(family: Collection[str], spare: str = "") -> int:
    """Kills processes that `identity` named, and their descendants; returns, once they are gone, how many there were.

    Args:
        spare: one of them that is left alone, with its own.
    """
    living = {name for name in family if not is_dead(name)}
    living = (living | descendants({_pid(name) for name in living})) - {spare}
    for name in living:
        with suppress(ProcessLookupError):
            os.kill(_pid(name), signal.SIGKILL)
    deadline = time.monotonic() + _REAP_TIMEOUT
    while not all(map(is_dead, living)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(living)


def _pid(name: str) -> int:
    return int(name.split("/")[2])


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the second is the program's name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
