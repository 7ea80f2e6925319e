"""Workers as real processes, each started again when it ends, as systemd would."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis

from ingestq.common import keys

from .processes import BIN, SIMULATED, environment, wait_until

TESTS = Path(__file__).parents[1]
QUEUE = "ingest"

# Seconds before another start, and for an orderly end at the last.
_RESTART_WAIT, _LAST_WAIT = 0.2, 20.0


class SupervisedWorker:
    """One `rq worker` after another.

    Args:
        label: names its log and its orders; the worker's own name, too, if it is `fixed`.
        fixed: always the same `-n`. Otherwise each start has a new name.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        label: str,
        *,
        fixed: bool,
        worker: str = "support.faulty.FaultyWorker",
        settings: Mapping[str, str] = {},
    ) -> None:
        self.label = label
        self.log = folder / f"{label}.log"
        self.orders = folder / f"{label}.orders"
        # Seconds that its host's clock is off, from the next start on.
        self.clock_skew = 0.0
        self.num_starts = 0
        self.exit_codes: list[int] = []
        # The process's; of the last one while there is none.
        self.name = ""
        self.pid = 0
        self._url, self._worker, self._fixed = url, worker, fixed
        self._settings = {**SIMULATED, "PYTHONPATH": f"{TESTS}:{TESTS / 'support' / 'skewed_clock'}", **settings}
        self._names = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._held_back = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name=f"supervisor-{label}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            if self._held_back.is_set():
                self._stopping.wait(_RESTART_WAIT)
                continue
            self._launch()
            assert self._process is not None
            self.exit_codes.append(self._process.wait())
            self._stopping.wait(_RESTART_WAIT)

    def _launch(self) -> None:
        self.name = self.label if self._fixed else f"{self.label}-{next(self._names)}"
        settings = {**self._settings, "FAULTY_ORDERS": str(self.orders), "CLOCK_SKEW": str(self.clock_skew)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(BIN / "rq"), "worker", "-w", self._worker, "-n", self.name, QUEUE],
                env=environment(self._url, settings),
                cwd=self.log.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        self.num_starts += 1

    @property
    def output(self) -> str:
        """What all of its processes and their guardians have said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def is_alive(self, pid: int | None = None) -> bool:
        """Whether its process runs or is stopped; that of `pid`, if given."""
        return is_running(pid or self.pid)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def guardian(self) -> int | None:
        """Its guardian's process id, if there is one."""
        with suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            children += [pid for task in Path(f"/proc/{self.pid}/task").iterdir() for pid in _children(task)]
            for pid in children:
                if b"ingestq.workers.guardian" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        return None

    def is_watched(self) -> bool:
        """Whether its guardian has begun: it is connected to Redis."""
        pid = self.guardian()
        if pid is None:
            return False
        with suppress(OSError):
            return any(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())
        return False

    def members(self, redis: Redis) -> list[str]:
        """The leases that it holds."""
        return [member.decode() for member in redis.smembers(keys.worker_executions(self.name))]

    def hold_back(self) -> None:
        """Not started again until `release`."""
        self._held_back.set()

    def release(self) -> None:
        self._held_back.clear()

    def stop(self) -> None:
        """Ends it for good: SIGTERM, then SIGKILL."""
        self._stopping.set()
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with suppress(AssertionError):
            wait_until(lambda: not self.is_alive(), "it ends", patience=_LAST_WAIT)
        self.signal(signal.SIGKILL)
        if self._thread.ident:
            self._thread.join()


class Fleet:
    """Supervised workers, all ended with the context."""

    def __init__(self, workers: list[SupervisedWorker]) -> None:
        self.workers = workers

    def __enter__(self) -> Self:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threads = [threading.Thread(target=worker.stop) for worker in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def num_fenced(self) -> int:
        """Results that were dropped because their leases had been lost, by the workers' own words."""
        found = (re.findall(r"(\d+) results dropped", worker.output) for worker in self.workers)
        return sum(int(number) for numbers in found for number in numbers)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended, be it stopped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def recovery_of(redis: Redis, name: str, members: list[str], *, patience: float) -> float:
    """Seconds from now until none of a worker's leases is left: finished, or in the queue, or leased anew.

    Raises:
        AssertionError: not within `patience`.
    """
    start = time.monotonic()
    while True:
        with redis.pipeline(transaction=False) as pipeline:
            pipeline.zmscore(keys.started(QUEUE), members)
            pipeline.scard(keys.worker_executions(name))
            scores, num_held = pipeline.execute()
        if num_held == 0 and not any(score is not None for score in scores):
            return time.monotonic() - start
        if time.monotonic() - start > patience:
            raise AssertionError(f"not within {patience:g} s: the {len(members)} leases of {name} are gone")
        time.sleep(0.0005)
