"""`Courier`: carries jobs from Redis to the engine and results back, in a thread of its own.

The engine's step loop (feed.py) never waits for Redis or for a tokenizer: it takes ready prompts from `inbox` and
posts what became of them to the courier's mailbox. All of the worker's lease book-keeping happens on this thread;
other threads only post messages.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal, cast

from redis import Redis
from redis.exceptions import RedisError

from ..common import keys, scripts
from ..common.connections import SOCKET_TIMEOUT
from ..common.errors import DocumentError, DocumentTimeout, InvalidJob, PromptRefused
from ..common.schema import IngestRequest
from ..common.scripts import Finish, LeasedJob
from ..common.settings import Settings
from .drain import DrainController
from .engines.base import Completion, Engine, Prompt
from .logs import one_line
from .outbox import Outbox
from .prompts import ANY_MODEL, NewerSchema, build_prompt, needs_of, parse_request
from .rows import RowWriter
from .vitals import Duty, Vitals

logger = logging.getLogger(__name__)

# Seconds between looks at an empty queue: jobs of plain RQ clients leave no wake token.
_IDLE_LOOK = 1.0

# Seconds between looks while the engine has room but the queue had nothing to give, or admission was closed.
_BUSY_LOOK = 0.05

# Seconds between looks for leases that Redis counts as this worker's though it has none of them: a fail-over may have
# forgotten how they ended, without an error here.
_CENSUS = 5.0

# Seconds between attempts while Redis is away: doubled from the first up to the last.
_OUTAGE_WAIT = (0.1, 5.0)

# The same at the end, which waits for a few seconds only.
_CLOSING_WAIT = 0.5


@dataclass(frozen=True, slots=True)
class Completed:
    """The engine is done with a prompt, or refused it."""

    prompt_id: str
    outcome: Completion | DocumentError


@dataclass(frozen=True, slots=True)
class Stop:
    """RQ's stop-job or stop-execution command: of a job, or of one of its executions."""

    job_id: str | None
    execution_id: str | None


@dataclass(frozen=True, slots=True)
class Lost:
    """Leases that Redis no longer knows: cancelled, deleted, or taken over."""

    members: Sequence[str]


Message = Completed | Stop | Lost


@dataclass(slots=True)
class _Held:
    """A lease of this worker. Its execution id names its prompt."""

    job: LeasedJob
    # None until the job is parsed, and for good if it isn't a valid request.
    request: IngestRequest | None = None
    # Seconds by time.monotonic().
    since: float = field(default_factory=time.monotonic)


