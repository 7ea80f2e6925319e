"""A campaign: workers, producers and readers under a seeded schedule of faults, then the books."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Literal
from unittest.mock import patch

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer

from .clients import Clients
from .faults import DOCUMENT_FAULTS, SCALED, SURVIVED, WORKER_FAULTS, Times, Victim, leases_left
from .fleet import QUEUE, Fleet, SupervisedWorker
from .notice import NoticeServer
from .outages import OUTAGES, Site
from .processes import wait_until
from .proxy import TcpProxy
from .verdict import Fault, Report

KINDS = [*WORKER_FAULTS, *DOCUMENT_FAULTS, *OUTAGES]

# Workers of always the same name, and of a new one at each start.
_NUM_FIXED, _NUM_FRESH = 2, 2

# Documents that one worker holds, and that are accepted and not delivered at most.
_MAX_IN_FLIGHT, _MAX_OUTSTANDING = 12, 120

# Faults at a time, of which one may be of Redis and the others are of one worker each. Those of documents, which have
# to wait for their turn in the queue, don't count.
_MAX_AT_ONCE = 3

# Documents that a producer enqueues when a fault of Redis strikes.
_GROUP = 60

# Seconds between two faults, and for the last documents to be delivered when all is well again.
_PAUSE, _DRAIN = (0.0, 1.0), 180.0


def strongest_durability(binary: str | None) -> Literal["memory", "aof"]:
    """What a producer can ask of one such server: Redis 7.2 and Valkey have WAITAOF."""
    with EmbeddedServer(binary) as server, Redis.from_url(server.url) as redis:
        try:
            redis.execute_command("WAITAOF", 0, 0, 1)
        except ResponseError:
            return "memory"
        return "aof"


class Campaign:
    """
    Args:
        rounds: how often each kind comes.
        kinds: default is all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        rounds: int,
        binary: str | None = None,
        times: Times = SCALED,
        kinds: list[str] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.report = Report()
        self._folder, self._times, self._say = folder, times, say
        self._random = Random(seed)
        self.durability = strongest_durability(binary)
        self._schedule = [
            kind for _ in range(rounds) for kind in self._random.sample(kinds or KINDS, len(kinds or KINDS))
        ]
        self._server = EmbeddedServer(
            binary,
            directory=folder / "server",
            # Without WAITAOF a producer can't wait for the disk, so the server does.
            appendfsync="everysec" if self.durability == "aof" else "always",
            auto_aof_rewrite_percentage=0,
        )
        self._running = threading.Semaphore(_MAX_AT_ONCE)
        self._threads: list[threading.Thread] = []
        # Whole-fleet faults that go on, and how many there have been.
        self._outage = threading.Lock()
        self._num_outages = 0

    def run(self) -> Report:
        with ExitStack() as stack:
            stack.enter_context(self._server)
            self._notices = stack.enter_context(NoticeServer())
            proxies = [stack.enter_context(TcpProxy(self._server.port)) for _ in range(_NUM_FIXED + _NUM_FRESH + 1)]
            self._redis = Redis(port=self._server.port, socket_timeout=30)
            for module in ("queue", "group"):
                stack.enter_context(patch(f"ingestq.producer.{module}.PATIENCE", self._times.producer))
            self._clients = Clients(
                proxies[0].url,
                self._random.random(),
                max_outstanding=_MAX_OUTSTANDING,
                durability=self.durability,
                socket_timeout=self._times.socket,
            )
            self._site = Site(
                server=self._server,
                proxies=proxies,
                ledger=self._clients.ledger,
                times=self._times,
                random=self._random,
            )
            fleet = stack.enter_context(Fleet([self._worker(i, proxy) for i, proxy in enumerate(proxies[1:])]))
            self._free = dict(zip(fleet.workers, proxies[1:], strict=True))
            self._clients.start()
            self._cause_all()
            self._conclude(fleet)
        return self.report

    def _worker(self, number: int, proxy: TcpProxy) -> SupervisedWorker:
        times, label = self._times, f"machine-{number}"
        settings = {
            "INGEST_LEASE_TTL": str(times.lease),
            "INGEST_STEP_TIMEOUT": str(times.step),
            "INGEST_MAX_IN_FLIGHT": str(_MAX_IN_FLIGHT),
            "INGEST_PREEMPTION_URL": self._notices.url_of(label),
            "FAULTY_MACHINE": label,
            "FAULTY_SOCKET_TIMEOUT": str(times.socket),
        }
        return SupervisedWorker(proxy.url, self._folder, label, fixed=number < _NUM_FIXED, settings=settings)

    # --- the schedule

    def _cause_all(self) -> None:
        for number, kind in enumerate(self._schedule):
            if kind not in DOCUMENT_FAULTS:
                self._running.acquire()
            alone = kind in OUTAGES and number % 2 == 0
            if alone:
                self._join(WORKER_FAULTS)
            thread = threading.Thread(target=self._cause, args=(number, kind), name=kind, daemon=True)
            self._threads.append(thread)
            thread.start()
            if alone:
                thread.join()
            time.sleep(self._random.uniform(*_PAUSE))
        self._join(KINDS)

    def _join(self, kinds: Container[str]) -> None:
        for thread in self._threads:
            if thread.name in kinds:
                thread.join()
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def _cause(self, number: int, kind: str) -> None:
        began, outages = time.monotonic(), self._num_outages
        try:
            if kind in OUTAGES:
                recovery, outages = self._cause_outage(kind)
            elif kind in DOCUMENT_FAULTS:
                recovery = self._cause_in_document(kind, number)
            else:
                recovery = self._cause_in_worker(kind)
            overlapped = outages != self._num_outages or (kind not in OUTAGES and self._outage.locked())
            self.report.faults.append(Fault(kind=kind, recovery=recovery, is_overlapped=overlapped))
        except Exception as error:
            self.report.surprises.append(f"{kind}: {type(error).__name__}: {error}")
        finally:
            if kind not in DOCUMENT_FAULTS:
                self._running.release()
        self._say(f"{number:4} {kind}: {time.monotonic() - began:.1f} s")

    def _cause_outage(self, kind: str) -> tuple[float, int]:
        with self._outage:
            self._num_outages += 1
            outages = self._num_outages
            held = [member.decode() for member in self._redis.zrange(keys.started(QUEUE), 0, -1)]
            self._clients.submit([""] * _GROUP)  # a producer, at least, has to do with it
            OUTAGES[kind](self._site)
            return self._until(lambda: self._are_gone(held), kind), outages

    def _cause_in_document(self, kind: str, number: int) -> float:
        start = time.monotonic()
        is_done = DOCUMENT_FAULTS[kind](self._clients, number)
        wait_until(is_done, f"the group of the {kind} is done", patience=_DRAIN + 3 * self._times.patience)
        return time.monotonic() - start

    def _cause_in_worker(self, kind: str) -> float:
        with self._victim() as victim:
            before = victim.worker.pid
            steps = WORKER_FAULTS[kind](victim)
            try:
                is_recovered = next(steps)
                recovery = self._until(is_recovered or (lambda: self._are_gone(victim.held)), kind)
            finally:
                for _ in steps:
                    pass
            if kind in SURVIVED and victim.worker.pid != before and not self._outage.locked():
                self.report.surprises.append(f"{kind}: the worker did not survive it")
        return recovery

    @contextmanager
    def _victim(self) -> Iterator[Victim]:
        """A worker that holds leases, and is nobody else's victim meanwhile."""
        worker = None
        deadline = time.monotonic() + self._times.patience
        while worker is None:
            ready = [worker for worker in list(self._free) if self._holds(worker)]
            if ready:
                worker = self._random.choice(ready)
                proxy = self._free.pop(worker, None)
                worker = worker if proxy else None
            assert time.monotonic() < deadline, "no worker holds leases"
            time.sleep(0.02)
        try:
            yield Victim(
                worker=worker,
                proxy=proxy,
                notices=self._notices,
                times=self._times,
                random=self._random,
                redis=self._redis,
                held=worker.members(self._redis),
            )
        finally:
            self._free[worker] = proxy

    def _holds(self, worker: SupervisedWorker) -> bool:
        with suppress(RedisError):
            return worker.is_alive() and bool(worker.members(self._redis))
        return False

    def _are_gone(self, members: list[str]) -> bool:
        with suppress(RedisError):
            return leases_left(self._redis, members) == 0
        return False

    def _until(self, condition: Callable[[], bool], kind: str) -> float:
        """Seconds from now until it holds."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < self._times.patience, f"{kind}: no recovery in {self._times.patience:g} s"
            time.sleep(0.002)
        return time.monotonic() - start

    # --- the end

    def _conclude(self, fleet: Fleet) -> None:
        report, ledger = self.report, self._clients.ledger
        for name in self._clients.finish(_DRAIN + self._times.patience):
            report.surprises.append(f"group {name} was not read to its end")
        with suppress(AssertionError):
            wait_until(lambda: not self._left_over(), "nothing is left", patience=self._times.patience)
        report.surprises += self._left_over()
        report.surprises += self._clients.disagreements(self._redis)
        report.accepted = len(ledger.accepted)
        report.dead_letters = len(ledger.dead_letters())
        report.succeeded = len(ledger.delivered) - report.dead_letters
        report.lost, report.doubled = ledger.lost(), ledger.doubled
        report.again_after_loss = ledger.num_again_after_loss
        report.exhausted, report.unjustified = len(ledger.exhausted()), ledger.unjustified()
        report.poisons = ledger.poisoned()
        report.fenced, report.refused_calls = fleet.num_fenced(), ledger.num_refused_calls
        report.starts = sum(worker.num_starts for worker in fleet.workers)

    def _left_over(self) -> list[str]:
        """What is in Redis that should have ended, in words."""
        counts = {
            "queued": self._redis.llen(keys.queue(QUEUE)),
            "leased": self._redis.zcard(keys.started(QUEUE)),
            "scheduled": self._redis.zcard(keys.scheduled(QUEUE)),
        }
        return [f"{number} jobs are {what} at the end" for what, number in counts.items() if number]
