"""The guardian: a small process beside each worker that outlives it.

It renews the worker's leases, so that no C call that holds the worker's GIL can let them lapse; kills a worker that
is hung; and when the worker is gone without a farewell, however it went, hands its leases back within milliseconds and
ends the engine processes that it left behind. `Guardian` is the worker's side, `main` the process's.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis import ConnectionPool, Redis
from redis.exceptions import RedisError

from ..common import scripts
from ..common.machine_health import Phase, record_failure
from . import preemption, processes
from .crash_report import CrashReport
from .vitals import Duty, Vitals

logger = logging.getLogger(__name__)

# Seconds to wait for an answer of Redis: while it waits, the guardian doesn't see the worker die.
_SOCKET_TIMEOUT = 5.0

# Seconds that a guardian may take to start: it imports redis-py, on a machine that may be at full load.
_START_TIMEOUT = 30.0

# Seconds between two starts of a guardian, should it die at once each time.
_RESTART_INTERVAL = 2.0

# Seconds between looks at the worker's vitals.
_LOOK = 0.25

# Seconds between two looks, longer than an answer of Redis takes, after which the guardian judges nobody; and how long.
_TOO_LONG, _RECOVERY = 3 * _SOCKET_TIMEOUT, 2.0

# Seconds between looks at the worker's child processes: some 10 us of CPU for each process of the machine.
_FAMILY_INTERVAL = 1.0

# Seconds after a notice of preemption until a worker that still runs is killed: its leases must be back in five.
_PREEMPTION_GRACE = 3.5

# Seconds that a worker may take to be gone once it has closed its end of the pipe.
_EXIT_TIMEOUT = 10.0

# Seconds between attempts to hand leases back while Redis is away.
_OUTAGE_WAIT = 0.5

# It works for milliseconds, when it matters most on a machine at full load.
_NICENESS = -10

# What the worker may say; each is a word. And what goes before the identity of a process that it started.
_CHILD = b"child="
_READY, _STOPPING, _BYE = b"ready", b"stopping", b"bye"

_HUNG = {
    Duty.STEP: "an engine step took longer than INGEST_STEP_TIMEOUT, or a wave than INGEST_DOCUMENT_TIMEOUT",
    Duty.COURIER: "its courier thread, which prepares documents, was not heard of",
    Duty.HOUSEKEEPER: "it was not heard of: stopped, or something holds its GIL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ward:
    """All that a guardian needs to know of its worker."""

    pid: int
    worker: str
    # Tells this worker from others that had or will have its name.
    incarnation: str
    # In order of priority.
    queues: tuple[str, ...]
    machine: str
    lease_ttl: float
    # Seconds that RQ's record of the worker lasts.
    worker_ttl: int
    failure_ttl: int
    max_crashes: int
    max_failures: int
    preemption_url: str | None
    # How to reach Redis: redis-py's connection class and its arguments.
    connection_class: type
    connection_options: dict[str, Any]


def portable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a connection's options, those that another process can be given: redis-py puts locks of its own among them."""
    kept = {}
    for name, value in options.items():
        with suppress(TypeError, AttributeError, pickle.PicklingError):
            pickle.dumps(value)
            kept[name] = value
    return kept


