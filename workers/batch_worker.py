"""`BatchWorker`, for RQ's stock command line: `rq worker -w ingestq.workers.BatchWorker ingest`.

All use of RQ's internals is in this file. RQ's own `work()` loop is kept; its two halves are overridden:
`dequeue_job_and_maintain_ttl` waits for the first ready prompt, `execute_job` runs the engine until it is idle.
The courier leases, encodes and writes results meanwhile; the housekeeper sees to everything else that can't wait; the
guardian, a process of its own, renews the leases and hands them back should this process die.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, worker_registration
from rq.command import parse_payload
from rq.defaults import DEFAULT_RESULT_TTL
from rq.exceptions import StopRequested
from rq.utils import now
from rq.worker.base import BaseWorker, WorkerStatus

from ..common import engine_card, keys, scripts
from ..common.connections import SOCKET_TIMEOUT, durability_warnings, explained, sibling
from ..common.engine_config import with_model
from ..common.errors import SettingsError
from ..common.machine_health import record_failure, record_success
from ..common.serializer import OrjsonSerializer
from ..common.settings import Settings, is_name
from . import preemption, processes
from .courier import Courier
from .crash_report import CrashReport
from .drain import EngineLoad
from .drain_bounds import drain_controller
from .engines import load_engine
from .engines.base import Engine
from .feed import feed_continuously, feed_waves
from .guardian import Guardian, Ward, portable
from .housekeeper import Housekeeper
from .live_card import LiveCard
from .live_load import LiveLoad
from .logs import described, log_where_rq_logs
from .messages import Stop
from .rows import RowWriter
from .signals import SignalCount, ignore_further_signals
from .startup.engine_start import EngineStarter
from .startup.warmup import Warmed, WarmUp
from .vitals import Duty, Vitals

logger = logging.getLogger(__name__)

# Seconds to write results and hand leases back at the end; what is late is taken over when its lease ends.
_CLOSE_TIMEOUT = 5.0

# Seconds that ending the engine may take before the guardian kills the worker; vLLM's own limits are below.
_ENGINE_CLOSE_TIMEOUT = 60.0

# Seconds between looks at suspension and idle time while there is nothing to run.
_LOOK = 0.25

# Seconds between looks at the health of the machine, and between reports of it.
_HEALTH_LOOK = 2.0


class BatchWorker(BaseWorker):
    """Leases many jobs at once and runs them through one in-process engine."""

    def __init__(self, queues: Any, *args: Any, settings: Settings | None = None, **kwargs: Any) -> None:
        """
        Args:
            queues: queues or their names, those to be served first before the others.
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
        self._guardian: Guardian | None = None
        # Tells this worker from others that had or will have its name.
        self._incarnation = secrets.token_hex(8)
        self._burst = False
        # How the engine or the courier failed: the worker ends with exit code 1.
        self._failure = ""
        self._replaced = False
        self._torn_down = False
        # Whether no lease is left behind.
        self._is_clear = True
        self._start_told = self._proof_told = False
        self._signals = SignalCount()
        self._told_to_stop = False
        if kwargs.get("prepare_for_work", True):
            self._vitals, self._crash_report = Vitals.create(), CrashReport.create()
            with _exit_on_bad_settings():
                self._settings = self._checked(settings or Settings.from_env())

    def _set_connection(self, connection: Redis) -> Redis:
        """Bounds every wait for an answer; RQ would let a dead connection hold a thread up for seven minutes."""
        connection.connection_pool.connection_kwargs["socket_timeout"] = SOCKET_TIMEOUT
        return connection

    def _checked(self, settings: Settings) -> Settings:
        for name in self.queue_names():
            if not is_name(name):
                raise SettingsError(
                    f"queue {name!r}: a name has 1 to 128 letters, digits and _ . : -; tenants (queue@tenant) are "
                    f"served with their queue"
                )
        if self._exc_handlers:
            raise SettingsError("BatchWorker calls no exception handlers; leave out --exception-handler")
        settings = with_model(settings)
        settings.served_model  # noqa: B018  raises if there is none
        return settings.model_copy(update={"queue": self._queue_names[0]})

    @property
    def _queue_names(self) -> list[str]:
        """Each once, in order of priority. The settings' queue is the first of them."""
        return list(dict.fromkeys(self.queue_names()))

    @property
    def _machine(self) -> str:
        """Whose failures these are; workers of one host share them."""
        return self.hostname or "localhost"

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
        self._burst = bool(kwargs.get("burst") or (args and args[0]))
        if kwargs.pop("with_scheduler", False):
            logger.warning("--with-scheduler is left out: BatchWorker moves due retries into the queue itself")
        try:
            worked = super().work(*args, **kwargs)
        finally:
            if not self._is_clear and not self._torn_down:
                self.teardown()  # the loop had not begun
            self._end()
        if self._failure:
            raise SystemExit(1)
        return worked

    def register_birth(self) -> None:
        """Takes this worker's name, and whatever leases a dead worker of that name has left.

        Raises:
            SystemExit: with code 2 when a live worker has the name.
        """
        self.birth_date = self.last_heartbeat = now()
        raw: list[Any] = self.connection.hmget(self.key, "incarnation", "process")
        former, process = ((value or b"").decode(errors="replace") for value in raw)
        seconds = scripts.claim(
            self.connection,
            self._queue_names,
            worker=self.name,
            incarnation=self._incarnation,
            dead=former if processes.is_dead(process) else "",
            lease_ttl=self._settings.lease_ttl,
            worker_ttl=self.worker_ttl + 60,
            record=self._record(),
        )
        with _exit_on_bad_settings():
            if seconds:
                raise SettingsError(
                    f"a worker named {self.name!r} is alive; choose another name (-n). If it was lost with its "
                    f"machine, its name is free in {seconds} s"
                )
        for queue in self._queue_names:
            returned = self._hand_back_all(queue, "its worker was lost; the next one of its name took over")
            if returned.queued or returned.dead_lettered:
                self.log.warning(
                    "Worker %s: took over what a lost worker of this name held: %d documents of %s queued again, "
                    "%d failed",
                    self.name,
                    returned.queued,
                    queue,
                    returned.dead_lettered,
                )

    def register_death(self) -> None:
        """As RQ's, but also when Redis is full, and never another worker's of this name."""
        scripts.sign_off(self.connection, self._queue_names, worker=self.name, incarnation=self._incarnation)

    def _record(self) -> dict[str, Any]:
        return {**self.serialize(), "process": processes.identity(os.getpid())}

    def _hand_back_all(self, queue: str, reason: str) -> scripts.HandedBack:
        return scripts.hand_back_all(
            self.connection,
            queue,
            failure_ttl=self._settings.failure_ttl,
            worker=self.name,
            incarnation=self._incarnation,
            max_crashes=self._settings.max_crashes,
            reason=reason,
        )

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """Registers the worker, then loads the engine: in `rq info` it is 'started' until it is ready."""
        try:
            super().bootstrap(*args, **kwargs)
        except RedisError as error:
            print(f"ingestq: Redis: {explained(error)}", file=sys.stderr)
            raise SystemExit(1) from None
        log_where_rq_logs()
        try:
            self._install_signal_handlers()  # RQ does it later; loading takes minutes
            self._signals.install()
            for warning in durability_warnings(self.connection):
                self.log.warning("Worker %s: %s", self.name, warning)
            self._guardian = self._new_guardian()
            self._guardian.ensure()
            self._housekeeper = self._new_housekeeper(self._guardian)
            self._housekeeper.start()
            self._crash_report.enable()
            self._engine, warmed = self._start_engine()
            self._crash_report.enable()  # the engine may have set up its own
            self._guardian.say_ready()
            self._guardian.await_watch()  # before there are leases
            self._housekeeper.catch_up()
            self._courier = self._new_courier(self._engine, warmed)
            card, load = LiveCard(self._engine, warmed), LiveLoad(self._engine, self._courier)
            self._housekeeper.serve(self._courier, card, load)
            with suppress(RedisError):  # the housekeeper renews it
                for queue in self._queue_names:
                    engine_card.publish(self.connection, queue, self.name, card())
            self._is_clear = False
            self._courier.start()
        except BaseException as error:
            self.teardown()
            self._end()
            if isinstance(error, StopRequested):
                raise SystemExit(0) from None
            raise
        self.log.info(
            "Worker %s: %s ready on %s, model %s, up to %d documents in flight; %s",
            self.name,
            self._engine.card.engine,
            self._engine.card.device,
            self._engine.card.model,
            self._courier.in_flight_limit,
            warmed,
        )

    def _start_engine(self) -> tuple[Engine, Warmed]:
        starter = EngineStarter(self.connection, self._settings, self._machine)
        warm_up = WarmUp(
            self.connection,
            self._settings,
            stopping=lambda: self._told_to_stop,
            promise=lambda: self._vitals.promise(Duty.STEP, self._settings.step_timeout),
            release=lambda: self._vitals.release(Duty.STEP),
        )
        with _exit_on_bad_settings():
            starter.wait_for_turn(once=self._burst)
            # After a failure, the prefixes of documents are as suspect as the machine.
            run = partial(warm_up.run, fill_cache=not starter.is_suspect)
            return starter.start(self.load_engine, run, lambda: self._told_to_stop)

    def _new_guardian(self) -> Guardian:
        pool = sibling(self.connection).connection_pool
        ward = Ward(
            pid=os.getpid(),
            worker=self.name,
            incarnation=self._incarnation,
            queues=tuple(self._queue_names),
            machine=self._machine,
            lease_ttl=self._settings.lease_ttl,
            worker_ttl=self.worker_ttl + 60,
            failure_ttl=self._settings.failure_ttl,
            max_crashes=self._settings.max_crashes,
            max_failures=self._settings.max_failures,
            preemption_url=self._settings.preemption_url or preemption.default_url(),
            connection_class=pool.connection_class,
            connection_options=portable(pool.connection_kwargs),
        )
        return Guardian(ward, self._vitals, self._crash_report)

    def _new_housekeeper(self, guardian: Guardian) -> Housekeeper:
        # One that retries nothing, so that no duty takes longer than the guardian waits to hear of this thread.
        self._duty_connection = sibling(self.connection)
        return Housekeeper(
            self._duty_connection,
            self._settings,
            queues=self._queue_names,
            worker=self.name,
            incarnation=self._incarnation,
            worker_ttl=self.worker_ttl + 60,
            guardian=guardian,
            vitals=self._vitals,
            look=self._look_around,
            state=self.get_state,
            register=self._register_again,
            replaced=self._on_replaced,
            duties={self._tidy: self.maintenance_interval, self._tell_of_success: _HEALTH_LOOK},
        )

    def _new_courier(self, engine: Engine, warmed: Warmed) -> Courier:
        # RQ's command line always passes a ttl; its default is not a choice of the user's.
        chosen = self.default_result_ttl != DEFAULT_RESULT_TTL
        rows = RowWriter(
            worker=self.name,
            card=engine.card,
            result_ttl=self.default_result_ttl if chosen else self._settings.result_ttl,
            failure_ttl=self._settings.failure_ttl,
        )
        return Courier(
            sibling(self.connection),
            self._settings,
            engine,
            drain_controller(self._settings, engine, warmed.rates),
            rows,
            self._vitals,
            queues=self._queue_names,
            incarnation=self._incarnation,
            max_jobs=self._max_jobs,
        )

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Any, Queue] | None:
        """Waits for the first prompt that is ready for the engine.

        Returns:
            The Ready prompts to begin with and a queue; None when a burst has emptied the queues, or after
            `max_idle_time` seconds.
        """
        courier = self._ready_courier()
        burst = timeout is None
        self._state = WorkerStatus.IDLE
        self.procline("Listening on " + ",".join(self.queue_names()))
        idle_since = time.monotonic()
        while True:
            if courier.pool.wait(_LOOK) and (ready := courier.start_ready(EngineLoad())):
                # One by one: the rest is started as it is admitted.
                return ready, self.queues[0]
            if courier.failure is not None:
                self._failure = f"the courier failed: {described(courier.failure)}"
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
        """Runs the engine, beginning with the Ready prompts `job`, until there is nothing left for it to do."""
        assert self._engine is not None
        courier = self._ready_courier()
        self._state = WorkerStatus.BUSY
        self.procline(f"Running documents of {queue.name}")
        waves = self._settings.feed == "generate"
        feed = feed_waves if waves else feed_continuously
        # A wave is one step here: how long it takes is bounded by its documents.
        patience = self._settings.document_timeout if waves else self._settings.step_timeout
        try:
            feed(
                self._engine,
                courier,
                job,
                lambda: self._stop_requested or courier.failure is not None,
                lambda: self._vitals.promise(Duty.STEP, patience),
            )
        except Exception as error:
            self._failure = f"the engine failed: {described(error)}"
            raise
        finally:
            self._vitals.release(Duty.STEP)
            self._state = WorkerStatus.IDLE

    def _ready_courier(self) -> Courier:
        assert self._courier is not None, "bootstrap() comes first"
        return self._courier

    def handle_warm_shutdown_request(self) -> None:
        """What is in the engine is finished; what isn't goes back to the queue."""
        super().handle_warm_shutdown_request()
        self._begin_stop()

    def _begin_stop(self) -> None:
        """Called by whoever hears of it first: the signal's handler or, when that has to wait, the housekeeper."""
        if self._told_to_stop:
            return
        self._told_to_stop = True
        if self._guardian:
            self._guardian.say_stopping()
        if self._courier:
            self._courier.stop_leasing()

    def teardown(self) -> None:
        """Writes the results that are there, hands the rest back, and signs off.

        A hand-back is not an attempt, unless the engine failed: it may have been one of these documents.
        """
        ignore_further_signals()
        self._torn_down = True
        self._is_clear = self._courier is None or self._courier.close(_CLOSE_TIMEOUT, crash=self._failure)
        if self._housekeeper:
            self._housekeeper.close(_CLOSE_TIMEOUT)
        if self._replaced:
            return
        try:
            if self._failure and self._courier:
                record_failure(
                    self.connection,
                    self._settings.queue,
                    self._machine,
                    "run",
                    self._failure,
                    max_failures=self._settings.max_failures,
                )
            for queue in self._queue_names:
                engine_card.withdraw(self.connection, queue, self.name)
            if self._is_clear:
                super().teardown()
        except RedisError as error:
            self.log.error("Worker %s: could not sign off: %s; Redis forgets the worker by itself", self.name, error)

    def _end(self) -> None:
        """Ends the engine, once, and dismisses the guardian. The engine's processes must not outlive the worker."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            self._vitals.promise(Duty.STEP, _ENGINE_CLOSE_TIMEOUT)
            engine.close()
            self._vitals.release(Duty.STEP)
        self._signals.uninstall()
        if self._guardian is None:
            return
        if self._is_clear:
            self._guardian.end(_CLOSE_TIMEOUT)
        else:
            self.log.warning("Worker %s: its guardian hands back what it still holds, once Redis is there", self.name)
            if not self._failure:
                self._guardian.say_stopping()

    # --- housekeeping, on the housekeeper's thread

    def _look_around(self) -> None:
        """What can't wait for the main thread, which may be in a step of minutes."""
        if self._vitals.preempted or self._signals.is_cold():
            self._stop_now()
        elif self._signals.came:
            self._begin_stop()

    def _stop_now(self) -> None:
        """Writes what is finished and hands back the rest, while the main thread may still be in its last step."""
        if self._courier is None:
            if not self._told_to_stop:
                os.kill(os.getpid(), signal.SIGTERM)  # the engine is being loaded
            return
        self._stop_requested = True
        if not self._courier.closing:
            self._courier.close(_CLOSE_TIMEOUT)

    def _on_replaced(self) -> None:
        """Another worker has this one's name: it was taken for dead, stopped for longer than its leases last."""
        if not self._replaced:
            self.log.critical("Worker %s: another worker has taken this name; stopping", self.name)
            self._replaced = True
            self._stop_now()

    def _tell_of_success(self) -> None:
        """Ends rows of failures: of starts, as the engine is ready, and of runs with the first finished document."""
        if self._courier and not self._start_told:
            record_success(self._duty_connection, self._settings.queue, self._machine, "start")
            self._start_told = True
        if self._courier and self._courier.proved and not self._proof_told:
            record_success(self._duty_connection, self._settings.queue, self._machine, "run")
            self._proof_told = True

    def _register_again(self) -> None:
        """Writes the worker's record, which Redis had forgotten."""
        scripts.claim(
            self._duty_connection,
            self._queue_names,
            worker=self.name,
            incarnation=self._incarnation,
            dead="",
            lease_ttl=self._settings.lease_ttl,
            worker_ttl=self.worker_ttl + 60,
            record={**self._record(), "state": self.get_state()},
        )

    def _tidy(self) -> None:
        """Forgets dead workers, and the registry entries of rows that have expired."""
        for queue in self.queues:
            worker_registration.clean_worker_registry(queue)
            self._forget_expired(queue.name)

    def _forget_expired(self, queue: str) -> None:
        seconds, _ = self._duty_connection.time()
        with self._duty_connection.pipeline(transaction=False) as pipeline:
            for registry in (keys.finished(queue), keys.failed(queue)):
                pipeline.zremrangebyscore(registry, "-inf", seconds)
            # RQ's own cancel gives no time to live: there the score tells nothing.
            pipeline.zrangebyscore(keys.canceled(queue), "-inf", seconds, start=0, num=1000)
            cancelled = pipeline.execute()[-1]
        with self._duty_connection.pipeline(transaction=False) as pipeline:
            for job_id in cancelled:
                pipeline.exists(keys.job(job_id.decode(errors="replace")))
            gone = [job_id for job_id, exists in zip(cancelled, pipeline.execute(), strict=True) if not exists]
        if gone:
            self._duty_connection.zrem(keys.canceled(queue), *gone)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Never: RQ's own maintenance fails leases that the housekeeper takes over, and calls what jobs name."""
        return False

    # --- what RQ does with Redis on the main thread must neither end the worker nor hold up the engine

    def set_state(self, state: str, pipeline: Any = None) -> None:
        """Shown by the housekeeper: a server that is full or loading must not end the worker."""
        self._state = state

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


@contextmanager
def _exit_on_bad_settings() -> Iterator[None]:
    """One line instead of a traceback: RQ's command line logs every exception with its stack."""
    try:
        yield
    except SettingsError as error:
        print(f"ingestq: {error}", file=sys.stderr)
        raise SystemExit(2) from None
