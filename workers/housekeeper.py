"""`Housekeeper`: what must go on while the engine steps, in a thread of its own.

Renews leases, notices those that were cancelled, takes over those of lost workers, moves due retries into the queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from redis import Redis
from redis.exceptions import RedisError

from ..common import engine_card, keys, scripts
from ..common.engine_card import EngineCard
from ..common.settings import Settings
from .courier import Courier, Lost

logger = logging.getLogger(__name__)

# Seconds between looks at leases, expired ones and due retries.
_TICK = 1.0

# Seconds between renewals of the engine card: a quarter of what it lasts.
_CARD_INTERVAL = engine_card.CARD_TTL / 4


class Housekeeper:
    """Keeps one worker's leases alive and its queue tidy."""

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        *,
        worker: str,
        worker_ttl: int,
        maintenance: Callable[[], None],
        maintenance_interval: float,
    ) -> None:
        """
        Args:
            worker_ttl: seconds that RQ's record of this worker lasts without a heartbeat.
            maintenance: RQ's own housekeeping of its registries, called every `maintenance_interval` seconds.
        """
        self._connection = connection
        self._settings = settings
        self._worker = worker
        self._worker_ttl = worker_ttl
        # Four chances to renew a lease before it ends.
        self._every = {
            self._renew: settings.lease_ttl / 4,
            self._notice_lost: _TICK,
            self._take_over: _TICK,
            self._promote: _TICK,
            self._publish: _CARD_INTERVAL,
            maintenance: maintenance_interval,
        }
        self._due = dict.fromkeys(self._every, 0.0)
        self._courier: Courier | None = None
        self._card: EngineCard | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ingestq-housekeeper", daemon=True)

    def start(self) -> None:
        """Begins with the worker's own heartbeat: loading the engine may take longer than RQ waits for one."""
        self._thread.start()

    def serve(self, courier: Courier, card: EngineCard) -> None:
        """From now on there are leases to keep and an engine to speak of."""
        self._courier, self._card = courier, card
        self._due[self._publish] = 0.0

    def close(self, timeout: float) -> None:
        self._stop.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.wait(min(_TICK, self._settings.lease_ttl / 8)):
            for duty, interval in self._every.items():
                if time.monotonic() >= self._due[duty]:
                    self._due[duty] = time.monotonic() + interval
                    self._attempt(duty)

    def _attempt(self, duty: Callable[[], None]) -> None:
        try:
            duty()
        except RedisError as error:
            logger.warning("Redis: %s; the worker's housekeeping is late", error, extra={"action": "redis_outage"})
            self._due[duty] = time.monotonic() + _TICK
        except Exception:
            # One duty's bug must not end the renewal of leases.
            logger.exception("housekeeping failed; it is tried again", extra={"action": "housekeeping_failed"})

    def _members(self) -> list[str]:
        return self._courier.members if self._courier else []

    def _renew(self) -> None:
        self._report(
            scripts.renew(
                self._connection,
                self._settings.queue,
                worker=self._worker,
                lease_ttl=self._settings.lease_ttl,
                worker_ttl=self._worker_ttl,
                members=self._members(),
            )
        )

    def _notice_lost(self) -> None:
        """Finds leases that ended early; stock `Job.cancel` and `Job.delete` tell nobody."""
        if members := self._members():
            scores = self._connection.zmscore(keys.started(self._settings.queue), members)
            self._report([member for member, score in zip(members, scores, strict=True) if score is None])

    def _report(self, gone: list[str]) -> None:
        if gone and self._courier:
            self._courier.post(Lost(gone))

    def _take_over(self) -> None:
        returned = scripts.hand_back(
            self._connection,
            self._settings.queue,
            failure_ttl=self._settings.failure_ttl,
            max_attempts=self._settings.max_attempts,
        )
        if returned.queued or returned.dead_lettered:
            logger.warning(
                "took over expired leases: %d documents queued again, %d failed after %d attempts",
                returned.queued,
                returned.dead_lettered,
                self._settings.max_attempts,
                extra={"action": "take_over"},
            )

    def _promote(self) -> None:
        scripts.promote(self._connection, self._settings.queue)

    def _publish(self) -> None:
        if self._card:
            engine_card.publish(self._connection, self._settings.queue, self._worker, self._card)
