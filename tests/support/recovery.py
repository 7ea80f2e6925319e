"""How long the documents of a lost worker are without one: kills of one worker after another, Redis being there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.workers.processes import descendants, identity, is_dead

from .fleet import QUEUE, SupervisedWorker, recovery_of
from .jobs import put, request
from .processes import children, wait_until

# Documents held when a worker is killed, and in the queue besides.
NUM_HELD, NUM_QUEUED = 12, 24

# Steps of a document, each a token: none ends between two looks at what a worker holds.
_TOKENS = 900

_PLAIN = "ingestq.workers.BatchWorker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One worker's end."""

    # Seconds from SIGKILL until none of its leases is left.
    seconds: float
    num_leases: int
    # Megabytes that it had resident.
    rss_mb: float
    # Processes marked as its engine's, before and after.
    num_children: int
    num_orphans: int


def kill_in_pairs(
    server: EmbeddedServer, folder: Path, number: int, settings: Mapping[str, str], *, model: str = "sim"
) -> Iterator[Kill]:
    """Kills workers, two at a time started and ready, so that none starts while one dies.

    The health of the machine is forgotten between pairs: each would wait, as after a crash it should.
    """
    redis = Redis.from_url(server.url)
    numbers = count()
    for pair in range(0, number, 2):
        redis.flushall()
        put(redis, [request(next(numbers), max_tokens=_TOKENS, model=model) for _ in range(NUM_QUEUED + 2 * NUM_HELD)])
        workers = [
            SupervisedWorker(server.url, folder, f"victim-{pair + i}", fixed=True, worker=_PLAIN, settings=settings)
            for i in range(min(2, number - pair))
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                _wait_until_full(redis, worker)
            for worker in workers:
                yield _kill(redis, worker)
        finally:
            for worker in workers:
                worker.stop()


def _wait_until_full(redis: Redis, worker: SupervisedWorker) -> None:
    wait_until(
        lambda: (
            (len(worker.members(redis)) == NUM_HELD and worker.is_watched()) or (worker.exit_codes and _tell(worker))
        ),
        f"{worker.label} holds leases and has a guardian",
        patience=240,
    )


def _tell(worker: SupervisedWorker) -> None:
    raise AssertionError(f"{worker.label} ended with {worker.exit_codes}:\n{worker.output[-4000:]}")


def _kill(redis: Redis, worker: SupervisedWorker) -> Kill:
    worker.hold_back()
    members, rss = worker.members(redis), rss_mb(worker.pid)
    guardians = {identity(pid) for pid, command in children(worker.pid) if "ingestq.workers.guardian" in command}
    family = descendants({worker.pid}) - guardians
    worker.signal(signal.SIGKILL)
    seconds = recovery_of(redis, worker.name, members, patience=120)
    # The guardian ends the engine's processes after it has handed the leases back.
    deadline = time.monotonic() + 10
    while _living(family) and time.monotonic() < deadline:
        time.sleep(0.05)
    return Kill(
        seconds=seconds, num_leases=len(members), rss_mb=rss, num_children=len(family), num_orphans=_living(family)
    )


def _living(family: Collection[str]) -> int:
    """Processes of an engine that are still there."""
    return sum(not is_dead(name) for name in family)


def rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def lose_machine(server: EmbeddedServer, folder: Path, settings: Mapping[str, str], trial: int) -> float:
    """Kills a worker and its guardian at once; seconds until another has taken all its documents over.

    They run a few at a time then: they may be what killed it.
    """
    redis = Redis.from_url(server.url)
    redis.flushall()
    put(redis, [request(i, max_tokens=_TOKENS) for i in range(NUM_HELD)])
    lost, other = (
        SupervisedWorker(server.url, folder, f"{label}-{trial}", fixed=False, worker=_PLAIN, settings=settings)
        for label in ("lost", "other")
    )
    try:
        lost.start()
        _wait_until_full(redis, lost)
        other.start()
        wait_until(lambda: redis.hexists(keys.engines(QUEUE), other.name), "the other one is ready")
        lost.hold_back()
        members, guardian = lost.members(redis), lost.guardian()
        assert guardian is not None
        os.kill(guardian, signal.SIGKILL)
        lost.signal(signal.SIGKILL)
        start = time.monotonic()
        recovery_of(redis, lost.name, members, patience=600)
        wait_until(lambda: other.members(redis), "the other one runs the first of them")
        return time.monotonic() - start
    finally:
        lost.stop()
        other.stop()


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent of all don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]