class Guardian:
    """A worker's handle on its guardian. Thread-safe."""

    def __init__(self, ward: Ward, vitals: Vitals, crash_report: CrashReport) -> None:
        self._ward = ward
        self._vitals = vitals
        self._crash_report = crash_report
        self._lock = threading.Lock()
        # Its own, for the guardian: it tells of this process even if the guardian comes to look when it is gone.
        self._pidfd = os.pidfd_open(ward.pid)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        # For a guardian that takes over from a lost one; and when the next may be started.
        self._said = b""
        self._start_due = 0.0

    def ensure(self) -> None:
        """Starts the guardian, or another one if it has died."""
        with self._lock:
            if self._ended or (self._process and self._process.poll() is None) or time.monotonic() < self._start_due:
                return
            self._start_due = time.monotonic() + _RESTART_INTERVAL
            if self._process:
                logger.warning(
                    "the guardian died (exit code %s); starting another",
                    self._process.returncode,
                    extra={"action": "guardian_lost"},
                )
            try:
                self._process = self._start()
            except OSError as error:
                logger.error("no guardian could be started: %s; tried again", error)

    def _start(self) -> subprocess.Popen[bytes]:
        # Not the user's working folder on its path (-P); a session of its own, so that what ends the worker's process
        # group leaves it alone.
        shared = (self._pidfd, self._vitals.fd, self._crash_report.fd)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ingestq.workers.guardian", *map(str, shared)],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=shared,
            start_new_session=True,
        )
        # Through the pipe, because the arguments and the environment of a process can be read by others. Pickled: from
        # this process to its own child; nothing of it ever was in Redis.
        ward = pickle.dumps(self._ward)
        assert process.stdin is not None
        process.stdin.write(struct.pack("<I", len(ward)) + ward + self._said)
        return process

    def await_watch(self) -> None:
        """Returns when the guardian is at work: until then nobody would see the worker die."""
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._vitals.watched:
            if time.monotonic() > deadline:
                logger.warning("no guardian is at work after %g s; the worker goes on without one", _START_TIMEOUT)
                return
            time.sleep(0.01)

    def say_ready(self) -> None:
        """From now on a crash is one of a run, before that one of a start; the engine's processes are there."""
        children = processes.descendants({os.getpid()})
        self._say(b" ".join([_READY, *(_CHILD + name.encode() for name in children)]))

    def say_stopping(self) -> None:
        """From now on the worker's end is whoever stops it's, no document's fault, be it by SIGKILL."""
        self._say(_STOPPING)

    def end(self, timeout: float) -> None:
        """Farewell: the worker holds no lease any more. Waits up to `timeout` seconds for the guardian's end."""
        self._ended = True
        self._say(_BYE)
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)

    def _say(self, word: bytes) -> None:
        self._said += word + b"\n"
        process = self._process
        if process and process.stdin:
            with suppress(OSError):
                process.stdin.write(word + b"\n")


