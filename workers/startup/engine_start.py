"""`EngineStarter`: whether an engine may be started here, and whether it works, before any document is at stake."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import StopRequested

from ...common.errors import SettingsError
from ...common.machine_health import MachineHealth, read_health, record_failure
from ...common.settings import Settings
from ..engines.base import Engine
from ..logs import described, one_line
from ..signals import ignore_further_signals

logger = logging.getLogger(__name__)

# Seconds between looks at the machine's health: it may have been forgiven.
_LOOK = 2.0

T = TypeVar("T")


class EngineStarter:
    """Starts engines on one machine, with the back-off that its failures ask for."""

    def __init__(self, connection: Redis, settings: Settings, name: str) -> None:
        self._connection = connection
        self._queue = settings.queue
        self._max_failures = settings.max_failures
        self._name = name
        # Whether an engine has failed here and none has worked since, as of `wait_for_turn`.
        self.is_suspect = False

    def wait_for_turn(self, *, once: bool) -> None:
        """Waits out the back-off after failures; on a broken machine, until it is forgiven.

        Args:
            once: the worker ends when the queue is empty: it doesn't wait for a broken machine.

        Raises:
            SystemExit: with code 1, if `once` and the machine is broken.
        """
        said = None
        while True:
            try:
                health = read_health(self._connection, self._queue).get(self._name, MachineHealth())
                wait = health.wait(self._connection.time()[0])
            except RedisError as error:  # that says nothing against this machine
                logger.warning("Redis: %s; the engine is started without a look at its failures", one_line(str(error)))
                return
            self.is_suspect = bool(health.start_failures or health.run_failures)
            if wait <= 0:
                return
            refuses = health.refuses
            if health != said:
                logger.log(logging.CRITICAL if refuses else logging.WARNING, "%s", self._told(health, wait))
                said = health
            if once and refuses:
                raise SystemExit(1)
            time.sleep(min(wait, _LOOK))

    def start(
        self, load: Callable[[], Engine], warm_up: Callable[[Engine], T], stopping: Callable[[], bool]
    ) -> tuple[Engine, T]:
        """A warm engine, with what the warm-up found: what fails from now on may be a document's fault.

        Args:
            stopping: whether the worker was told to stop, whatever has become of the exception that says so.

        Raises:
            StopRequested: it was.
            SettingsError: of `load` or `warm_up`; not counted as a failure of the machine.
            SystemExit: with code 1, when the engine could not be built or failed its warm-up.
        """
        try:
            engine = load()
            return engine, _warmed(engine, warm_up, stopping)
        except SettingsError:
            raise
        except Exception as error:
            if stopping():
                raise StopRequested from error
            reason = f"the engine does not start: {described(error)}"
            logger.critical("%s", reason, exc_info=True, extra={"action": "engine_start_failed"})
            with suppress(RedisError):
                record_failure(
                    self._connection, self._queue, self._name, "start", reason, max_failures=self._max_failures
                )
            raise SystemExit(1) from error

    def _told(self, health: MachineHealth, wait: float) -> str:
        failures = health.start_failures + health.run_failures
        what = (
            f"the engine failed {failures} times in a row on {self._name} ({one_line(health.reason)}); "
            f"next start in {wait:.0f} s"
        )
        if health.refuses:
            return f"{what}. No work is taken here until then. Mend the machine, then: ingestq forgive {self._name}"
        return what


def _warmed(engine: Engine, warm_up: Callable[[Engine], T], stopping: Callable[[], bool]) -> T:
    """What the warm-up found; an engine that fails it, or isn't wanted any more, is closed."""
    try:
        found = warm_up(engine)
        if stopping():
            raise StopRequested
        return found
    except BaseException:  # a signal's, too
        ignore_further_signals()  # the worker ends in any case
        with suppress(Exception):
            engine.close()  # its processes would hold the accelerator
        raise
