"""Faults of one worker, and of documents.

A worker's fault is a generator: it strikes and yields what says that the worker's documents are in good hands again,
None for "it holds none of those leases any more"; then it goes on to where the next fault may come.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from redis import Redis
from redis.exceptions import RedisError

from ingestq.common import keys

from .clients import Clients
from .faulty import DOCUMENT_ERRS, POISONS
from .fleet import QUEUE, SupervisedWorker
from .notice import NoticeServer
from .processes import wait_until
from .proxy import TcpProxy

# Seconds for an order to be obeyed: the worker may be starting, or Redis be away.
_ORDER_PATIENCE = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long things take, in seconds."""

    lease: float = 3.0
    # A step, before the guardian kills its worker.
    step: float = 6.0
    # A stall of Redis, the network or a process: longer than a lease, shorter than a step may take.
    stall: float = 5.0
    # How long anybody waits for one answer of Redis, and producers for its return.
    socket: float = 2.0
    producer: float = 1.0
    # Windows in which Redis refuses.
    refusal: float = 3.0

    @property
    def patience(self) -> float:
        """For what must come true once every time-out has passed."""
        return 60.0 + 3 * (self.lease + self.step + self.stall + self.socket)


# The real settings, and about a fifteenth of them.
SCALED = Times()
FULL = Times(lease=60.0, step=120.0, stall=75.0, socket=20.0, producer=15.0, refusal=60.0)


@dataclass(slots=True, kw_only=True)
class Victim:
    """A worker with what belongs to its machine."""

    worker: SupervisedWorker
    proxy: TcpProxy
    notices: NoticeServer
    times: Times
    random: Random
    # Goes round the proxy.
    redis: Redis
    # Leases that it held when the fault struck.
    held: list[str]

    def look(self) -> None:
        with suppress(RedisError):
            self.held = self.worker.members(self.redis) or self.held

    def order(self, point: str, action: str, seconds: float = 0.0) -> None:
        """Returns when the worker has begun to obey; looks at its leases until then."""
        draft = self.worker.orders.with_suffix(".draft")
        draft.write_text(f"{point} {action} {seconds}")
        draft.rename(self.worker.orders)
        deadline = time.monotonic() + _ORDER_PATIENCE
        while self.worker.orders.exists():
            if time.monotonic() > deadline:
                self.worker.orders.unlink(missing_ok=True)
                raise AssertionError(f"{self.worker.label}: {point} {action} was not obeyed")
            self.look()
            time.sleep(0.002)

    def wait_for_end(self, pid: int) -> None:
        wait_until(lambda: not self.worker.is_alive(pid), f"{self.worker.label} ends", patience=self.times.patience)


Recovered = Callable[[], bool] | None
Strike = Callable[[Victim], Iterator[Recovered]]


def kill(victim: Victim) -> Iterator[Recovered]:
    victim.worker.signal(signal.SIGKILL)
    yield None


def ordered(point: str, action: str) -> Strike:
    def strike(victim: Victim) -> Iterator[Recovered]:
        pid = victim.worker.pid
        victim.order(point, action, 1e6)
        yield None
        if action != "err":
            victim.wait_for_end(pid)

    return strike


def kill_at_start(victim: Victim) -> Iterator[Recovered]:
    """A second time, before it and its new guardian have got anywhere, or soon after."""
    pid = victim.worker.pid
    victim.worker.signal(signal.SIGKILL)
    wait_until(lambda: victim.worker.pid != pid, "it is started again", patience=victim.times.patience)
    time.sleep(victim.random.uniform(0.0, 2.5))
    victim.look()
    victim.worker.signal(signal.SIGKILL)
    yield None


def kill_guardian(victim: Victim) -> Iterator[Recovered]:
    """Another one must come, and the worker go on."""
    former, pid = victim.worker.guardian(), victim.worker.pid
    if former:
        os.kill(former, signal.SIGKILL)
    yield lambda: victim.worker.guardian() not in (None, former) or victim.worker.pid != pid


def kill_both(victim: Victim) -> Iterator[Recovered]:
    if guardian := victim.worker.guardian():
        os.kill(guardian, signal.SIGKILL)
    victim.worker.signal(signal.SIGKILL)
    yield None


def lose_machine(victim: Victim) -> Iterator[Recovered]:
    """Both, and no other of that name until its documents are taken over."""
    victim.worker.hold_back()
    yield from kill_both(victim)
    victim.worker.release()


def pause_worker(victim: Victim) -> Iterator[Recovered]:
    """Stopped, its guardian isn't: killed once its step is overdue."""
    pid = victim.worker.pid
    victim.worker.signal(signal.SIGSTOP)
    yield None
    victim.wait_for_end(pid)


