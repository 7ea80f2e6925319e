"""Producers and readers as real programs are: they try again, go on from cursors, and tell a ledger of all they get."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import Literal

from redis import Redis
from rq import Retry

from ingestq.common import keys
from ingestq.common.errors import ProducerLost, QueueUnavailable, ResultTimeout, UnknownGroup
from ingestq.common.schema import IngestRequest, job_id
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue, fetch_results, iter_results
from ingestq.producer.results import ResultIterator

from .fleet import QUEUE
from .jobs import request
from .ledger import Ledger

# Attempts beyond the first for ordinary failures, and seconds before each.
_RETRY = {"max": 3, "interval": [0, 1, 1]}

# Documents of a group, and of one call into it.
_GROUP, _CALL = (20, 120), 40

# Tokens of a document: steps that it takes.
_TOKENS = (5, 60)

# Groups that are being read at most, and rows after which some readers start anew.
_MAX_ACTIVE, _REREAD_AFTER = 6, 25


class GroupRun:
    """One group from its first document to the last row, in two threads: one enqueues, one reads.

    Args:
        is_patient: enqueues again what was not accepted. Otherwise only what was accepted is waited for.
        rereads: the reader starts anew from its cursor now and then.
    """

    def __init__(
        self,
        connect: Callable[[], Redis],
        ledger: Ledger,
        name: str,
        items: Sequence[IngestRequest],
        *,
        is_patient: bool,
        rereads: bool,
        durability: Literal["memory", "aof"],
    ) -> None:
        self.name = name
        self._connect, self._ledger, self._items = connect, ledger, items
        self._is_patient, self._rereads = is_patient, rereads
        self._settings = Settings(model="sim", durability=durability)
        self._epoch = ledger.epoch
        self.done = threading.Event()
        self._stop = threading.Event()
        self._read_all = threading.Event()
        with ledger.lock:
            ledger.texts.update({job_id(item.to_json()): item.text for item in items})
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._produce, self._read)]
        for thread in self._threads:
            thread.start()

    def _produce(self) -> None:
        client = self._connect()
        while not self._stop.is_set():
            self.done.clear()
            self._epoch = self._ledger.epoch
            try:
                queue = IngestQueue(QUEUE, connection=client, settings=self._settings)
                for start in range(0, len(self._items), _CALL):
                    self._enqueue(queue, self._items[start : start + _CALL], last=start + _CALL >= len(self._items))
            except QueueUnavailable as error:
                with self._ledger.lock:
                    self._ledger.num_refused_calls += 1
                self._ledger.accept(error.accepted)
                if self._is_patient or not self._seal(client):
                    self._stop.wait(0.3)
                    continue
            self.done.set()
            # After a loss the same again, whatever was accepted: that completes it and repeats nothing.
            while self._ledger.epoch == self._epoch and not self._stop.is_set():
                if self._read_all.wait(0.2):
                    return

    def _enqueue(self, queue: IngestQueue, items: Sequence[IngestRequest], *, last: bool) -> None:
        queue.enqueue_many(items, group_id=self.name, retry=Retry(**_RETRY), seal=last)
        self._ledger.accept([job_id(item.to_json()) for item in items])

    def _seal(self, client: Redis) -> bool:
        try:
            IngestQueue(QUEUE, connection=client, settings=self._settings).group(self.name).seal()
        except UnknownGroup:
            self._read_all.set()  # nothing was accepted
        except QueueUnavailable:
            return False
        return True

    def _read(self) -> None:
        client = self._connect()
        iterator: ResultIterator | None = None
        first_epoch, since_start = self._ledger.epoch, 0
        while not self._stop.is_set() and not self._read_all.is_set():
            try:
                if iterator is None:
                    iterator = iter_results(self.name, connection=client, timeout=2.0)
                elif self._rereads and since_start > _REREAD_AFTER and first_epoch == self._ledger.epoch:
                    iterator = iter_results(self.name, connection=client, timeout=2.0, cursor=iterator.cursor)
                    since_start = 0
                self._ledger.deliver(next(iterator))
                since_start += 1
            except StopIteration:
                if self.done.is_set() and self._epoch == self._ledger.epoch:
                    self._read_all.set()
                self._stop.wait(0.1)  # the same iterator goes on, should more documents come
            except UnknownGroup:
                iterator = None
                self._stop.wait(0.1)
            except (ResultTimeout, QueueUnavailable, ProducerLost):
                self._stop.wait(0.1)

    @property
    def is_read(self) -> bool:
        return self._read_all.is_set()

    def stop(self) -> None:
        self._stop.set()


class Clients:
    """Producers and readers that keep documents flowing, from a thread of their own, until `finish`.

    Args:
        max_outstanding: documents accepted and not delivered above which no new group begins.
    """

    def __init__(
        self,
        url: str,
        seed: float,
        *,
        max_outstanding: int,
        durability: Literal["memory", "aof"],
        socket_timeout: float,
    ) -> None:
        self.ledger = Ledger()
        self.runs: list[GroupRun] = []
        self._url, self._random = url, Random(seed)
        self._max_outstanding = max_outstanding
        self._durability, self._socket_timeout = durability, socket_timeout
        self._numbers = count()
        self._lock = threading.Lock()
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._flow, name="clients", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _flow(self) -> None:
        while not self._finishing.wait(0.1):
            active = sum(not run.is_read for run in self.runs)
            if self.ledger.num_outstanding < self._max_outstanding and active < _MAX_ACTIVE:
                self.submit([""] * self._random.randint(*_GROUP))

    def submit(self, markers: Sequence[str], *, always: bool = False) -> GroupRun:
        """Begins a group of a document for each marker, which is put into its text."""
        with self._lock:
            number = len(self.runs)
            items = [self._item(marker) for marker in markers]
            run = GroupRun(
                lambda: Redis.from_url(self._url, socket_timeout=self._socket_timeout),
                self.ledger,
                f"g{number}",
                items,
                is_patient=always or number % 4 != 3,
                rereads=number % 3 == 1,
                durability=self._durability,
            )
            self.runs.append(run)
        return run

    def _item(self, marker: str) -> IngestRequest:
        number = next(self._numbers)
        text = f"This is document number {number}. {marker}"
        return request(number, text=text, max_tokens=self._random.randint(*_TOKENS))

    def finish(self, patience: float) -> list[str]:
        """Waits until every group is read; returns the names of those that are not."""
        self._finishing.set()
        self._thread.join()
        deadline = time.monotonic() + patience
        while (open_runs := [run for run in self.runs if not run.is_read]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for run in self.runs:
            run.stop()
        return [run.name for run in open_runs]

    def disagreements(self, redis: Redis) -> list[str]:
        """Delivered rows that Redis doesn't hold in the same way, and once, in words."""
        found = []
        for run in self.runs:
            try:
                rows = fetch_results(run.name, connection=redis)
            except UnknownGroup:
                continue
            with redis.pipeline(transaction=False) as pipeline:
                for row in rows:
                    pipeline.xlen(keys.results(row.job_id if row else ""))
                lengths = pipeline.execute()
            for row, length in zip(rows, lengths, strict=True):
                delivery = row and self.ledger.delivered.get(row.job_id)
                if row is None or not delivery or (delivery.epoch == self.ledger.epoch and delivery.row != row):
                    found.append(f"{run.name}: Redis has another row than was delivered: {row}")
                if length != 1:
                    found.append(f"{run.name}: {length} results are stored for {row and row.job_id}")
        return found
