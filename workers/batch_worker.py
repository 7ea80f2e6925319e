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

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, worker_registration
from rq.command import parse_payload
from rq.defaults import DEFAULT_RESULT_TTL
from rq.exceptions import StopRequested
from rq.worker.base import BaseWorker, WorkerStatus

from ..common import engine_card, keys
from ..common.connections import SOCKET_TIMEOUT, durability_warnings, sibling
from ..common.errors import SettingsError
from ..common.serializer import OrjsonSerializer
from ..common.settings import Settings
from .courier import Courier, Stop
from .drain import DrainController, default_max_in_flight
from .engines import load_engine
from .engines.base import Engine
from .feed import feed_continuously, feed_waves
from .housekeeper import Housekeeper
from .rows import RowWriter

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
        # The engine or the courier failed: the worker ends with exit code 1.
        self._failed = False
        if kwargs.get("prepare_for_work", True):
            with _exit_on_bad_settings():
                self._settings = self._checked(settings or Settings.from_env())

    def _set_connection(self, connection: Redis) -> Redis:
        """Bounds every wait for an answer; RQ would let a dead connection hold a thread up for seven minutes."""
        connection.connection_pool.connection_kwargs["socket_timeout"] = SOCKET_TIMEOUT
        return connection

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
        """Works as RQ's `work` does. `max_jobs` counts documents; RQ's scheduler isn't needed for retries.

        Raises:
            SystemExit: with code 1 when the engine failed, so that systemd and the like start the worker again.
        """
        self._max_jobs = kwargs.pop("max_jobs", None)
        if kwargs.pop("with_scheduler", False):
            logger.warning("--with-scheduler is left out: BatchWorker moves due retries into the queue itself")
        try:
            worked = super().work(*args, **kwargs)
        finally:
            self._end()
        if self._failed:
            raise SystemExit(1)
        return worked

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """Registers the worker, then loads the engine: in `rq info` it is 'started' until it is ready."""
        super().bootstrap(*args, **kwargs)
        _log_where_rq_logs()
        try:
            self._install_signal_handlers()  # RQ does it later; loading takes minutes
            for warning in durability_warnings(self.connection):
                self.log.warning("Worker %s: %s", self.name, warning)
            self._housekeeper = self._new_housekeeper()
            self._housekeeper.start()
            with _exit_on_bad_settings():
                self._engine = self.load_engine()
            self._housekeeper.catch_up()
            self._courier = self._new_courier(self._engine)
            self._housekeeper.serve(self._courier, self._engine.card)
            engine_card.publish(self.connection, self._settings.queue, self.name, self._engine.card)
            self._courier.start()
        except BaseException as error:
            self.teardown()
            self._end()
            if isinstance(error, StopRequested):
                raise SystemExit(0) from None
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
            state=self.get_state,
            register=self._register_again,
            tidy=self._tidy,
            tidy_interval=self.maintenance_interval,
        )

    def _new_courier(self, engine: Engine) -> Courier:
        # RQ's command line always passes a ttl; its default is not a choice of the user's.
        chosen = self.default_result_ttl != DEFAULT_RESULT_TTL
        rows = RowWriter(
            worker=self.name,
            card=engine.card,
            result_ttl=self.default_result_ttl if chosen else self._settings.result_ttl,
            failure_ttl=self._settings.failure_ttl,
        )
        controller = DrainController(max_in_flight=self._max_in_flight(engine))
        connection = sibling(self.connection)
        return Courier(connection, self._settings, engine, controller, rows, max_jobs=self._max_jobs)

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
        self._state = WorkerStatus.IDLE
        self.procline("Listening on " + ",".join(self.queue_names()))
        idle_since = time.monotonic()
        while True:
            with suppress(Empty):
                return courier.inbox.get(timeout=_LOOK), self.queues[0]
            if courier.failure is not None:
                self._failed = True
                raise StopRequested
            if courier.gate == "suspended":
                self.check_for_suspension(burst)
                idle_since = time.monotonic()
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
        courier = self._ready_courier()
        self._state = WorkerStatus.BUSY
        self.procline(f"Running documents of {queue.name}")
        feed = feed_waves if self._settings.feed == "generate" else feed_continuously
        try:
            feed(self._engine, courier, job, lambda: self._stop_requested or courier.failure is not None)
        except Exception:
            self._failed = True
            raise
        finally:
            self._state = WorkerStatus.IDLE

    def _ready_courier(self) -> Courier:
        assert self._courier is not None, "bootstrap() comes first"
        return self._courier

    def handle_warm_shutdown_request(self) -> None:
        """What is in the engine is finished; what isn't goes back to the queue."""
        super().handle_warm_shutdown_request()
        if self._courier:
            self._courier.stop_leasing()

    def teardown(self) -> None:
        """Writes the results that are there, hands the rest back, and signs off.

        A hand-back is not an attempt, unless the engine failed: it may have been one of these documents.
        """
        _ignore_further_signals()
        if self._courier:
            self._courier.close(_CLOSE_TIMEOUT, max_attempts=self._settings.max_attempts if self._failed else 0)
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

    # --- housekeeping, on the housekeeper's thread

    def _register_again(self) -> None:
        """Writes the worker's record, which Redis had forgotten."""
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping={**self.serialize(), "state": self.get_state()})
            pipeline.expire(self.key, self.worker_ttl + 60)
            worker_registration.register(self, pipeline)
            pipeline.execute()

    def _tidy(self) -> None:
        """Forgets dead workers, and the registry entries of rows that have expired."""
        queue = self.queues[0]
        worker_registration.clean_worker_registry(queue)
        seconds, _ = self.connection.time()
        with self.connection.pipeline(transaction=False) as pipeline:
            for registry in (keys.finished(queue.name), keys.failed(queue.name), keys.canceled(queue.name)):
                pipeline.zremrangebyscore(registry, "-inf", seconds)
            pipeline.execute()

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Never: RQ's own maintenance fails leases that the housekeeper takes over, and calls what jobs name."""
        return False

    # --- what RQ does with Redis on the main thread must neither end the worker nor hold up the engine

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Left to the housekeeper."""
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)

    def check_for_suspension(self, burst: bool) -> None:
        """Waits while `rq suspend` is in force; asked only when the courier found that it is."""
        if self._courier and self._courier.gate == "suspended":
            with suppress(RedisError):
                super().check_for_suspension(burst)

    def set_shutdown_requested_date(self) -> None:
        with suppress(RedisError):
            super().set_shutdown_requested_date()

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
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
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
