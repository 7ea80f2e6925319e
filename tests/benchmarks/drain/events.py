"""What may happen in a run: each is a function of the stage, and leaves marks."""

from __future__ import annotations

import time
from collections.abc import Callable

from ingestq.common import keys
from ingestq.common.limits import update_limits
from ingestq.workers.engines.simulated_engine import Profile

from .run import QUEUE, Recovery, Stage

# Seconds between looks.
_LOOK = 0.02


def kill(name: str, profile: Profile | None = None) -> Callable[[Stage], None]:
    """kill -9; the process that takes its place has the profile, if one is given."""

    def happen(stage: Stage) -> None:
        held = [member.decode().partition(":")[0] for member in stage.redis.smembers(keys.worker_executions(name))]
        stage.fleet.kill(name, profile)
        stage.recoveries.append(Recovery(start=time.monotonic(), job_ids=held))
        stage.mark(f"{name} killed" + (", other profile" if profile else ""))

    return happen


def limit(name: str, value: int | None) -> Callable[[Stage], None]:
    """A limit is changed live; None lifts it."""

    def happen(stage: Stage) -> None:
        update_limits(stage.redis, QUEUE, {name: value})
        stage.mark(f"{name} {value}" if value is not None else f"{name} lifted")

    return happen


def pause_then_burst(stage: Stage) -> None:
    """Producers stop until nothing is in flight anywhere, then send as fast as they can."""
    for traffic in stage.traffics:
        traffic.throttle.pause()
    stage.mark("pause")
    while stage.observer.look().in_flight:
        time.sleep(_LOOK)
    for traffic in stage.traffics:
        traffic.throttle.resume()
    stage.mark("burst")