class _Watch:
    """The guardian's own side."""

    def __init__(self, ward: Ward, worker: processes.Watched, vitals: Vitals, crash_report: CrashReport) -> None:
        self._ward = ward
        self._worker = worker
        self._vitals = vitals
        self._crash_report = crash_report
        options = {**ward.connection_options, "socket_timeout": _SOCKET_TIMEOUT}
        self._redis = Redis(connection_pool=ConnectionPool(connection_class=ward.connection_class, **options))
        self._heard = b""
        # Processes that the worker has started, and theirs: identities.
        self._family: set[str] = set()
        self._family_due = 0.0
        self._renewal_due = 0.0
        self._kill_due = float("inf")
        self._looked_at = self._trust_after = float("-inf")

    def run(self) -> None:
        """Returns when the worker has said farewell, or is gone and its leases are handed back."""
        self._vitals.announce_watch()
        if self._ward.preemption_url:
            preemption.watch(self._ward.preemption_url, self._on_preemption)
        while True:
            gone = self._worker.has_ended(0)  # asked before it is listened to: its last word counts
            gone |= not self._listen(0 if gone else _LOOK)
            if _BYE in self._words:
                return
            if gone:
                break
            if self._kill_if_hung():
                return
            self._count_family()
            self._renew()
        self._bury(self._how_it_ended())

    @property
    def _words(self) -> list[bytes]:
        """What the worker has said so far."""
        return self._heard.split()

    def _listen(self, timeout: float) -> bool:
        """Reads what the worker says, for up to `timeout` seconds; False when it has closed its end."""
        poll = select.poll()
        poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
        while poll.poll(timeout * 1e3):
            said = os.read(sys.stdin.fileno(), 4096)
            if not said:
                return False
            self._heard += said
            timeout = 0
        return True

    def _count_family(self) -> None:
        """Remembers whom the worker would leave behind: once it is gone, nothing tells whose they were."""
        if time.monotonic() >= self._family_due:
            self._family_due = time.monotonic() + _FAMILY_INTERVAL
            self._family |= processes.descendants({self._ward.pid})

    def _on_preemption(self) -> None:
        logger.warning("the machine is about to be preempted: everything unfinished goes back to the queue")
        self._kill_due = time.monotonic() + _PREEMPTION_GRACE
        self._vitals.announce_preemption()

    def _renew(self) -> None:
        if time.monotonic() < self._renewal_due:
            return
        ward = self._ward
        # Four chances to renew a lease before it ends.
        self._renewal_due = time.monotonic() + min(ward.lease_ttl / 4, 30.0)
        try:
            scripts.renew(
                self._redis,
                ward.queues,
                worker=ward.worker,
                incarnation=ward.incarnation,
                lease_ttl=ward.lease_ttl,
                worker_ttl=ward.worker_ttl,
            )
        except RedisError as error:
            logger.warning("Redis: %s; leases are renewed when it is back", error, extra={"action": "redis_outage"})
            self._renewal_due = time.monotonic() + 1.0

    def _kill_if_hung(self) -> bool:
        now = time.monotonic()
        if now - self._looked_at > _TOO_LONG:
            self._trust_after = now + _RECOVERY  # this process stood still, and maybe the whole machine did
        self._looked_at = now
        if now < self._trust_after:
            return False
        overdue = self._vitals.overdue()
        late = time.monotonic() > self._kill_due
        if overdue is None and not late:
            return False
        reason = "it still ran when the machine was about to be preempted" if overdue is None else _HUNG[overdue]
        logger.error("worker %s is killed: %s", self._ward.worker, reason, extra={"action": "worker_killed"})
        self._worker.kill()
        self._bury(f"killed by its guardian: {reason}")
        return True

    def _how_it_ended(self) -> str:
        # Its end of the pipe closes before it ends. It is read in between, too: where Linux doesn't keep it, its parent
        # may make it forgotten at any moment.
        status = self._worker.exit_status()
        if not self._worker.has_ended(_EXIT_TIMEOUT):
            self._worker.kill()
        status = self._worker.exit_status() if status is None else status
        if report := self._crash_report.text():
            sys.stderr.write(report)
        if status is not None:
            return processes.told(status)
        number = self._crash_report.signal()
        return processes.signal_told(number) if number else "killed by signal 9 (SIGKILL), or ended in a way nobody saw"

    def _bury(self, how: str) -> None:
        """What remains to be done for a worker that is gone."""
        stopped = _STOPPING in self._words and ("signal 9" in how or "code 0" in how)
        max_crashes = 0 if stopped or self._vitals.preempted else self._ward.max_crashes
        buried = self._try_to_bury(how, max_crashes)
        told = {word.removeprefix(_CHILD).decode() for word in self._words if word.startswith(_CHILD)}
        if killed := processes.kill_all(self._family | told, spare=processes.identity(os.getpid())):
            logger.warning("killed %d processes that the worker left behind", killed)
        while not buried:  # after one lease ttl there is nothing left to hand back: others have taken it over
            time.sleep(_OUTAGE_WAIT)
            buried = self._try_to_bury(how, max_crashes) or time.monotonic() > self._renewal_due + self._ward.lease_ttl

    def _try_to_bury(self, how: str, max_crashes: int) -> bool:
        ward = self._ward
        try:
            returned = [
                scripts.hand_back_all(
                    self._redis,
                    queue,
                    failure_ttl=ward.failure_ttl,
                    worker=ward.worker,
                    incarnation=ward.incarnation,
                    max_crashes=max_crashes,
                    reason=how,
                )
                for queue in ward.queues
            ]
            scripts.sign_off(self._redis, ward.queues, worker=ward.worker, incarnation=ward.incarnation)
            if max_crashes:
                phase: Phase = "run" if _READY in self._words else "start"
                record_failure(self._redis, ward.queues[0], ward.machine, phase, how, max_failures=ward.max_failures)
        except RedisError as error:
            logger.warning("Redis: %s; leases are handed back when it is there", error)
            return False
        logger.warning(
            "worker %s %s; %d documents queued again, %d failed",
            ward.worker,
            how,
            sum(part.queued for part in returned),
            sum(part.dead_lettered for part in returned),
            extra={"action": "worker_lost"},
        )
        return True


def _read_ward() -> Ward | None:
    """What the worker wrote first; None if it died before it had: if it held leases, a lost guardian's, they lapse."""
    stdin = sys.stdin.fileno()
    raw = b""
    size = struct.calcsize("<I")
    while len(raw) < size or len(raw) < size + struct.unpack_from("<I", raw)[0]:
        wanted = size if len(raw) < size else size + struct.unpack_from("<I", raw)[0]
        part = os.read(stdin, wanted - len(raw))
        if not part:
            return None
        raw += part
    ward: Ward = pickle.loads(raw[size:])
    return ward


def main() -> None:
    """Runs as `python -m ingestq.workers.guardian PIDFD VITALS_FD REPORT_FD`, its Ward on standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the worker; the guardian goes last
    logging.basicConfig(level=logging.INFO, format="%(asctime)s guardian: %(message)s", datefmt="%H:%M:%S")
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    if ward := _read_ward():
        pidfd, vitals, report = map(int, sys.argv[1:])
        _Watch(ward, processes.Watched(ward.pid, pidfd), Vitals(vitals), CrashReport(report)).run()


if __name__ == "__main__":
    main()
