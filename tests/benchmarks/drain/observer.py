"""Looks at Redis many times a second: what is in flight, against every limit.

What sampling sees: each look is one transaction over the limits, the leases and the token totals, so no number is of
another moment than the others. A limit that was exceeded for longer than the time between two looks is found. What it
can't see: leases that came and went between two looks. That no single call of a script exceeds a limit is shown by
the property tests of the scripts; here they run against a real fleet.

When a limit is lowered, what was leased before stays: there it is growth beyond the limit that counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from redis import Redis

from ingestq.common import keys, scripts
from ingestq.common.limits import LIMITS, AdmissionLimits, limits_of

# Seconds between two looks, and between two that are kept for the plots.
INTERVAL, _KEPT = 0.02, 0.25

# Seconds between two comparisons of the totals with a recount of the leases.
_RECOUNT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One moment."""

    # Seconds by time.monotonic().
    at: float
    # Documents in each tenant's list.
    queued: tuple[int, ...]
    # Leases, and KV tokens reserved for them, over the fleet.
    in_flight: int
    kv_tokens: int
    # Worker -> leases, and KV tokens reserved for them.
    by_worker: Mapping[str, int]
    kv_by_worker: Mapping[str, int]
    limits: AdmissionLimits


def excesses(before: Look | None, now: Look, bounds: AdmissionLimits) -> dict[str, int]:
    """Limit -> by how much what it bounds grew beyond it since the look before; those that hold are left out.

    Args:
        bounds: the workers' own settings, which hold beside the limits in Redis.
    """
    counts = {
        "max_in_flight_fleet": (("", now.in_flight, before.in_flight if before else 0),),
        "max_kv_tokens_fleet": (("", now.kv_tokens, before.kv_tokens if before else 0),),
        "max_in_flight": _by_worker(now.by_worker, before.by_worker if before else {}),
        "max_kv_tokens": _by_worker(now.kv_by_worker, before.kv_by_worker if before else {}),
    }
    found = {}
    for name, parts in counts.items():
        limits = [limit for limit in (getattr(now.limits, name), getattr(bounds, name)) if limit is not None]
        if limits:
            over = max((count - max(min(limits), former) for _, count, former in parts), default=0)
            if over > 0:
                found[name] = over
    return found


def _by_worker(now: Mapping[str, int], before: Mapping[str, int]) -> tuple[tuple[str, int, int], ...]:
    return tuple((worker, count, before.get(worker, 0)) for worker, count in now.items())


@dataclass(slots=True)
class Observed:
    """What was seen."""

    looks: list[Look] = field(default_factory=list)
    num_looks: int = 0
    num_recounts: int = 0
    # Most at any look, over the fleet and in any one worker.
    max_in_flight: int = 0
    max_in_flight_worker: int = 0
    max_kv_tokens_worker: int = 0
    # Limit -> the largest excess.
    overshoot: dict[str, int] = field(default_factory=dict)
    # Recounts whose totals were not those of the leases.
    num_wrong_totals: int = 0
    # Whether the queue had documents, and whether each tenant had: (time, whether), every look.
    any_queued: list[tuple[float, bool]] = field(default_factory=list)
    all_queued: list[tuple[float, bool]] = field(default_factory=list)

    def note(self, before: Look | None, now: Look, bounds: AdmissionLimits) -> None:
        self.num_looks += 1
        self.any_queued.append((now.at, any(now.queued)))
        self.all_queued.append((now.at, all(now.queued)))
        self.max_in_flight = max(self.max_in_flight, now.in_flight)
        self.max_in_flight_worker = max(self.max_in_flight_worker, *now.by_worker.values(), 0)
        self.max_kv_tokens_worker = max(self.max_kv_tokens_worker, *now.kv_by_worker.values(), 0)
        for name, over in excesses(before, now, bounds).items():
            self.overshoot[name] = max(self.overshoot.get(name, 0), over)
        if not self.looks or now.at - self.looks[-1].at >= _KEPT:
            self.looks.append(now)


class Observer:
    """A thread that looks until the context ends."""

    def __init__(
        self, url: str, queue: str, workers: Sequence[str], bounds: AdmissionLimits, tenants: Sequence[str] = ("",)
    ) -> None:
        self.observed = Observed()
        self._redis = Redis.from_url(url)
        self._queue, self._workers, self._bounds = queue, workers, bounds
        self._lists = [keys.queue(queue, tenant) for tenant in tenants]
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._redis.close()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._look_around()
        except BaseException as error:  # told on leaving the context: a bench without its observer shows nothing
            self._failure = error

    def _look_around(self) -> None:
        before, recount_due = None, time.monotonic() + _RECOUNT
        while not self._ending.wait(INTERVAL):
            now = self.look()
            self.observed.note(before, now, self._bounds)
            before = now
            if now.at >= recount_due:
                recount_due = now.at + _RECOUNT
                totals = scripts.recount(self._redis, self._queue)
                self.observed.num_recounts += 1
                self.observed.num_wrong_totals += totals.kv_tokens_counted != totals.kv_tokens_held

    def look(self) -> Look:
        at = time.monotonic()
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hmget(keys.limits(self._queue), LIMITS)
            pipeline.zcard(keys.started(self._queue))
            pipeline.hgetall(keys.kv_tokens())
            for name in self._workers:
                pipeline.scard(keys.worker_executions(name))
            for name in self._lists:
                pipeline.llen(name)
            raw_limits, in_flight, totals, *counts = pipeline.execute()
        num_workers = len(self._workers)
        return Look(
            at=at,
            queued=tuple(counts[num_workers:]),
            in_flight=in_flight,
            kv_tokens=int(totals.get(f"queue:{self._queue}".encode(), 0)),
            by_worker=dict(zip(self._workers, counts[:num_workers], strict=True)),
            kv_by_worker={name: int(totals.get(f"worker:{name}".encode(), 0)) for name in self._workers},
            limits=limits_of(raw_limits),
        )
