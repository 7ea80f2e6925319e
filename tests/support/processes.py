"""Real processes for tests: workers through RQ's own command line, and waiting on conditions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

BIN = Path(sys.executable).parent

# Seconds after which a condition that should come true at once counts as failed, on a slow and shared machine.
PATIENCE = 60.0

# An engine with a model of its own and no weights: for tests of the queue, not of inference.
SIMULATED = {"INGEST_ENGINE": "simulated", "INGEST_MODEL": "sim"}


def wait_until(condition: Callable[[], object], what: str, *, patience: float = PATIENCE) -> None:
    """Returns as soon as `condition` holds; fails, naming `what`, if it doesn't."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience:g} s: {what}")
        time.sleep(0.02)


def environment(url: str, settings: Mapping[str, str] = {}) -> dict[str, str]:
    """This process's environment without any INGEST_* of its own, plus `settings`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("INGEST_")}
    return {**clean, "RQ_REDIS_URL": url, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings}


def children(pid: int) -> list[tuple[int, str]]:
    """Process ids and command lines of a process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it is gone
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == pid:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append((int(entry.name), command))
    return found


def run(
    *command: str, url: str, settings: Mapping[str, str] = {}, timeout: float = 240, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs an installed command (`rq`, `ingestq`) to its end."""
    arguments = [str(BIN / command[0]), *command[1:]]
    return subprocess.run(
        arguments,
        env=environment(url, settings),
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


class WorkerProcess:
    """`rq worker -w ingestq.workers.BatchWorker QUEUE`, started and, at the end, killed."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *options: str,
        name: str,
        queue: str = "ingest",
        worker: str = "ingestq.workers.BatchWorker",
        **settings: str,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = [str(BIN / "rq"), "worker", "-w", worker, "-n", name, *options, queue]
        self._environment = environment(url, {**SIMULATED, **settings})

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)

    # Seconds until it is ready. vLLM in processes of its own is imported three times, one after the other: 40 s on an
    # idle machine, 230 s on one at a load of 7 (2 cores).
    start_patience = 480.0

    def __enter__(self) -> Self:
        self.start()
        wait_until(
            lambda: "ready on" in self.output or self.process.poll() is not None,
            "the worker is ready",
            patience=self.start_patience,
        )
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(timeout=PATIENCE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if kind is not None:
            print(self.output[-6000:])
