"""`Housekeeper`: what must go on while the engine steps, in a thread of its own.

Keeps the guardian alive, notices leases that were cancelled, takes over those of lost workers, moves due retries into
the queue. The guardian renews the leases; this thread only steps in where it doesn't.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from redis import Redis
from redis.exceptions import RedisError

from ..common import engine_card, keys, scripts, worker_load
from ..common.connections import SOCKET_TIMEOUT
from ..common.engine_card import EngineCard
from ..common.fields import number
from ..common.settings import Settings
from ..common.worker_load import WorkerLoad
from .courier import Courier
from .guardian import Guardian
from .messages import Lost
from .vitals import Duty, Vitals

logger = logging.getLogger(__name__)

# Seconds between looks at leases, expired ones and due retries.
_TICK = 1.0

# Seconds between looks at what this machine says: the guardian, its notice of preemption, signals.
_LOOK = 0.2

# Seconds between renewals of the engine card: a quarter of what it lasts.
_CARD_INTERVAL = engine_card.CARD_TTL / 4

# Seconds between reports of how busy the worker is.
_LOAD_INTERVAL = 2.0

# Seconds between checks of the reserved tokens against the leases: reading 16,000 of those takes Redis some 15 ms.
_RECOUNT_INTERVAL = 60.0


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
        queues: Sequence[str],
        worker: str,
        incarnation: str,
        worker_ttl: int,
        guardian: Guardian,
        vitals: Vitals,
        look: Callable[[], None],
        state: Callable[[], str],
        register: Callable[[], None],
        replaced: Callable[[], None],
        duties: Mapping[Callable[[], None], float],
    ) -> None:
        """
        Args:
            queues: those that the worker serves.
            incarnation: tells this worker from others of its name.
            worker_ttl: seconds that RQ's record of this worker lasts without a heartbeat.
            look: called at every tick, whether Redis is there or not.
            state: RQ's word for what the worker does now.
            register: writes the worker's record anew, should it have expired.
            replaced: called when another worker has taken this one's name.
            duties: what else there is to do with Redis, and seconds between two times.
        """
        self._connection = connection
        self._settings = settings
        self._queues = list(queues)
        self._worker = worker
        self._incarnation = incarnation
        self._worker_ttl = worker_ttl
        self._guardian = guardian
        self._vitals = vitals
        self._look = look
        self._state = state
        self._shown_state = ""
        self._register = register
        self._replaced = replaced
        # In this order when several are due: a worker doesn't take over what is its own.
        self._every = {
            self._check_in: min(_TICK, settings.lease_ttl / 8),
            self._notice_lost: _TICK,
            self._show_state: _TICK,
            self._take_over: _TICK,
            self._promote: _TICK,
            self._publish: _CARD_INTERVAL,
            self._publish_load: _LOAD_INTERVAL,
            self._recount: _RECOUNT_INTERVAL,
            **duties,
        }
        self._due = dict.fromkeys(self._every, 0.0)
        # Since when Redis has answered without a break.
        self._in_touch_since = float("-inf")
        self._courier: Courier | None = None
        self._card: Callable[[], EngineCard] | None = None
        self._load: Callable[[], WorkerLoad] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ingestq-housekeeper", daemon=True)

    def start(self) -> None:
        """Begins with the worker's own heartbeat: loading the engine may take longer than RQ waits for one."""
        self._thread.start()

    def catch_up(self) -> None:
        """Takes over what has expired and moves what is due, now: a burst would otherwise end before the first tick."""
        self._attempt(self._take_over)
        self._attempt(self._promote)

    def serve(self, courier: Courier, card: Callable[[], EngineCard], load: Callable[[], WorkerLoad]) -> None:
        """From now on there are leases to keep and an engine to speak of.

        Args:
            card, load: say how the engine is, and how busy, at the moment of asking.
        """
        self._courier, self._card, self._load = courier, card, load
        self._due[self._publish] = 0.0

    def close(self, timeout: float) -> None:
        """Ends the thread, waiting up to `timeout` seconds."""
        self._stop.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.wait(min(_LOOK, self._settings.lease_ttl / 8)):
            self._promise()
            self._guardian.ensure()
            self._look()
            for duty, interval in self._every.items():
                if time.monotonic() >= self._due[duty]:
                    self._due[duty] = time.monotonic() + interval
                    self._promise()
                    self._attempt(duty)
        self._vitals.release(Duty.HOUSEKEEPER)

    def _promise(self) -> None:
        if self._courier:
            self._vitals.promise(Duty.HOUSEKEEPER, self._settings.step_timeout + 2 * SOCKET_TIMEOUT)

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

    def _check_in(self) -> None:
        """Sees to it that the worker is known, under a name that is its own, and that somebody renews its leases."""
        with self._connection.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.hmget(keys.worker(self._worker), "incarnation", "alive_until")
            (seconds, micros), (incarnation, alive_until) = pipeline.execute()
        if incarnation is None:
            self._register()
        elif incarnation.decode(errors="replace") != self._incarnation:
            self._replaced()
        elif (number(alive_until) or 0.0) - seconds - micros / 1e6 < self._settings.lease_ttl / 2:
            self._renew()

    def _renew(self) -> None:
        """Does the guardian's work, which is late: it is being started, or it hangs."""
        scripts.renew(
            self._connection,
            self._queues,
            worker=self._worker,
            incarnation=self._incarnation,
            lease_ttl=self._settings.lease_ttl,
            worker_ttl=self._worker_ttl,
        )

    def _notice_lost(self) -> None:
        """Finds leases that ended early; stock `Job.cancel` and `Job.delete` tell nobody."""
        if self._courier is None:
            return
        members: dict[str, list[str]] = {}
        for job in self._courier.holdings.jobs:
            members.setdefault(job.queue, []).append(job.member)
        for queue, held in members.items():
            scores = self._connection.zmscore(keys.started(queue), held)
            if gone := [member for member, score in zip(held, scores, strict=True) if score is None]:
                self._courier.post(Lost(gone))

    def _show_state(self) -> None:
        """Tells RQ's tools, here and not on the main thread, which would have to wait for Redis."""
        if (state := self._state()) != self._shown_state:
            scripts.write_fields(self._connection, keys.worker(self._worker), {"state": state})
            self._shown_state = state

    def _take_over(self) -> None:
        """Returns expired leases to the queue.

        Not right after an outage: the leases of other workers have expired in it too, and they renew them now.
        """
        if time.monotonic() - self._in_touch_since < self._settings.lease_ttl / 2:
            return
        for queue in self._queues:
            self._take_over_of(queue)

    def _take_over_of(self, queue: str) -> None:
        seconds, _ = self._connection.time()
        returned = scripts.hand_back_all(
            self._connection,
            queue,
            failure_ttl=self._settings.failure_ttl,
            max_crashes=self._settings.max_crashes,
            reason="its lease ended without a word of it or of its guardian",
            # A stalled server would run the call when it wakes, before anybody could have renewed a lease.
            not_after=seconds + max(1.0, self._settings.lease_ttl / 4),
        )
        if returned.queued or returned.dead_lettered:
            logger.warning(
                "took over expired leases: %d documents queued again, %d failed after %d crashes",
                returned.queued,
                returned.dead_lettered,
                self._settings.max_crashes,
                extra={"action": "take_over"},
            )

    def _promote(self) -> None:
        for queue in self._queues:
            while scripts.promote(self._connection, queue) == scripts.CHUNK:
                pass

    def _publish(self) -> None:
        if self._card:
            card = self._card()
            for queue in self._queues:
                engine_card.publish(self._connection, queue, self._worker, card)

    def _publish_load(self) -> None:
        if self._load:
            worker_load.publish_load(self._connection, self._queues, self._worker, self._load())

    def _recount(self) -> None:
        """Makes the reserved tokens what the leases say, should RQ's own tools have ended some. One worker does it."""
        for queue in self._queues:
            if min(worker_load.live_loads(self._connection, queue), default="") != self._worker:
                continue
            found = scripts.recount(self._connection, queue)
            if found.kv_tokens_counted != found.kv_tokens_held:
                logger.warning(
                    "queue %s: %d KV tokens were counted as reserved, its %d leases hold %d; mended",
                    queue,
                    found.kv_tokens_counted,
                    found.num_leases,
                    found.kv_tokens_held,
                    extra={"action": "recounted"},
                )