def pause_both(victim: Victim) -> Iterator[Recovered]:
    """Stopped for longer than the leases last, then woken: others have the documents, its results are fenced."""
    pids = [pid for pid in (victim.worker.pid, victim.worker.guardian()) if pid]
    _signal_all(pids, signal.SIGSTOP)
    until = time.monotonic() + victim.times.stall
    yield None
    time.sleep(max(0.0, until - time.monotonic()))
    _signal_all(pids, signal.SIGCONT)


def _signal_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def hold_gil_a_while(victim: Victim) -> Iterator[Recovered]:
    """Longer than a lease, shorter than a step may take: no lease is lost, nobody is killed."""
    victim.order("step", "hold-gil", (victim.times.lease + victim.times.step) / 2)
    yield None


def cut_off(victim: Victim) -> Iterator[Recovered]:
    """The network of its machine alone, for longer than its leases last."""
    victim.proxy.cut()
    until = time.monotonic() + victim.times.stall
    yield None
    time.sleep(max(0.0, until - time.monotonic()))
    victim.proxy.mend()


def warm(victim: Victim) -> Iterator[Recovered]:
    pid = victim.worker.pid
    victim.worker.signal(signal.SIGTERM)
    yield None
    victim.wait_for_end(pid)


def cold(victim: Victim) -> Iterator[Recovered]:
    pid = victim.worker.pid
    victim.worker.signal(signal.SIGTERM)
    time.sleep(1.05)  # RQ takes two within a second for one
    if victim.worker.pid == pid:
        victim.worker.signal(signal.SIGTERM)
    yield None
    victim.wait_for_end(pid)


def preempt(victim: Victim) -> Iterator[Recovered]:
    pid, machine = victim.worker.pid, victim.worker.label
    victim.notices.announce(machine)
    yield None
    victim.wait_for_end(pid)
    victim.notices.revoke(machine)


def skew_clock(hours: int) -> Strike:
    """Started again on a host whose clock is off, then lost with its machine: its leases must end in time."""

    def strike(victim: Victim) -> Iterator[Recovered]:
        worker, pid = victim.worker, victim.worker.pid
        worker.clock_skew = hours * 3600.0
        worker.signal(signal.SIGTERM)
        wait_until(lambda: worker.pid != pid, "it is started again", patience=victim.times.patience)
        worker.clock_skew = 0.0
        wait_until(lambda: _holds(victim), "it holds leases", patience=victim.times.patience)
        victim.look()
        yield from lose_machine(victim)

    return strike


def _holds(victim: Victim) -> bool:
    with suppress(RedisError):
        return bool(victim.worker.members(victim.redis))
    return False


WORKER_FAULTS: dict[str, Strike] = {
    "worker killed": kill,
    "worker killed as it starts": kill_at_start,
    "worker killed after a lease": ordered("after-lease", "kill"),
    "worker killed while feeding": ordered("feed", "kill"),
    "worker killed before a finish": ordered("before-finish", "kill"),
    "worker killed after a finish": ordered("after-finish", "kill"),
    "engine out of memory, killed": ordered("step", "exhaust"),
    "engine segfault": ordered("step", "segfault"),
    "engine dead": ordered("step", "raise"),
    "engine out of memory at a step": ordered("step", "run-out"),
    "engine fails one prompt": ordered("step", "err"),
    "step hangs": ordered("step", "hang"),
    "GIL held": ordered("step", "hold-gil"),
    "GIL held a while": hold_gil_a_while,
    "guardian killed": kill_guardian,
    "worker and guardian killed": kill_both,
    "machine lost": lose_machine,
    "worker stopped": pause_worker,
    "worker and guardian stopped": pause_both,
    "machine cut off": cut_off,
    "SIGTERM": warm,
    "SIGTERM twice": cold,
    "preemption": preempt,
    "clock an hour ahead": skew_clock(1),
    "clock an hour behind": skew_clock(-1),
}

# After these a worker must still be the process that it was.
SURVIVED = ("engine fails one prompt", "GIL held a while", "guardian killed")


# --- documents


def submit_poison(clients: Clients, number: int) -> Callable[[], bool]:
    """One that kills whatever runs it, among others; the function returned says whether its group is done."""
    poison = list(POISONS)[number % len(POISONS)]
    return _submit(clients, ["", "", "", poison, "", ""])


def submit_erring(clients: Clients, number: int) -> Callable[[], bool]:
    """One that the engine always fails."""
    return _submit(clients, ["", DOCUMENT_ERRS, ""])


def _submit(clients: Clients, markers: Sequence[str]) -> Callable[[], bool]:
    run = clients.submit(markers, always=True)
    return lambda: run.is_read


DOCUMENT_FAULTS: dict[str, Callable[[Clients, int], Callable[[], bool]]] = {
    "poison document": submit_poison,
    "document that the engine fails": submit_erring,
}


def leases_left(redis: Redis, members: list[str]) -> int:
    """How many of these leases are held still, by whoever got them."""
    if not members:
        return 0
    return sum(score is not None for score in redis.zmscore(keys.started(QUEUE), members))
