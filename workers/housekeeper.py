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

# Seconds between renewals of the worker's record at most: RQ lets it last eight minutes.
_MAX_RENEWAL = 60.0


class Housekeeper:
    """Keeps one worker's leases alive and its queue tidy.

    RQ's own maintenance is not run: it fails every lease that it finds expired, by its host's clock, and imports and
    calls what such a job names as its callback.
    """

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        *,
        worker: str,
        worker_ttl: int,
        state: Callable[[], str],
        register: Callable[[], None],
        tidy: Callable[[], None],
        tidy_interval: float,
    ) -> None:
        """
        Args:
            worker_ttl: seconds that RQ's record of this worker lasts without a heartbeat.
            state: RQ's word for what the worker does now.
            register: writes the worker's record anew, should it have expired.
            tidy: forgets dead workers and expired rows; called every `tidy_interval` seconds.
        """
        self._connection = connection
        self._settings = settings
        self._worker = worker
        self._worker_ttl = worker_ttl
        self._state = state
        self._shown_state = ""
        self._register = register
        # In this order when several are due. Four chances to renew a lease before it ends.
        self._every = {
            self._renew: min(settings.lease_ttl / 4, _MAX_RENEWAL),
            self._notice_lost: _TICK,
            self._show_state: _TICK,
            self._take_over: _TICK,
            self._promote: _TICK,
            self._publish: _CARD_INTERVAL,
            tidy: tidy_interval,
        }
        self._due = dict.fromkeys(self._every, 0.0)
        # Since when Redis has answered without a break.
        self._in_touch_since = float("-inf")
        self._courier: Courier | None = None
        self._card: EngineCard | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ingestq-housekeeper", daemon=True)

    def start(self) -> None:
        """Begins with the worker's own heartbeat: loading the engine may take longer than RQ waits for one."""
        self._thread.start()

    def catch_up(self) -> None:
        """Takes over what has expired and moves what is due, now: a burst would otherwise end before the first tick."""
        self._attempt(self._take_over)
        self._attempt(self._promote)

    def serve(self, courier: Courier, card: EngineCard) -> None:
        """From now on there are leases to keep and an engine to speak of."""
        self._courier, self._card = courier, card
        self._due[self._publish] = 0.0

    def close(self, timeout: float) -> None:
        """Ends the thread, waiting up to `timeout` seconds."""
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
            self._in_touch_since = time.monotonic()
        except Exception:
            # One duty's bug must not end the renewal of leases.
            logger.exception("housekeeping failed; it is tried again", extra={"action": "housekeeping_failed"})

    def _members(self) -> list[str]:
        return self._courier.members if self._courier else []

    def _renew(self) -> None:
        known, gone = scripts.renew(
            self._connection,
            self._settings.queue,
            worker=self._worker,
            lease_ttl=self._settings.lease_ttl,
            worker_ttl=self._worker_ttl,
            members=self._members(),
        )
        self._report(gone)
        if not known:
            self._register()

    def _notice_lost(self) -> None:
        """Finds leases that ended early; stock `Job.cancel` and `Job.delete` tell nobody."""
        if members := self._members():
            scores = self._connection.zmscore(keys.started(self._settings.queue), members)
            self._report([member for member, score in zip(members, scores, strict=True) if score is None])

    def _report(self, gone: list[str]) -> None:
        if gone and self._courier:
            self._courier.post(Lost(gone))

    def _show_state(self) -> None:
        """Tells RQ's tools, here and not on the main thread, which would have to wait for Redis."""
        if (state := self._state()) != self._shown_state:
            self._connection.hset(keys.worker(self._worker), "state", state)
            self._shown_state = state

    def _take_over(self) -> None:
        """Returns expired leases to the queue.

        Not right after an outage: the leases of other workers have expired in it too, and they renew them now.
        """
        if time.monotonic() - self._in_touch_since < self._settings.lease_ttl / 2:
            return
        queued = dead_lettered = 0
        while True:
            returned = scripts.hand_back(
                self._connection,
                self._settings.queue,
                failure_ttl=self._settings.failure_ttl,
                max_attempts=self._settings.max_attempts,
            )
            queued, dead_lettered = queued + returned.queued, dead_lettered + returned.dead_lettered
            if returned.queued + returned.dead_lettered + returned.lost < scripts.CHUNK:
                break
        if queued or dead_lettered:
            logger.warning(
                "took over expired leases: %d documents queued again, %d failed after %d attempts",
                queued,
                dead_lettered,
                self._settings.max_attempts,
                extra={"action": "take_over"},
            )

    def _promote(self) -> None:
        while scripts.promote(self._connection, self._settings.queue) == scripts.CHUNK:
            pass

    def _publish(self) -> None:
        if self._card:
            engine_card.publish(self._connection, self._settings.queue, self._worker, self._card)
