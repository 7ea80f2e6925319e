"""`IngestQueue`: puts documents into Redis as RQ jobs, each once."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, cast

from ..common import payload, scripts
from ..common.connections import connect, persist, sibling
from ..common.durability import Barrier
from ..common.engine_card import EngineCard, live_cards
from ..common.errors import NotDurable, QueueRefused, QueueUnavailable, RequestRefused, SettingsError, UnknownGroup
from ..common.keys import group as group_key
from ..common.schema import IngestRequest, job_id
from ..common.scripts import EnqueueOptions, NewJob
from ..common.settings import Settings
from ..common.task_id import estimated_tokens, task_id
from .bounds import check_bytes, check_context, check_sampling
from .group import PATIENCE, check_name, new_group_id
from .group import Group as Group

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

# Payload bytes in one script call. At 64 KB a document, 512 KiB is 1.4 times as fast as 4 MiB (2,900 against 2,100
# jobs/s, 2 cores, Valkey 9.1: both sides reuse their buffers) and holds other clients up less.
_CALL_BYTES = 512 * 1024

# Seconds that a document may wait for others to share its script call. It is sent when the next one comes: a slow
# source's last document waits for its end.
_LINGER = 0.5

# Seconds between signs of life of a producer whose source is slow; readers give it up after 60.
_BEAT = 10.0

# Seconds between confirmations within a call, where INGEST_DURABILITY asks for them: one takes up to a second with
# appendfsync everysec. The next documents wait for it.
_CONFIRM_EVERY = 10.0

# Seconds for which engine cards are believed.
_CARDS_MAX_AGE = 60.0

# Attempts beyond the first; as in finish.lua. RQ takes any number.
MAX_RETRIES = 1000

# Document ids that a Group names as already there.
_MAX_JOINED = 1000


class RetryPolicy(Protocol):
    """What is used of `rq.Retry`."""

    # Attempts beyond the first.
    max: int
    # Seconds before each.
    intervals: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enqueued:
    """What became of one document."""

    job_id: str
    # enqueued: it will run. joined: it was queued, scheduled or running already. finished: its row is there.
    outcome: Literal["enqueued", "joined", "finished"]


class IngestQueue:
    """Documents into an RQ queue. A document submitted twice, by whomever, runs once.

    Documents of a tenant wait in a list of their own, and tenants that have some waiting take turns by tokens, so that
    none waits behind another's backlog. A tenant is no part of what determines the job: a document that two submit is
    one job. It runs once, in the turn of the tenant that submitted it first, and both get its row.

    Args:
        name: the RQ queue; default INGEST_QUEUE.
        connection: a client that returns bytes (`decode_responses=False`); default connects to RQ_REDIS_URL.
        settings: default is the environment's.

    Raises:
        SettingsError: a setting or name is malformed, or the client decodes responses.
        QueueUnavailable: no connection was given and Redis doesn't answer.
    """

    def __init__(
        self, name: str | None = None, connection: Redis | None = None, settings: Settings | None = None
    ) -> None:
        self.settings = settings or Settings.from_env()
        self.name = check_name("queue", self.settings.queue if name is None else name)
        self.connection = connect(self.settings.redis_url) if connection is None else connection
        if self.connection.connection_pool.connection_kwargs.get("decode_responses"):
            raise SettingsError(
                "the Redis client has decode_responses=True; RQ and ingestq need one that returns bytes"
            )
        self._cards: dict[str, list[EngineCard]] = {}
        self._cards_read_at = float("-inf")
        self._warned_models: set[str] = set()

    def enqueue(
        self, request: IngestRequest, *, tenant: str | None = None, retry: RetryPolicy | None = None
    ) -> Enqueued:
        """Accepts one document, in no group; `fetch_results([enqueued.job_id])` finds its row.

        Cancelling a group that has the same document leaves it running.

        Args:
            tenant: in whose turn it runs, if it isn't there already: a name like a queue's; "" for nobody's. Default:
                INGEST_TENANT.
            retry: an `rq.Retry`: what to do when the document fails; default is nothing.

        Raises:
            SettingsError: the tenant's name is malformed, or `retry` has a number of attempts that is out of bounds.
            RequestRefused: the document is over a bound, or no live worker can run it.
            QueueUnavailable: it was not accepted, or perhaps was, or (NotDurable) not as INGEST_DURABILITY asks; the
                same call again is safe.
        """
        options = self._options("", tenant, retry)
        job = self._prepare(request)
        barrier = self._barrier()
        outcomes = self._send([job], options)
        barrier.confirm(PATIENCE)
        outcome: Literal["enqueued", "joined", "finished"]
        outcome = "enqueued" if outcomes[0] == 1 else "joined" if outcomes[0] == 2 else "finished"
        return Enqueued(job_id=job.job_id, outcome=outcome)

    def enqueue_many(
        self,
        requests: Iterable[IngestRequest],
        *,
        group_id: str | None = None,
        tenant: str | None = None,
        retry: RetryPolicy | None = None,
        seal: bool = True,
        on_refused: Callable[[RequestRefused], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Group:
        """Accepts documents into a group, in their order; returns once Redis has all of them.

        How Redis has them is what INGEST_DURABILITY says: in memory, on its disk, or on a replica.

        `requests` is read as it is sent: memory grows by 16 bytes a document. When the call fails midway the group
        stays open; the same call again, with the group id that the error names, completes it and repeats none.

        Args:
            requests: any iterable. What it raises passes through, with a note on how many were accepted.
            group_id: 1 to 128 letters, digits and _ . : -; one that exists is opened and added to. Default: a new one.
            tenant: in whose turn those run that are new: 1 to 128 of the same characters; "" for nobody's. Default:
                INGEST_TENANT.
            retry: an `rq.Retry` for those that are new; default is none.
            seal: no more documents will come. False: the next call must come within a minute, or `Group.touch`.
            on_refused: takes the refusal of each document that is, and the call goes on without it.
            on_progress: takes the number of documents in Redis' memory so far, after each script call.

        Raises:
            SettingsError: the name of the group or tenant, or the number of attempts of `retry`, is out of bounds.
            RequestRefused: a document is over a bound, or no live worker can run it, and there is no `on_refused`.
                Documents before it may be accepted, see its `accepted`; none after it is.
            QueueUnavailable: Redis dropped the connection for 15 s; see its `accepted`.
            QueueRefused: likewise, Redis refuses to write: full, read-only, disk full, wrong password, ...
            NotDurable: likewise, Redis can't do what INGEST_DURABILITY asks (then nothing was accepted), or did not.
        """
        group = Group(
            id=new_group_id(self.name) if group_id is None else check_name("group", group_id),
            queue=self.name,
            connection=self.connection,
            settings=self.settings,
        )
        options = self._options(group.id, tenant, retry)
        self._cards_read_at = float("-inf")
        accepted = _Accepted(on_progress)
        try:
            accepted.barrier = self._barrier()
            group.touch(seal=False)
            with _kept_alive(group), _Ahead(self, options, accepted) as ahead:
                for chunk, full in self._chunks(requests, on_refused):
                    ahead.send(chunk, wait=not full)
            if seal:
                group.seal()
            accepted.confirm()  # the seal as well: it comes after the documents, so it can't outlive them
        except RequestRefused as error:
            error.accepted = accepted.job_ids()
            raise
        except QueueUnavailable as error:
            raise _with_accepted(error, accepted, group) from error
        except Exception as error:
            number = len(accepted.job_ids())
            error.add_note(f"ingestq: {number} documents were accepted into group {group.id!r}, which is open")
            raise
        return replace(
            group,
            num_enqueued=accepted.outcomes[1],
            num_joined=accepted.outcomes[2],
            num_finished=accepted.outcomes[3],
            joined=tuple(accepted.joined),
        )

    def group(self, group_id: str) -> Group:
        """The handle of a group that is in Redis, of whichever queue it is.

        Raises:
            UnknownGroup: it is not.
        """
        check_name("group", group_id)
        queue = cast(
            bytes | None, persist(lambda: self.connection.hget(group_key(group_id), "queue"), patience=PATIENCE)
        )
        if queue is None:
            raise UnknownGroup(group_id)
        return Group(
            id=group_id, queue=queue.decode(errors="replace"), connection=self.connection, settings=self.settings
        )

    def _chunks(
        self, requests: Iterable[IngestRequest], on_refused: Callable[[RequestRefused], None] | None
    ) -> Iterator[tuple[list[NewJob], bool]]:
        """What goes into one script call each, and whether it is full: the source keeps up with Redis."""
        chunk: list[NewJob] = []
        num_bytes, started = 0, 0.0
        for request in requests:
            try:
                job = self._prepare(request)
            except RequestRefused as refusal:
                if on_refused is None:
                    raise
                on_refused(refusal)
                continue
            if chunk and num_bytes + len(job.data) > _CALL_BYTES:
                yield chunk, True
                chunk, num_bytes = [], 0
            if not chunk:
                started = monotonic()
            chunk.append(job)
            num_bytes += len(job.data)
            full = len(chunk) == scripts.CHUNK
            if full or monotonic() - started > _LINGER:
                yield chunk, full
                chunk, num_bytes = [], 0
        if chunk:
            yield chunk, False

    def _prepare(self, request: IngestRequest) -> NewJob:
        try:
            request_json = request.to_json()
        except UnicodeError as error:
            raise RequestRefused(
                request.document_id, f"a field is not Unicode text ({error}); decode it with errors='replace'"
            ) from None
        check_bytes(request, len(request_json), self.settings.max_text_bytes)
        cards = self._cards_of(request.model)
        check_sampling(request, cards)
        check_context(request, len(request_json), cards)
        return NewJob(
            job_id=job_id(request_json),
            data=payload.encode(request_json),
            document_id=request.document_id,
            model=request.model,
            tokens=estimated_tokens(request),
            max_tokens=request.sampling.max_tokens,
            task=task_id(request),
        )

    def _barrier(self) -> Barrier:
        barrier = Barrier(self.connection, self.settings.durability)
        barrier.start(PATIENCE)
        return barrier

    def _send(self, jobs: Sequence[NewJob], options: EnqueueOptions) -> list[int]:
        return persist(lambda: scripts.enqueue(self.connection, self.name, jobs, options), patience=PATIENCE)

    def _options(self, group_id: str, tenant: str | None, retry: RetryPolicy | None) -> EnqueueOptions:
        tenant = self.settings.tenant or "" if tenant is None else tenant
        if retry and not 1 <= retry.max <= MAX_RETRIES:
            raise SettingsError(f"retry: max is {retry.max}, the bounds are 1 and {MAX_RETRIES}")
        return EnqueueOptions(
            group_id=group_id,
            tenant=check_name("tenant", tenant) if tenant else "",
            group_ttl=self.settings.group_ttl,
            result_ttl=self.settings.result_ttl,
            failure_ttl=self.settings.failure_ttl,
            retries=retry.max if retry else None,
            retry_intervals_json=json.dumps(retry.intervals) if retry else "",
            retry_at_front=bool(getattr(retry, "enqueue_at_front", False)),
        )

    def _cards_of(self, model: str) -> Sequence[EngineCard]:
        """Live cards of the engines that serve a model."""
        if monotonic() - self._cards_read_at > _CARDS_MAX_AGE:
            self._read_cards()
        cards = self._cards.get(model, ())
        if self._cards and not cards and model not in self._warned_models:
            self._warned_models.add(model)
            logger.warning(
                "no live worker of queue %r serves model %r; they serve %s. Its documents wait for one that does",
                self.name,
                model,
                ", ".join(map(repr, sorted(self._cards))),
                extra={"action": "model_not_served"},
            )
        return cards

    def _read_cards(self) -> None:
        cards = persist(lambda: live_cards(self.connection, self.name), patience=PATIENCE)
        self._cards = {}
        for card in cards.values():
            self._cards.setdefault(card.model, []).append(card)
        self._cards_read_at = monotonic()


def _with_accepted(error: QueueUnavailable, accepted: _Accepted, group: Group) -> QueueUnavailable:
    """The same error, with what was accepted; leaves the group open."""
    if isinstance(error, NotDurable) and accepted.number:
        with suppress(QueueUnavailable):
            group.touch(seal=False)
    job_ids = accepted.job_ids(patience=PATIENCE if isinstance(error, QueueRefused) else None)
    return type(error)(
        f"{error}; {len(job_ids)} documents were accepted before that; the same call with group_id={group.id!r} "
        f"completes the rest and repeats none",
        job_ids,
    )


@dataclass(slots=True)
class _Accepted:
    """What a call has got into Redis so far."""

    on_progress: Callable[[int], None] | None
    # None: nothing has been sent.
    barrier: Barrier | None = None
    number: int = 0
    # By the script's word for it: 1 enqueued, 2 joined, 3 finished.
    outcomes: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0, 3: 0})
    joined: list[str] = field(default_factory=list)
    # Job ids, 16 bytes each: a list of strings would take 90 MB for a million.
    _digests: bytearray = field(default_factory=bytearray)
    # How many of them are as durable as INGEST_DURABILITY asks, and when that was made sure last.
    _num_confirmed: int = 0
    _confirmed_at: float = field(default_factory=monotonic)

    def add(self, jobs: Sequence[NewJob], outcomes: Sequence[int]) -> None:
        self.number += len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._digests += bytes.fromhex(job.job_id)
            self.outcomes[outcome] += 1
            if outcome != 1 and len(self.joined) < _MAX_JOINED:
                self.joined.append(job.document_id)
        if self.on_progress:
            self.on_progress(self.number)
        if monotonic() - self._confirmed_at > _CONFIRM_EVERY:
            self.confirm()

    def confirm(self, patience: float = PATIENCE) -> None:
        """Returns when what was added so far is as durable as asked for."""
        if self.barrier:
            self.barrier.confirm(patience)
        self._num_confirmed = self.number
        self._confirmed_at = monotonic()

    def job_ids(self, patience: float | None = PATIENCE) -> list[str]:
        """Those that are as durable as asked for.

        Args:
            patience: seconds to try to make the last ones so; None: Redis is away.
        """
        if patience is not None or self.barrier is None or self.barrier.durability == "memory":
            with suppress(QueueUnavailable):
                self.confirm(patience or 0.0)
        digests = self._digests[: 16 * self._num_confirmed]
        return [digests[i : i + 16].hex() for i in range(0, len(digests), 16)]


class _Ahead:
    """Sends chunks in their order: while Redis works on one, the caller gets the next ready.

    Leaving the context waits for the answer that is outstanding, unless on Ctrl-C.
    """

    def __init__(self, queue: IngestQueue, options: EnqueueOptions, accepted: _Accepted) -> None:
        self._queue = queue
        self._options = options
        self._accepted = accepted
        # Of its own, because it is in use while the source is read.
        self._connection = sibling(queue.connection)
        # The chunk that is under way, and what waits for its answer; None where it could not be sent.
        self._chunk: list[NewJob] | None = None
        self._answer: Callable[[], list[int]] | None = None

    def send(self, chunk: list[NewJob], *, wait: bool) -> None:
        """Sends a chunk once the one before it is accepted.

        Args:
            wait: return when this one is accepted as well; for a slow source, whose next chunk may be long in coming.
        """
        from redis.exceptions import RedisError

        self.settle()
        self._chunk, self._answer = chunk, None
        if wait:
            self.settle()
        else:
            with suppress(RedisError):
                self._answer = scripts.start_enqueue(self._connection, self._queue.name, chunk, self._options)

    def settle(self) -> None:
        """Returns once everything that was sent is accepted."""
        from redis.exceptions import RedisError

        chunk, self._chunk = self._chunk, None
        if chunk is None:
            return
        outcomes = None
        if self._answer:
            with suppress(RedisError):
                outcomes = self._answer()
        # Otherwise once more, with patience: that repeats nothing, and tells what is wrong.
        self._accepted.add(chunk, outcomes or self._queue._send(chunk, self._options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                self.settle()
        finally:
            self._connection.connection_pool.disconnect()


@contextmanager
def _kept_alive(group: Group) -> Iterator[None]:
    """Shows readers of an open group that its producer lives, however slow its source is."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT):
            with suppress(QueueUnavailable):  # the producer itself meets the same trouble, and tells of it
                group.touch()

    thread = threading.Thread(target=beat, name="ingestq-producer-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
