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
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal, cast

from redis import Redis
from redis.exceptions import RedisError

from ..common import keys, scripts
from ..common.errors import DocumentError, EngineError
from ..common.schema import IngestRequest, IngestResult, Status, Usage
from ..common.scripts import Finish, LeasedJob
from ..common.settings import Settings
from .drain import DrainController
from .engines.base import Completion, Engine, Prompt
from .prompts import build_prompt, model_of, parse_request

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


@dataclass(frozen=True, slots=True)
class _Held:
    """A lease of this worker. Its execution id names its prompt."""

    job: LeasedJob
    # None if the job turned out not to be a valid request.
    request: IngestRequest | None


class Courier:
    """Leases, encodes, and writes results for one engine."""

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        engine: Engine,
        controller: DrainController,
        *,
        worker: str,
        default_result_ttl: int,
        max_jobs: int | None = None,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._engine = engine
        self._controller = controller
        self._worker = worker
        self._default_result_ttl = default_result_ttl
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
        self._closing = False
        # Set while a look at the queue found nothing for this worker and it holds nothing.
        self.exhausted = threading.Event()
        self.num_fenced = 0
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
        """From now on only results are written, and what isn't in the engine goes back: a warm shutdown begins.

        The engine's loop must not take from `inbox` after this.
        """
        self._leasing = False

    def close(self, timeout: float) -> None:
        """Writes the results that are there, hands everything else back, and ends the thread.

        Args:
            timeout: seconds to wait for Redis; what is not written by then is taken over when its lease ends.
        """
        self._leasing = False
        self._closing = True
        if self._thread.is_alive():
            self._thread.join(timeout)

    # --- the thread

    def _run(self) -> None:
        wait = _OUTAGE_WAIT[0]
        while True:
            try:
                self._read_mail()
                self._write()
                self._take()
                wait = _OUTAGE_WAIT[0]
                if self._closing:
                    self._hand_back_all()
                    return
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
                time.sleep(wait)
                wait = min(2 * wait, _OUTAGE_WAIT[1])
            except Exception:
                # A bug here must not leave the engine running with nobody to carry its results.
                logger.critical(
                    "the courier failed; the worker stops", exc_info=True, extra={"action": "courier_failed"}
                )
                os.abort()

    def _rest(self) -> None:
        """Waits for what can change something: mail while documents are in flight, else a wake token."""
        if self._look == "now" or self._unwritten or not self._mailbox.empty():
            return
        if self._held or not self._leasing:
            self._read_mail(timeout=_IDLE_LOOK if self._look == "idle" and not self._has_room else _BUSY_LOOK)
        else:
            self._connection.blpop([keys.wake(self._settings.queue, self._engine.card.model)], timeout=_IDLE_LOOK)

    @property
    def _has_room(self) -> bool:
        return self._room > 0

    @property
    def _room(self) -> int:
        if not self._leasing:
            return 0
        return self._controller.admit(in_flight=self.in_flight, jobs_left=self._jobs_left)

    # --- results

    def _read_mail(self, timeout: float = 0.0) -> None:
        """Handles every message there is, waiting up to `timeout` seconds for the first."""
        try:
            message = self._mailbox.get(timeout=timeout) if timeout else self._mailbox.get_nowait()
            while True:
                self._handle(message)
                message = self._mailbox.get_nowait()
        except Empty:
            pass

    def _handle(self, message: Message) -> None:
        match message:
            case Completed(prompt_id, outcome):
                if held := self._held.get(prompt_id):
                    self._settle(self._finish(held, outcome))
            case Stop():
                self._stop(message)
            case Lost(members):
                for prompt_id in [member.partition(":")[2] for member in members]:
                    if held := self._held.pop(prompt_id, None):
                        logger.warning(
                            "job %s: the lease is gone (cancelled, deleted or taken over); aborted",
                            held.job.job_id,
                            extra={"action": "lease_lost", "job_id": held.job.job_id},
                        )
                        self.aborts.put(prompt_id)

    def _stop(self, message: Stop) -> None:
        for prompt_id, held in list(self._held.items()):
            if held.job.job_id == message.job_id and message.execution_id in (None, prompt_id):
                self.aborts.put(prompt_id)
                self._settle(self._stopped(held))

    def _settle(self, item: Finish) -> None:
        """The document's outcome is known: what the engine still says of it doesn't count."""
        prompt_id = item.job.execution_id
        self._settling[prompt_id] = self._held.pop(prompt_id)
        self._unwritten.append(item)

    def _write(self) -> None:
        """Writes what is finished; keeps it if Redis is away."""
        while self._unwritten:
            part = _head(self._unwritten)
            outcomes = scripts.finish(
                self._connection,
                self._settings.queue,
                worker=self._worker,
                model=self._engine.card.model,
                finishes=part,
            )
            del self._unwritten[: len(part)]
            for item, outcome in zip(part, outcomes, strict=True):
                self._settling.pop(item.job.execution_id, None)
                if outcome == "fenced":
                    self.num_fenced += 1
                    logger.warning(
                        "job %s: result dropped, the lease was lost or the result already written",
                        item.job.job_id,
                        extra={"action": "fenced", "job_id": item.job.job_id},
                    )
            self._look = "now"

    def _finish(self, held: _Held, outcome: Completion | DocumentError) -> Finish:
        """The row of a document that the engine finished, failed or refused."""
        if isinstance(outcome, DocumentError):
            return self._failed(held, "P", type(outcome).__name__, str(outcome))
        if outcome.finish_reason == "error":
            return self._failed(held, "F", EngineError.__name__, outcome.error or "the engine gave no reason")
        job = held.job
        result = self._row(
            held,
            Status.SUCCEEDED,
            text=outcome.text,
            finish_reason=outcome.finish_reason,
            usage=Usage(
                prompt_tokens=outcome.num_prompt_tokens,
                cached_tokens=outcome.num_cached_tokens,
                output_tokens=len(outcome.token_ids),
            ),
            ttft_ms=round(outcome.ttft_ms, 3),
            run_ms=round(outcome.run_ms, 3),
        )
        ttl = self._default_result_ttl if job.result_ttl is None else job.result_ttl
        return Finish(job=job, kind="S", ttl=ttl, result_json=result.to_json())

    def _failed(self, held: _Held, kind: Literal["F", "P"], error_class: str, message: str) -> Finish:
        logger.log(
            logging.WARNING if kind == "F" else logging.ERROR,
            "job %s: %s: %s",
            held.job.job_id,
            error_class,
            message,
            extra={"action": "document_failed", "job_id": held.job.job_id},
        )
        result = self._row(held, Status.FAILED, error_class=error_class, error_message=message)
        return self._dead(held, kind, result, f"{error_class}: {message}")

    def _stopped(self, held: _Held) -> Finish:
        result = self._row(
            held, Status.STOPPED, error_class="Stopped", error_message="stopped by RQ's stop-job command"
        )
        return self._dead(held, "X", result, "stopped by RQ's stop-job command")

    def _dead(self, held: _Held, kind: Literal["F", "P", "X"], result: IngestResult, exception: str) -> Finish:
        ttl = self._settings.failure_ttl if held.job.failure_ttl is None else held.job.failure_ttl
        return Finish(job=held.job, kind=kind, ttl=ttl, result_json=result.to_json(), exception=exception)

    def _row(self, held: _Held, status: Status, **fields: object) -> IngestResult:
        job, card = held.job, self._engine.card
        return IngestResult.model_validate(
            {
                "document_id": held.request.document_id if held.request else job.job_id,
                "job_id": job.job_id,
                "status": status,
                "queue_ms": None if job.enqueued_ms is None else job.leased_ms - job.enqueued_ms,
                "attempts": job.attempts,
                "worker": self._worker,
                "model": card.model,
                "engine_digest": card.engine_digest,
                **fields,
            }
        )

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
            worker=self._worker,
            model=self._engine.card.model,
            want=want,
            lease_ttl=self._settings.lease_ttl,
            max_in_flight_fleet=self._settings.max_in_flight_fleet,
            call_id=os.urandom(7).hex(),
            position=self._position,
        )
        if reply.unknown:
            models = [(job_id, model_of(data)) for job_id, data in reply.unknown]
            scripts.adopt(self._connection, self._settings.queue, models)
        searched = reply.next_position >= reply.queue_length
        self._position = 0 if reply.jobs or reply.unknown or searched else reply.next_position
        for job in reply.jobs:
            self._ready(job)
        if self._jobs_left is not None:
            self._jobs_left -= len(reply.jobs)
        if reply.gate == "open" and (reply.jobs or reply.unknown or not searched):
            self._look = "now" if self._has_room else "idle"
        else:
            self._look = "soon"
        if not self.in_flight and reply.gate == "open" and searched and not reply.unknown:
            self.exhausted.set()
        else:
            self.exhausted.clear()

    def _ready(self, job: LeasedJob) -> None:
        """Parses and encodes one job; a bad one fails here, alone."""
        request = None
        try:
            request = parse_request(job)
            prompt = build_prompt(request, job.execution_id, self._engine, self._settings.over_length)
        except DocumentError as error:
            held = self._held[job.execution_id] = _Held(job, request)
            self._settle(self._finish(held, error))
            return
        self._held[job.execution_id] = _Held(job, request)
        self.inbox.put(prompt)

    # --- handing back

    def _hand_back_unstarted(self) -> None:
        """In one go, so that they keep their order: this thread alone reads the inbox now."""
        unstarted = []
        with suppress(Empty):
            while True:
                unstarted.append(self.inbox.get_nowait().prompt_id)
        self._hand_back([self._held[prompt_id] for prompt_id in unstarted if prompt_id in self._held])

    def _give_up_unknown_leases(self) -> None:
        """Hands back leases whose reply was lost with the connection: nobody would run them."""
        known = set(self.members)
        raw = cast(set[bytes], self._connection.smembers(keys.worker_executions(self._worker)))
        self._hand_back_members([member for member in map(bytes.decode, raw) if member not in known])
        self._lease_unsure = False

    def _hand_back_all(self) -> None:
        self._hand_back(list(self._held.values()))
        self._give_up_unknown_leases()

    def _hand_back(self, leases: Sequence[_Held]) -> None:
        self._hand_back_members([held.job.member for held in leases])
        for held in leases:
            self._held.pop(held.job.execution_id, None)

    def _hand_back_members(self, members: list[str]) -> None:
        # Last leased first: each call puts its jobs in front of those of the calls before it. An execution id begins
        # with the time of its lease.
        members = sorted(members, key=lambda member: member.partition(":")[2])
        for end in range(len(members), 0, -scripts.CHUNK):
            part = members[max(0, end - scripts.CHUNK) : end]
            returned = scripts.hand_back(
                self._connection, self._settings.queue, failure_ttl=self._settings.failure_ttl, members=part
            )
            logger.info("handed back %d documents", returned.queued, extra={"action": "hand_back"})


def _head(finishes: list[Finish]) -> list[Finish]:
    """As many as one script call takes."""
    size = 0
    for count, item in enumerate(finishes[: scripts.CHUNK]):
        size += len(item.result_json)
        if count and size > scripts.MAX_CALL_BYTES:
            return finishes[:count]
    return finishes[: scripts.CHUNK]