class Courier:
    """Leases, encodes, and writes results for one engine."""

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        engine: Engine,
        controller: DrainController,
        rows: RowWriter,
        vitals: Vitals,
        *,
        incarnation: str = "",
        max_jobs: int | None = None,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._engine = engine
        self._controller = controller
        self._rows = rows
        self._vitals = vitals
        self._incarnation = incarnation
        self._jobs_left = max_jobs
        # Prompts ready for the engine, and ids of prompts to abort in it.
        self.inbox: SimpleQueue[Prompt] = SimpleQueue()
        self.aborts: SimpleQueue[str] = SimpleQueue()
        self._mailbox: SimpleQueue[Message] = SimpleQueue()
        # Prompt id -> lease, until its outcome is known; then, until its result is written.
        self._held: dict[str, _Held] = {}
        self._settling: dict[str, _Held] = {}
        self._outbox = Outbox(
            connection,
            settings,
            worker=rows.worker,
            model=engine.card.model,
            on_written=self._on_written,
        )
        self._position = 0
        self._look: Literal["now", "soon", "idle"] = "now"
        self._lease_unsure = False
        self._census_due = time.monotonic() + _CENSUS
        self._leasing = True
        self._closing = threading.Event()
        # See `close`.
        self._crash = ""
        # What ended the thread though it should go on: the worker can't serve any more.
        self.failure: BaseException | None = None
        # Set while the queue has nothing for this worker and it holds nothing.
        self.exhausted = threading.Event()
        # What the last look at the queue met.
        self.gate: scripts.Gate = "open"
        # Whether this engine has finished a document.
        self.proved = False
        # When to look for documents that take too long, by time.monotonic().
        self._late_look = 0.0
        self._thread = threading.Thread(target=self._run, name="ingestq-courier", daemon=True)

    # --- called by other threads

    def start(self) -> None:
        self._thread.start()

    def post(self, message: Message) -> None:
        """Tells the courier something; returns at once."""
        self._mailbox.put(message)

    @property
    def members(self) -> list[str]:
        """The leases held, as they stand in Redis."""
        return [held.job.member for held in [*list(self._held.values()), *list(self._settling.values())]]

    @property
    def in_flight(self) -> int:
        """Leases held whose results are not written yet."""
        return len(self._held) + len(self._settling)

    @property
    def full(self) -> bool:
        """Whether there is no room or nothing to fill it with: a wave may start."""
        return self._look != "now"

    @property
    def done(self) -> bool:
        """Whether `--max-jobs` is reached and all is written."""
        return self._jobs_left == 0 and not self.in_flight

    def stop_leasing(self) -> None:
        """From now on only results are written, and what isn't in the engine goes back: a warm shutdown begins."""
        self._leasing = False

    @property
    def closing(self) -> bool:
        """Whether everything goes back now: what the engine still has doesn't count."""
        return self._closing.is_set()

    def close(self, timeout: float, *, crash: str = "") -> bool:
        """Writes the results that are there, hands everything else back, and ends the thread. May be called twice.

        Args:
            timeout: seconds to wait for Redis; what is not written by then is taken over when its lease ends.
            crash: how the engine failed: the hand-back counts as a crash. "": it is no attempt.

        Returns:
            Whether nothing is held any more.
        """
        self._leasing = False
        if not self._closing.is_set():
            self._crash = crash
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        elif self.failure is not None:
            with suppress(RedisError):
                self._finish_up()
        return not self._thread.is_alive() and not self.in_flight

    # --- the thread

    def _run(self) -> None:
        wait = _OUTAGE_WAIT[0]
        # Whatever the calls of one pass take, each may wait for Redis.
        patience = self._settings.step_timeout + 2 * SOCKET_TIMEOUT
        while self.failure is None:
            self._vitals.promise(Duty.COURIER, patience)
            try:
                if self._closing.is_set():
                    self._finish_up()
                    break
                self._read_mail()
                self._write()
                self._end_late()
                self._take()
                wait = _OUTAGE_WAIT[0]
                self._rest()
            except RedisError as error:
                self._log_outage(error, wait)
                self._lease_unsure = True
                self._pause(wait)
                wait = min(2 * wait, _OUTAGE_WAIT[1])
            except BaseException as error:
                # A bug here must not leave the engine running with nobody to carry its results.
                logger.critical(
                    "the courier failed; the worker stops", exc_info=True, extra={"action": "courier_failed"}
                )
                self.failure = error
        self._vitals.release(Duty.COURIER)

    def _pause(self, wait: float) -> None:
        if self._closing.is_set():
            time.sleep(min(wait, _CLOSING_WAIT))  # a look at the event would not wait
        else:
            self._closing.wait(wait)

    def _log_outage(self, error: RedisError, wait: float) -> None:
        logger.error(
            "Redis: %s; %d results are kept in memory, next attempt in %.1f s",
            one_line(str(error)),
            len(self._outbox),
            wait,
            extra={"action": "redis_outage"},
        )

    def _rest(self) -> None:
        """Waits for what can change something: mail while documents are in flight, else a wake token."""
        if self._look == "now" or self._outbox or not self._mailbox.empty() or self._closing.is_set():
            return
        if self.in_flight:
            self._read_mail(timeout=_IDLE_LOOK if self._look == "idle" else _BUSY_LOOK)
        elif not self._room:
            self._closing.wait(_BUSY_LOOK)  # no work is wanted, so no token is taken from those who want it
        elif self._position:
            self._closing.wait(_BUSY_LOOK)  # jobs of other models are in the way: look further
        else:
            self._connection.blpop([keys.wake(self._settings.queue, self._engine.card.model)], timeout=_IDLE_LOOK)

    @property
    def _room(self) -> int:
        if not self._leasing:
            return 0
        return self._controller.admit(in_flight=self.in_flight, jobs_left=self._jobs_left)

    def _finish_up(self) -> None:
        """The end: what the engine finished is written, the rest goes back."""
        self._read_mail()
        self._write()
        self._hand_back_unstarted()  # the engine never saw them
        self._hand_back(list(self._held.values()), self._crash)
        self._give_up_unknown_leases()

    # --- results

    def _read_mail(self, timeout: float = 0.0) -> None:
        """Handles every message there is, waiting up to `timeout` seconds for the first."""
        with suppress(Empty):
            message = self._mailbox.get(timeout=timeout) if timeout else self._mailbox.get_nowait()
            while True:
                self._handle(message)
                message = self._mailbox.get_nowait()

    def _handle(self, message: Message) -> None:
        match message:
            case Completed(prompt_id, outcome):
                if held := self._held.get(prompt_id):
                    self._settle(self._rows.ended(held.job, held.request, outcome))
            case Stop(job_id, execution_id):
                for prompt_id, held in list(self._held.items()):
                    if held.job.job_id == job_id and execution_id in (None, prompt_id):
                        self.aborts.put(prompt_id)
                        self._settle(self._rows.stopped(held.job, held.request))
            case Lost(members):
                for prompt_id in [member.partition(":")[2] for member in members]:
                    if held := self._held.pop(prompt_id, None):
                        self.aborts.put(prompt_id)
                        logger.warning(
                            "job %s: the lease is gone (cancelled, deleted or taken over); aborted",
                            held.job.job_id,
                            extra={"action": "lease_lost", "job_id": held.job.job_id},
                        )

    def _settle(self, item: Finish) -> None:
        """The document's outcome is known: what the engine still says of it doesn't count."""
        prompt_id = item.job.execution_id
        self._settling[prompt_id] = self._held.pop(prompt_id)
        self._outbox.add(item)
        self.proved |= item.kind == "S"
        if item.exception:
            logger.log(
                logging.ERROR if item.kind == "P" else logging.WARNING,
                "job %s: %s; its row says why",  # an engine may quote the document: the log doesn't
                item.job.job_id,
                item.exception.partition(":")[0],
                extra={"action": "document_failed", "job_id": item.job.job_id},
            )

    def _write(self) -> None:
        """Writes what is finished; keeps it if Redis is away."""
        if self._outbox:
            self._outbox.write()
            self._look = "now"

    def _on_written(self, item: Finish) -> None:
        self._settling.pop(item.job.execution_id, None)

    def _end_late(self) -> None:
        """Fails documents that have been in flight for too long."""
        now, timeout = time.monotonic(), self._settings.document_timeout
        if now < self._late_look:
            return
        self._late_look = now + _IDLE_LOOK
        for prompt_id, held in list(self._held.items()):
            if now - held.since > timeout:
                self.aborts.put(prompt_id)
                late = DocumentTimeout(
                    f"not done {now - held.since:.0f} s after it was leased, INGEST_DOCUMENT_TIMEOUT is {timeout:g}; "
                    f"split the document, lower max_tokens, or raise the limit"
                )
                self._settle(self._rows.ended(held.job, held.request, late))

    # --- jobs

    def _take(self) -> None:
        """Leases what is admitted and readies it for the engine."""
        if self._lease_unsure or time.monotonic() >= self._census_due:
            self._give_up_unknown_leases()
        if not self._leasing:
            self._hand_back_unstarted()
        want = self._room
        if want == 0:
            self._look = "idle"
            return
        reply = scripts.lease(
            self._connection,
            self._settings.queue,
            worker=self._rows.worker,
            model=self._engine.card.model,
            want=want,
            lease_ttl=self._settings.lease_ttl,
            max_in_flight_fleet=self._settings.max_in_flight_fleet,
            call_id=os.urandom(7).hex(),
            company=self._controller.company(held.job.crashes for held in self._held.values()),
            companies=self._controller.companies,
            position=self._position,
        )
        adopted = self._adopt(reply.unknown)
        searched = reply.next_position >= reply.queue_length
        self._position = 0 if reply.jobs or adopted or searched else reply.next_position
        self._ready(reply.jobs)
        if self._jobs_left is not None:
            self._jobs_left -= len(reply.jobs)
        self.gate = reply.gate
        if reply.gate != "open":
            self._look = "soon"
        elif reply.jobs or adopted:
            self._look = "now" if self._room else "idle"
        else:
            self._look = "soon"
        if reply.gate == "open" and searched and not adopted and not self.in_flight:
            self.exhausted.set()
        else:
            self.exhausted.clear()

    def _adopt(self, unknown: Sequence[tuple[str, bytes]]) -> int:
        """Finds out what the jobs of plain RQ clients need; the next look takes those that are ours."""
        if not unknown:
            return 0
        return scripts.adopt(
            self._connection, self._settings.queue, [(job_id, *needs_of(data)) for job_id, data in unknown]
        )

    def _ready(self, jobs: Sequence[LeasedJob]) -> None:
        """Parses and encodes; a bad document fails here, alone."""
        # All of them first: their leases are renewed while the texts are encoded.
        for job in jobs:
            self._held[job.execution_id] = _Held(job)
        newer: dict[str, int] = {}
        for job in jobs:
            held = self._held[job.execution_id]
            try:
                held.request = self._parsed(job)
                self.inbox.put(build_prompt(held.request, job.execution_id, self._engine, self._settings.over_length))
            except NewerSchema as error:
                newer[job.execution_id] = error.schema
            except DocumentError as error:
                self._settle(self._rows.ended(job, held.request, error))
            except BaseException as error:
                # Whatever a tokenizer makes of a text (Rust's panics are no Exceptions), it is this document's end.
                refusal = PromptRefused(f"{type(error).__name__} while its prompt was built")
                self._settle(self._rows.ended(job, held.request, refusal))
        if newer:
            self._leave_to_newer(newer)

    def _parsed(self, job: LeasedJob) -> IngestRequest:
        request = parse_request(job)
        if request.model != self._engine.card.model:
            raise InvalidJob(
                f"job {job.job_id}: it was queued for {self._engine.card.model!r}, its request asks for another model; "
                f"enqueue it anew"
            )
        return request

    def _leave_to_newer(self, newer: dict[str, int]) -> None:
        """Hands back jobs of schemas yet to come, marked, so that no worker of ours takes them again."""
        # Not held any more: should a call fail, the next look for unknown leases hands them back.
        leases = [self._held.pop(prompt_id) for prompt_id in newer]
        scripts.adopt(
            self._connection,
            self._settings.queue,
            [(held.job.job_id, ANY_MODEL, newer[held.job.execution_id]) for held in leases],
        )
        self._hand_back(leases)
        logger.warning(
            "%d documents wait for a newer worker: they are of schema version %d",
            len(leases),
            max(newer.values()),
            extra={"action": "newer_schema"},
        )

    # --- handing back

    def _hand_back_unstarted(self) -> None:
        """What the engine hasn't taken, in one go, so that it keeps its order."""
        unstarted = []
        with suppress(Empty):
            while True:
                unstarted.append(self.inbox.get_nowait().prompt_id)
        self._hand_back([self._held[prompt_id] for prompt_id in unstarted if prompt_id in self._held])

    def _give_up_unknown_leases(self) -> None:
        """Hands back leases that only Redis knows of, such as those of a lost answer: nobody would run them."""
        known = set(self.members)
        raw = cast(set[bytes], self._connection.smembers(keys.worker_executions(self._rows.worker)))
        held = [member.decode(errors="replace") for member in raw]  # what isn't text is no lease of ours
        self._outbox.hand_back([member for member in held if member not in known], incarnation=self._incarnation)
        self._lease_unsure = False
        self._census_due = time.monotonic() + _CENSUS

    def _hand_back(self, leases: Sequence[_Held], crash: str = "") -> None:
        self._outbox.hand_back([held.job.member for held in leases], crash)
        for held in leases:
            self._held.pop(held.job.execution_id, None)
