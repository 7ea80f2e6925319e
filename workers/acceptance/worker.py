"""`Worker`: a real `rq worker` process of the acceptance run, started, killed, and watched."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

from redis import Redis

from ...common import keys
from ...common.engine_card import EngineCard, live_cards
from ..processes import descendants, identity
from .bench import START_TIMEOUT, AcceptanceError, Bench, tail, wait_until
from .observer import Sample, read_trace

_CLASS = "ingestq.workers.acceptance.observer.ObservedWorker"

# Seconds for an orderly end: what is in the engine is finished first.
_STOP_TIMEOUT = 60.0


class Worker:
    """`rq worker` on the bench's queue; ended with the context, however that ends."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.name = f"{bench.queue}-{name}"
        self._bench = bench
        self._folder = bench.folder / name
        self._folder.mkdir()
        self._log = self._folder / "worker.log"

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        command = [self._bench.script("rq"), "worker", "-w", _CLASS, "-n", self.name, self._bench.queue]
        environment = self._bench.environment(INGEST_MAX_IN_FLIGHT=str(max(self._bench.levels)))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_TIMEOUT)
        self._process.kill()
        self._process.wait()

    def wait_until_ready(self, redis: Redis) -> EngineCard:
        """Its engine's card, once it takes work.

        Raises:
            AcceptanceError: it ended before; carries the end of its log.
        """
        wait_until(lambda: self.card(redis) or self._process.poll() is not None, "a worker is ready", START_TIMEOUT)
        card = self.card(redis)
        if card is None:
            raise AcceptanceError(f"the worker ended with {self._process.returncode}: {self.said}")
        self.start_seconds = time.monotonic() - self.started
        return card

    def card(self, redis: Redis) -> EngineCard | None:
        return live_cards(redis, self._bench.queue).get(self.name)

    def leases(self, redis: Redis) -> set[bytes]:
        """What it holds, each as "JOB:EXECUTION"."""
        return cast(set[bytes], redis.smembers(keys.worker_executions(self.name)))

    def kill(self) -> list[str]:
        """SIGKILLs it; returns the identities of the engine's processes that it leaves behind."""
        family = descendants({self._process.pid}) - {identity(pid) for pid in self._guardians()}
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return sorted(family)

    def _guardians(self) -> Sequence[int]:
        """Its guardian, which is not of the engine and outlives it on purpose."""
        pids = (int(name.split("/")[2]) for name in descendants({self._process.pid}))
        return [pid for pid in pids if b"ingestq.workers.guardian" in _command_line(pid)]

    @property
    def said(self) -> str:
        """The end of its log."""
        return tail(self._log.read_text(errors="replace"))

    def trace(self) -> list[Sample]:
        return read_trace(self._folder)


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:  # it is gone
        return b""
