"""`Courier`: carries jobs from Redis to the engine and results back, in a thread of its own.

The engine's step loop (feed.py) never waits for Redis or for a tokenizer: it takes ready prompts from `inbox` and
posts what became of them to the courier's mailbox. All of the worker's lease book-keeping happens on this thread;
other threads only post messages.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal, cast

from redis import Redis
from redis.exceptions import RedisError

from ..common import keys, scripts
from ..common.errors import DocumentError, PromptRefused
from ..common.schema import IngestRequest
from ..common.scripts import Finish, LeasedJob
from ..common.settings import Settings
from .drain import DrainController
from .engines.base import Completion, Engine, Prompt
from .prompts import build_prompt, model_of, parse_request
from .rows import RowWriter

logger = logging.getLogger(__name__)

# Seconds between looks at an empty queue: jobs of plain RQ clients leave no wake token.
_IDLE_LOOK = 1.0

# Seconds between looks while the engine has room but the queue had nothing to give, or admission was closed.
_BUSY_LOOK = 0.05

# Seconds between attempts while Redis is away: doubled from the first up to the last.
_OUTAGE_WAIT = (0.1, 5.0)


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


class Courier:
    """Leases, encodes, and writes results for one engine."""

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        engine: Engine,
        controller: DrainController,
        rows: RowWriter,
        *,
        max_jobs: int | None = None,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._engine = engine
        self._controller = controller
        self._rows = rows
        self._jobs_left = max_jobs
        # Prompts ready for the engine, and ids of prompts to abort in it.
        self.inbox: SimpleQueue[Prompt] = SimpleQueue()
        self.aborts: SimpleQueue[str] = SimpleQueue()
        self._mailbox: SimpleQueue[Message] = SimpleQueue()
        # Prompt id -> lease, until its outcome is known; then, until its result is written.
        self._held: dict[str, _Held] = {}
        self._settling: dict[str, _Held] = {}
        self._unwritten: list[Finish] = []
        self._position = 0
        self._look: Literal["now", "soon", "idle"] = "now"
        self._lease_unsure = False
        self._leasing = True
        self._closing = threading.Event()
        # See `close`.
        self._max_attempts = 0
        # What ended the thread though it should go on: the worker can't serve any more.
        self.failure: BaseException | None = None
        # Set while the queue has nothing for this worker and it holds nothing.
        self.exhausted = threading.Event()
        # What the last look at the queue met.
        self.gate: scripts.Gate = "open"
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

    def close(self, timeout: float, *, max_attempts: int = 0) -> None:
        """Writes the results that are there, hands everything else back, and ends the thread.

        Args:
            timeout: seconds to wait for Redis; what is not written by then is taken over when its lease ends.
            max_attempts: 0: the hand-back is not an attempt. More: the engine failed; a document that was leased that
                often is failed.
        """
        self._leasing = False
        self._max_attempts = max_attempts
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        elif self.failure is not None:
            with suppress(RedisError):
                self._finish_up()

    # --- the thread

    def _run(self) -> None:
        wait = _OUTAGE_WAIT[0]
        while self.failure is None:
            try:
                if self._closing.is_set():
                    self._finish_up()
                    return
                self._read_mail()
                self._write()
                self._take()
                wait = _OUTAGE_WAIT[0]
                self._rest()
            except RedisError as error:
                logger.error(
                    "Redis: %s; %d results are kept in memory, next attempt in %.1f s",
                    error,
                    len(self._unwritten),
                    wait,
                    extra={"action": "redis_outage"},
                )
                self._lease_unsure = True
                self._closing.wait(wait)
                wait = min(2 * wait, _OUTAGE_WAIT[1])
            except BaseException as error:
                # A bug here must not leave the engine running with nobody to carry its results.
                logger.critical(
                    "the courier failed; the worker stops", exc_info=True, extra={"action": "courier_failed"}
                )
                self.failure = error

    def _rest(self) -> None:
        """Waits for what can change something: mail while documents are in flight, else a wake token."""
        if self._look == "now" or self._unwritten or not self._mailbox.empty() or self._closing.is_set():
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
        self._hand_back(list(self._held.values()))
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
        self._unwritten.append(item)
        if item.exception:
            logger.log(
                logging.ERROR if item.kind == "P" else logging.WARNING,
                "job %s: %s",
                item.job.job_id,
                item.exception,
                extra={"action": "document_failed", "job_id": item.job.job_id},
            )

    def _write(self) -> None:
        """Writes what is finished; keeps it if Redis is away."""
        while self._unwritten:
            part = _head(self._unwritten)
            outcomes = scripts.finish(
                self._connection,
                self._settings.queue,
                worker=self._rows.worker,
                model=self._engine.card.model,
                finishes=part,
            )
            del self._unwritten[: len(part)]
            for item, outcome in zip(part, outcomes, strict=True):
                self._settling.pop(item.job.execution_id, None)
                if outcome == "fenced":
                    logger.warning(
                        "job %s: result dropped, the lease was lost or the result already written",
                        item.job.job_id,
                        extra={"action": "fenced", "job_id": item.job.job_id},
                    )
            self._look = "now"

    # --- jobs

    def _take(self) -> None:
        """Leases what is admitted and readies it for the engine."""
        if self._lease_unsure:
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
        """Finds out which model the jobs of plain RQ clients ask for; the next look takes those that are ours."""
        if not unknown:
            return 0
        return scripts.adopt(
            self._connection, self._settings.queue, [(job_id, model_of(data)) for job_id, data in unknown]
        )

    def _ready(self, jobs: Sequence[LeasedJob]) -> None:
        """Parses and encodes; a bad document fails here, alone."""
        # All of them first: their leases are renewed while the texts are encoded.
        for job in jobs:
            self._held[job.execution_id] = _Held(job)
        for job in jobs:
            held = self._held[job.execution_id]
            try:
                held.request = parse_request(job)
                self.inbox.put(build_prompt(held.request, job.execution_id, self._engine, self._settings.over_length))
            except DocumentError as error:
                self._settle(self._rows.ended(job, held.request, error))
            except BaseException as error:
                # Whatever a tokenizer makes of a text (Rust's panics are no Exceptions), it is this document's end.
                refusal = PromptRefused(f"{type(error).__name__} while its prompt was built")
                self._settle(self._rows.ended(job, held.request, refusal))

    # --- handing back

    def _hand_back_unstarted(self) -> None:
        """What the engine hasn't taken, in one go, so that it keeps its order."""
        unstarted = []
        with suppress(Empty):
            while True:
                unstarted.append(self.inbox.get_nowait().prompt_id)
        self._hand_back([self._held[prompt_id] for prompt_id in unstarted if prompt_id in self._held])

    def _give_up_unknown_leases(self) -> None:
        """Hands back leases whose reply was lost with the connection: nobody would run them."""
        known = set(self.members)
        raw = cast(set[bytes], self._connection.smembers(keys.worker_executions(self._rows.worker)))
        self._hand_back_members([member for member in map(bytes.decode, raw) if member not in known])
        self._lease_unsure = False

    def _hand_back(self, leases: Sequence[_Held]) -> None:
        self._hand_back_members([held.job.member for held in leases])
        for held in leases:
            self._held.pop(held.job.execution_id, None)

    def _hand_back_members(self, members: list[str]) -> None:
        # Last leased first: each call puts its jobs in front of those of the calls before it. An execution id begins
        # with the time of its lease.
        members = sorted(members, key=lambda member: member.partition(":")[2])
        for end in range(len(members), 0, -scripts.CHUNK):
            returned = scripts.hand_back(
                self._connection,
                self._settings.queue,
                failure_ttl=self._settings.failure_ttl,
                members=members[max(0, end - scripts.CHUNK) : end],
                max_attempts=self._max_attempts,
            )
            logger.info(
                "handed back %d documents, failed %d",
                returned.queued,
                returned.dead_lettered,
                extra={"action": "hand_back"},
            )


def _head(finishes: list[Finish]) -> list[Finish]:
    """As many as one script call takes."""
    size = 0
    for count, item in enumerate(finishes[: scripts.CHUNK]):
        size += len(item.result_json)
        if count and size > scripts.MAX_CALL_BYTES:
            return finishes[:count]
    return finishes[: scripts.CHUNK]
