"""`BatchWorker`, for RQ's stock command line: `rq worker -w ingestq.workers.BatchWorker ingest`.

All use of RQ's internals is in this file. RQ's own `work()` loop is kept; its two halves are overridden:
`dequeue_job_and_maintain_ttl` waits for the first ready prompt, `execute_job` runs the engine until it is idle.
The courier leases, encodes and writes results meanwhile; the housekeeper keeps leases alive.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any

from redis.exceptions import RedisError
from rq import Queue
from rq.command import parse_payload
from rq.defaults import DEFAULT_RESULT_TTL
from rq.exceptions import StopRequested
from rq.worker.base import BaseWorker, WorkerStatus

from ..common import engine_card
from ..common.connections import durability_warnings, sibling
from ..common.errors import SettingsError
from ..common.serializer import OrjsonSerializer
from ..common.settings import Settings
from .courier import Courier, Stop
from .drain import DrainController, default_max_in_flight
from .engines import load_engine
from .engines.base import Engine
from .feed import feed_continuously, feed_waves
from .housekeeper import Housekeeper

logger = logging.getLogger(__name__)

# Seconds to write results and hand leases back at the end; what is late is taken over when its lease ends.
_CLOSE_TIMEOUT = 5.0

# Seconds between looks at suspension and idle time while there is nothing to run.
_LOOK = 0.25


class BatchWorker(BaseWorker):
    """Leases many jobs at once and runs them through one in-process engine."""

    def __init__(self, queues: Any, *args: Any, settings: Settings | None = None, **kwargs: Any) -> None:
        """
        Args:
            queues: one queue or its name; more are refused.
            settings: default: from the environment.
            args, kwargs: as for RQ's worker. The serializer is always ours: nothing is ever unpickled.
        """
        kwargs["serializer"] = OrjsonSerializer
        super().__init__(queues, *args, **kwargs)
        for queue in self.queues:
            queue.serializer = OrjsonSerializer  # RQ's command line built them with its own default, pickle
        self._max_jobs: int | None = None
        self._engine: Engine | None = None
        self._courier: Courier | None = None
        self._housekeeper: Housekeeper | None = None
        if kwargs.get("prepare_for_work", True):
            with _exit_on_bad_settings():
                self._settings = self._checked(settings or Settings.from_env())

    def _checked(self, settings: Settings) -> Settings:
        if len(self.queues) != 1:
            names = ", ".join(self.queue_names())
            raise SettingsError(
                f"BatchWorker serves one queue, {len(self.queues)} were given ({names}); start one worker for each"
            )
        if self._exc_handlers:
            raise SettingsError("BatchWorker calls no exception handlers; leave out --exception-handler")
        settings.served_model  # noqa: B018  raises if there is none
        return settings.model_copy(update={"queue": self.queues[0].name})

    def load_engine(self) -> Engine:
        """Builds the engine; override to bring your own."""
        return load_engine(self._settings)

    # --- RQ's life cycle

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Works as RQ's `work` does. `max_jobs` counts documents; RQ's scheduler isn't needed for retries."""
        self._max_jobs = kwargs.pop("max_jobs", None)
        if kwargs.pop("with_scheduler", False):
            logger.warning("--with-scheduler is left out: BatchWorker moves due retries into the queue itself")
        try:
            return super().work(*args, **kwargs)
        finally:
            self._end()

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """Registers the worker, then loads the engine: in `rq info` it is 'started' until it is ready."""
        super().bootstrap(*args, **kwargs)
        _log_where_rq_logs()
        try:
            for warning in durability_warnings(self.connection):
                self.log.warning("Worker %s: %s", self.name, warning)
            self._housekeeper = self._new_housekeeper()
            self._housekeeper.start()
            with _exit_on_bad_settings():
                self._engine = self.load_engine()
            self._courier = self._new_courier(self._engine)
            self._housekeeper.serve(self._courier, self._engine.card)
            engine_card.publish(self.connection, self._settings.queue, self.name, self._engine.card)
            self._courier.start()
        except BaseException:
            self.teardown()
            self._end()
            raise
        card = self._engine.card
        self.log.info(
            "Worker %s: %s ready on %s, model %s, up to %d documents in flight",
            self.name,
            card.engine,
            card.device,
            card.model,
            self._max_in_flight(self._engine),
        )

    def _new_housekeeper(self) -> Housekeeper:
        return Housekeeper(
            sibling(self.connection),
            self._settings,
            worker=self.name,
            worker_ttl=self.worker_ttl + 60,
            maintenance=super().run_maintenance_tasks,
            maintenance_interval=self.maintenance_interval,
        )

    def _new_courier(self, engine: Engine) -> Courier:
        # RQ's command line always passes a ttl; its default is not a choice of the user's.
        given = None if self.default_result_ttl == DEFAULT_RESULT_TTL else self.default_result_ttl
        return Courier(
            sibling(self.connection),
            self._settings,
            engine,
            DrainController(max_in_flight=self._max_in_flight(engine)),
            worker=self.name,
            default_result_ttl=self._settings.result_ttl if given is None else given,
            max_jobs=self._max_jobs,
        )

    def _max_in_flight(self, engine: Engine) -> int:
        return self._settings.max_in_flight or default_max_in_flight(engine.card.max_num_seqs)

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Any, Queue] | None:
        """Waits for the first prompt that is ready for the engine.

        Returns:
            The Prompt and the queue; None when a burst has emptied the queue, or after `max_idle_time` seconds.
        """
        courier = self._ready_courier()
        burst = timeout is None
        self._show_state(WorkerStatus.IDLE)
        self.procline("Listening on " + ",".join(self.queue_names()))
        idle_since = time.monotonic()
        while True:
            with suppress(Empty):
                return courier.inbox.get(timeout=_LOOK), self.queues[0]
            self.check_for_suspension(burst)
            if self._stop_requested or courier.done:
                raise StopRequested
            if burst and courier.exhausted.is_set():
                return None
            if courier.in_flight:
                idle_since = time.monotonic()
            elif max_idle_time is not None and time.monotonic() - idle_since > max_idle_time:
                return None

    def execute_job(self, job: Any, queue: Queue) -> None:
        """Runs the engine, beginning with the Prompt `job`, until there is nothing left for it to do."""
        assert self._engine is not None
        self._show_state(WorkerStatus.BUSY)
        self.procline(f"Running documents of {queue.name}")
        feed = feed_waves if self._settings.feed == "generate" else feed_continuously
        try:
            feed(self._engine, self._ready_courier(), job, lambda: self._stop_requested)
        finally:
            self._show_state(WorkerStatus.IDLE)

    def _ready_courier(self) -> Courier:
        assert self._courier is not None, "bootstrap() comes first"
        return self._courier

    def handle_warm_shutdown_request(self) -> None:
        """What is in the engine is finished; what isn't goes back to the queue."""
        super().handle_warm_shutdown_request()
        if self._courier:
            self._courier.stop_leasing()

    def teardown(self) -> None:
        """Writes the results that are there, hands the rest back uncounted, and signs off."""
        _ignore_further_signals()
        if self._courier:
            self._courier.close(_CLOSE_TIMEOUT)
        if self._housekeeper:
            self._housekeeper.close(_CLOSE_TIMEOUT)
        try:
            engine_card.withdraw(self.connection, self._settings.queue, self.name)
            super().teardown()
        except RedisError as error:
            self.log.error("Worker %s: could not sign off: %s; Redis forgets the worker by itself", self.name, error)

    def _end(self) -> None:
        """Ends the engine, once. Its processes must not outlive the worker."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()

    # --- an outage of Redis must not end the worker

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Never on this thread: the housekeeper does it, also while the engine is busy for days."""
        return False

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        with self._tolerated_outage():
            super().heartbeat(timeout, pipeline)

    def check_for_suspension(self, burst: bool) -> None:
        with self._tolerated_outage():
            super().check_for_suspension(burst)

    def _show_state(self, state: str) -> None:
        with self._tolerated_outage():
            self.set_state(state)

    def set_shutdown_requested_date(self) -> None:
        with self._tolerated_outage():
            super().set_shutdown_requested_date()

    @contextmanager
    def _tolerated_outage(self) -> Iterator[None]:
        """These calls only tell others about the worker; the courier and the housekeeper report an outage."""
        try:
            yield
        except RedisError as error:
            self.log.debug("Worker %s: Redis: %s", self.name, error)

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """Keeps listening for commands whatever comes: RQ's own handler gives up on all but ConnectionError."""
        self.log.error("Worker %s: while waiting for commands: %s; listening again in 2 s", self.name, exc)
        time.sleep(2.0)

    # --- commands

    def handle_payload(self, message: Any) -> None:
        """Obeys shutdown, stop-job and stop-execution; anything else is logged and left alone."""
        try:
            payload = parse_payload(message)
            command, job_id, execution_id = (payload.get(name) for name in ("command", "job_id", "execution_id"))
        except (ValueError, AttributeError, TypeError, KeyError):
            self.log.warning("Worker %s: a malformed command was ignored", self.name)
            return
        if command == "shutdown":
            os.kill(os.getpid(), signal.SIGINT)
        elif command in ("stop-job", "stop-execution") and isinstance(job_id, str) and self._courier:
            self._courier.post(Stop(job_id, execution_id if command == "stop-execution" else None))
        else:
            self.log.warning("Worker %s: command %.40r was ignored", self.name, command)


def _ignore_further_signals() -> None:
    """An impatient third Ctrl-C must not interrupt the handing back, which takes at most seconds."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _log_where_rq_logs() -> None:
    """Sends ingestq's log lines where RQ's go: its command line sets up its own loggers only."""
    rq_logger, ours = logging.getLogger("rq.worker"), logging.getLogger("ingestq")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers = list(rq_logger.handlers)
        ours.setLevel(rq_logger.level)
        ours.propagate = False


@contextmanager
def _exit_on_bad_settings() -> Iterator[None]:
    """One line instead of a traceback: RQ's command line logs every exception with its stack."""
    try:
        yield
    except SettingsError as error:
        print(f"ingestq: {error}", file=sys.stderr)
        raise SystemExit(2) from None
