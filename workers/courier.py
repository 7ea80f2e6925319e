"""`Courier`: carries jobs from Redis to the engine and results back, in a thread of its own.

The engine's step loop (feed.py) never waits for Redis or for a tokenizer: it starts prompts out of the pool of ready
ones and posts what became of them to the courier's mailbox. All of the worker's lease book-keeping happens on this
thread; other threads only post messages, and ask the drain controller under its lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Literal, cast

from redis import Redis
from redis.exceptions import RedisError

from ..common import keys, scripts
from ..common.connections import SOCKET_TIMEOUT
from ..common.errors import DocumentError, DocumentTimeout
from ..common.scripts import Admission, Finish, LeasedJob
from ..common.settings import Settings
from .drain import DrainController, EngineLoad, StartGate
from .engines.base import Completion, Engine, StepReport
from .holdings import Held, Holdings
from .intake import Intake
from .leaser import Leaser
from .logs import one_line
from .messages import Completed, Lost, Message, Started, Stop
from .outbox import Outbox
from .pool import Ready, ReadyPool
from .queue_shares import QueueShares
from .readying import Readying
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

# Seconds between looks at the live limits of all queues: a lease reads only those of the queue that it asks, and while
# the limits admit nothing there is none.
_LIMITS = 1.0

# Seconds between exchanges of output lengths with the other workers: a task's first documents take longer.
_LEARN = 5.0

# The same while there is nothing to tell.
_LEARN_IDLE = 60.0

# Gates that open by this worker's own documents alone: to look again before one has ended is of no use.
_OWN_GATES = ("worker", "kv", "head")

# Seconds between attempts while Redis is away: doubled from the first up to the last.
_OUTAGE_WAIT = (0.1, 5.0)

# The same at the end, which waits for a few seconds only.
_CLOSING_WAIT = 0.5

# Leases of which the time in the queue is kept, for `ingestq status`.
_WAITS = 1000


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
        queues: Sequence[str] = (),
        incarnation: str = "",
        max_jobs: int | None = None,
    ) -> None:
        """
        Args:
            queues: in order of priority; default: the settings' queue.
            incarnation: tells this worker from others of its name.
            max_jobs: documents to lease at most; None: any number.
        """
        self._connection = connection
        self._settings = settings
        self._engine = engine
        self._queues = list(queues) or [settings.queue]
        # Under the lock: the step loop asks it and tells it of steps, this thread asks it what to lease.
        self._controller = controller
        self._control = threading.Lock()
        self._rows = rows
        self._vitals = vitals
        self._incarnation = incarnation
        self._jobs_left = max_jobs
        # Prompts ready for the engine, and ids of prompts to abort in it.
        self.pool = ReadyPool(max_passes=controller.in_flight_limit)
        self.aborts: SimpleQueue[str] = SimpleQueue()
        self._mailbox: SimpleQueue[Message] = SimpleQueue()
        self.holdings = Holdings()
        self._outbox = Outbox(
            connection,
            settings,
            worker=rows.worker,
            model=engine.card.model,
            on_written=self._on_written,
        )
        self._intake = Intake(connection, settings, engine, self._queues, max_kv_tokens=controller.bounds.max_kv_tokens)
        self._leaser = Leaser(
            connection,
            self._queues,
            QueueShares(self._queues, settings.lower_share),
            worker=rows.worker,
            model=engine.card.model,
            lease_ttl=settings.lease_ttl,
        )
        # What holds for every lease, and admits none.
        self._bounds = Admission(
            documents=0,
            max_kv_tokens=controller.bounds.max_kv_tokens,
            max_kv_tokens_fleet=settings.max_kv_tokens_fleet,
            max_in_flight_fleet=settings.max_in_flight_fleet,
            block_size=engine.kv_cache.block_size,
        )
        self._readying = Readying(
            connection,
            self._intake,
            self.holdings,
            self.pool,
            rows,
            self._bounds,
            limits=lambda queue: self._leaser.limits[queue],
            settle=self._settle,
            lost=lambda member: self._handle(Lost([member])),
            give_back=lambda prompt_ids: self._hand_back(self._let_go(prompt_ids)),
        )
        self._learned_at, self._limits_due = float("-inf"), 0.0
        # Milliseconds in the queue of the documents leased last.
        self.queue_waits: deque[int] = deque(maxlen=_WAITS)
        # Documents that the engine finished, and their tokens, prompt and output.
        self.num_finished = self.num_tokens = 0
        # When to look next: at once, soon, or only when something changes.
        self._look: Literal["now", "soon", "idle"] = "now"
        # Whether Redis may count leases as ours of which we know nothing: a lease call whose answer was lost.
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
        # What keeps ready prompts out of the engine, at the last step.
        self.start_gate: StartGate = "open"
        # What the last look at the queues met.
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
    def in_flight(self) -> int:
        """Leases held whose results are not written yet."""
        return len(self.holdings)

    @property
    def in_flight_limit(self) -> int:
        """Documents that may be in flight now."""
        return self._controller.in_flight_limit

    @property
    def max_kv_tokens(self) -> dict[str, int]:
        """Queue -> KV tokens that this worker may have reserved to lease from it, by its own bound and the queue's."""
        own = self._bounds.max_kv_tokens
        limits = {queue: each.max_kv_tokens for queue, each in self._leaser.limits.items()}
        return {queue: own if limit is None else min(limit, own or limit) for queue, limit in limits.items()}

    @property
    def gates(self) -> dict[str, scripts.Gate]:
        """Queue -> what kept jobs in it at the last look."""
        return self._leaser.gates

    def start_ready(self, load: EngineLoad) -> list[Ready]:
        """Takes out of the pool what the engine may start now; called by the step loop, between steps.

        Args:
            load: what the engine has already.
        """
        self.start_gate = "open"
        if not self.pool:
            return []

        def may_start(ready: Ready) -> bool:
            nonlocal load
            self.start_gate = self._controller.start_gate(load, ready.num_prompt_tokens, ready.num_blocks)
            if self.start_gate != "open":
                return False
            load = load.plus(ready.num_prompt_tokens, ready.num_blocks)
            return True

        with self._control:
            started = self.pool.take(may_start)
        if started:
            self.post(Started())
        return started

    def observe(self, report: StepReport) -> None:
        """Tells the controller of a step; called by the step loop."""
        with self._control:
            self._controller.observe(report, limit_used=self.in_flight >= self._controller.in_flight_limit)

    @contextmanager
    def controller(self) -> Iterator[DrainController]:
        """The controller, held still while it is looked at."""
        with self._control:
            yield self._controller

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
                self._learn()
                self._take()
                wait = _OUTAGE_WAIT[0]
                self._rest()
            except RedisError as error:
                self._log_outage(error, wait)
                self._lease_unsure = True
                self._look = "soon"  # a wave doesn't wait for it
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
        elif self._leaser.is_searching:
            self._closing.wait(_BUSY_LOOK)  # jobs of other models are in the way: look further
        else:
            tokens = [keys.wake(queue, self._engine.card.model) for queue in self._queues]
            self._connection.blpop(tokens, timeout=_IDLE_LOOK)

    def _admission(self) -> Admission:
        """What may be leased now."""
        if not self._leasing:
            return self._bounds
        with self._control:
            want = self._controller.admit(
                in_flight=self.in_flight,
                num_ready=len(self.pool),
                ready_tokens=self.pool.num_tokens,
                waiting_tokens=self._engine.num_waiting_tokens,
                jobs_left=self._jobs_left,
            )
        return replace(self._bounds, documents=want.documents, prompt_tokens=want.prompt_tokens)

    @property
    def _room(self) -> int:
        return self._admission().documents

    def _finish_up(self) -> None:
        """The end: what the engine finished is written, the rest goes back."""
        self._read_mail()
        self._write()
        self._hand_back_unstarted()  # the engine never saw them
        self._hand_back(list(self.holdings.open.values()), self._crash)
        self._give_up_unknown_leases()
        with suppress(RedisError):  # the fleet's loss, no document's
            self._intake.learn()

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
                if held := self.holdings.open.get(prompt_id):
                    self._count(held.job, outcome)
                    self._settle(self._rows.ended(held.job, held.request, outcome))
            case Started():
                self._look = "now"
            case Stop(job_id, execution_id):
                for prompt_id, held in list(self.holdings.open.items()):
                    if held.job.job_id == job_id and execution_id in (None, prompt_id):
                        self._abort(prompt_id)
                        self._settle(self._rows.stopped(held.job, held.request))
            case Lost(members):
                for prompt_id in [member.partition(":")[2] for member in members]:
                    if held := self.holdings.open.pop(prompt_id, None):
                        self._abort(prompt_id)
                        logger.warning(
                            "job %s: the lease is gone (cancelled, deleted or taken over); aborted",
                            held.job.job_id,
                            extra={"action": "lease_lost", "job_id": held.job.job_id},
                        )

    def _abort(self, prompt_id: str) -> None:
        """Wherever the prompt is: in the pool, or in the engine already."""
        self.pool.drop([prompt_id])
        self.aborts.put(prompt_id)

    def _count(self, job: LeasedJob, outcome: Completion | DocumentError) -> None:
        """What a document's end says of those to come."""
        if isinstance(outcome, DocumentError):
            return
        if outcome.finish_reason == "error":
            with self._control:
                self._controller.observe_errors(1)
            return
        self.num_finished += 1
        self.num_tokens += outcome.num_prompt_tokens + len(outcome.token_ids)
        if self._intake.observe(job, len(outcome.token_ids)):
            self._reorder()

    def _reorder(self) -> None:
        """What waits for the engine, by what is known of its tasks by now."""
        held = self.holdings.open

        def expected_output(ready: Ready) -> float:
            if ready.prompt_id not in held:
                return ready.expected_output
            return self._intake.expected_output(held[ready.prompt_id].job, ready.prompt.sampling.max_tokens)

        self.pool.reorder(expected_output)

    def _learn(self) -> None:
        """What outputs to expect; nothing waits for it, so that whatever Redis says to it holds up nothing."""
        now = time.monotonic()
        if now - self._learned_at < (_LEARN if self._intake.has_news else _LEARN_IDLE):
            return
        self._learned_at = now
        try:
            self._intake.learn()
            self._reorder()
        except RedisError as error:
            logger.warning("Redis: %s; output lengths are exchanged later", one_line(str(error)))

    def _settle(self, item: Finish) -> None:
        """The document's outcome is known: what the engine still says of it doesn't count."""
        self.holdings.settle(item.job.execution_id)
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
        self.holdings.settling.pop(item.job.execution_id, None)

    def _end_late(self) -> None:
        """Fails documents that have been in flight for too long."""
        now, timeout = time.monotonic(), self._settings.document_timeout
        if now < self._late_look:
            return
        self._late_look = now + _IDLE_LOOK
        for prompt_id, held in list(self.holdings.open.items()):
            if now - held.since > timeout:
                self._abort(prompt_id)
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
        self._readying.run()  # what an outage has left
        self._heed_limits()
        admission = self._admission()
        if admission.documents == 0:
            self._look = "idle"
            return
        self._look = "now"
        look = self._leaser.look(
            admission,
            self._intake.reservations,
            company=self._controller.company(held.job.crashes for held in self.holdings.open.values()),
            companies=self._controller.companies,
        )
        self._hold(look.jobs)
        self._readying.run()
        self.gate = look.gate
        if look.gate == "open" and (look.jobs or look.num_adopted):
            self._look = "now" if self._room else "idle"
        elif look.gate in _OWN_GATES and self.in_flight:
            self._look = "idle"
        else:
            self._look = "soon"
        if look.gate == "open" and look.searched and not self.in_flight:
            self.exhausted.set()
        else:
            self.exhausted.clear()

    def _heed_limits(self) -> None:
        """Tells the controller what Redis admits: what a lease has just read, and now and then all of it."""
        if time.monotonic() >= self._limits_due:
            self._leaser.read_limits()
            self._limits_due = time.monotonic() + _LIMITS
        with self._control:
            self._controller.update(self._leaser.limits.values())

    def _hold(self, jobs: Sequence[LeasedJob]) -> None:
        """Takes charge of new leases, all of them at once: they are renewed while their texts are encoded."""
        for job in jobs:
            self.holdings.add(job)
            if job.enqueued_ms is not None:
                self.queue_waits.append(max(0, job.leased_ms - job.enqueued_ms))
        self._readying.add(jobs)
        if self._jobs_left is not None:  # only now: with none left and none held, the worker is done
            self._jobs_left -= len(jobs)

    # --- handing back

    def _hand_back_unstarted(self) -> None:
        """What the engine hasn't taken, in one go, so that it keeps its order."""
        unstarted = [*(ready.prompt_id for ready in self.pool.drain()), *self._readying.drain()]
        self._hand_back([held for prompt_id in unstarted if (held := self.holdings.open.get(prompt_id))])

    def _give_up_unknown_leases(self) -> None:
        """Hands back leases that only Redis knows of, such as those of a lost answer: nobody would run them."""
        known = {job.member for job in self.holdings.jobs}
        raw = cast(set[bytes], self._connection.smembers(keys.worker_executions(self._rows.worker)))
        held = [member.decode(errors="replace") for member in raw]  # what isn't text is no lease of ours
        unknown = [member for member in held if member not in known]
        for queue in self._queues:
            if unknown:
                scores = self._connection.zmscore(keys.started(queue), unknown)
                here = [member for member, score in zip(unknown, scores, strict=True) if score is not None]
                self._outbox.hand_back_members(queue, here, incarnation=self._incarnation)
                unknown = [member for member, score in zip(unknown, scores, strict=True) if score is None]
        # Leases of no queue any more: only their traces are left.
        self._outbox.hand_back_members(self._queues[0], unknown, incarnation=self._incarnation)
        self._lease_unsure = False
        self._census_due = time.monotonic() + _CENSUS

    def _let_go(self, prompt_ids: Iterable[str]) -> list[Held]:
        """Leases that are to be handed back, not held any more from now on, and none of those that `--max-jobs` counts.

        Should a call fail, the next look for unknown leases hands them back.
        """
        leases = [held for prompt_id in prompt_ids if (held := self.holdings.open.get(prompt_id))]
        if self._jobs_left is not None:
            self._jobs_left += len(leases)
        for held in leases:
            del self.holdings.open[held.job.execution_id]
        return leases

    def _hand_back(self, leases: Iterable[Held], crash: str = "") -> None:
        leases = list(leases)
        self._outbox.hand_back([held.job for held in leases], crash)
        for held in leases:
            self.holdings.open.pop(held.job.execution_id, None)
