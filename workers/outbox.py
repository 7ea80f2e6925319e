"""`Outbox`: how leases end, results in batches and hand-backs, kept in memory until Redis has taken them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from redis import Redis
from redis.exceptions import ResponseError

from ..common import scripts
from ..common.connections import outage
from ..common.scripts import Finish, LeasedJob
from ..common.settings import Settings
from .logs import one_line

logger = logging.getLogger(__name__)


class Outbox:
    """Results on their way to Redis. Not thread-safe: it is the courier's."""

    def __init__(
        self, connection: Redis, settings: Settings, *, worker: str, model: str, on_written: Callable[[Finish], None]
    ) -> None:
        """
        Args:
            on_written: called for each result that Redis has taken, or that it never will.
        """
        self._connection = connection
        self._settings = settings
        self._worker = worker
        self._model = model
        self._on_written = on_written
        self._unwritten: list[Finish] = []

    def __len__(self) -> int:
        return len(self._unwritten)

    def add(self, item: Finish) -> None:
        self._unwritten.append(item)

    def write(self) -> None:
        """Writes everything there is.

        Raises:
            RedisError: Redis is away, or refuses; what it hasn't taken is kept. To write it again repeats nothing.
        """
        num_fenced = 0
        try:
            while self._unwritten:
                part = _head(self._unwritten)
                outcomes = self._finish_all(part)
                del self._unwritten[: len(part)]
                num_fenced += outcomes.count("fenced")
                for item in part:
                    self._on_written(item)
        finally:
            if num_fenced:
                logger.warning(
                    "%d results dropped: their leases were lost, so that others run these documents",
                    num_fenced,
                    extra={"action": "fenced"},
                )

    def _finish_all(self, part: Sequence[Finish]) -> list[scripts.Outcome]:
        try:
            return self._finish(part)
        except ResponseError as error:
            if outage(error):
                raise
        # One of them met a key that holds what it shouldn't.
        return [self._finish_alone(item) for item in part]

    def _finish(self, part: Sequence[Finish]) -> list[scripts.Outcome]:
        """All of them of one queue."""
        return scripts.finish(
            self._connection, part[0].job.queue, worker=self._worker, model=self._model, finishes=part
        )

    def _finish_alone(self, item: Finish) -> scripts.Outcome:
        """Writes one result. If it can't be, its lease goes back as if its worker was lost, so that it has an end."""
        try:
            return self._finish([item])[0]
        except ResponseError as error:
            if outage(error):
                raise
            reason = f"its result can't be written: {one_line(str(error))}"
        logger.error(
            "job %s: %s", item.job.job_id, reason, extra={"action": "result_refused", "job_id": item.job.job_id}
        )
        self.hand_back([item.job], crash=reason)
        return "failed"

    def hand_back(self, jobs: Iterable[LeasedJob], crash: str = "") -> None:
        """Returns leases to the front of their queues in the order in which they were leased.

        Args:
            crash: how a worker was lost with them; "": the hand-back is no attempt.
        """
        for queue, part in groupby(sorted(jobs, key=attrgetter("queue")), key=attrgetter("queue")):
            self.hand_back_members(queue, [job.member for job in part], crash)

    def hand_back_members(self, queue: str, members: Sequence[str], crash: str = "", incarnation: str = "") -> None:
        """Returns leases of one queue.

        Args:
            members: the leases as they stand in Redis.
            incarnation: this worker's: nothing is done if its name is another's by now.
        """
        # Last leased first: each call puts its jobs in front of those of the calls before it. An execution id begins
        # with the time of its lease.
        members = sorted(members, key=lambda member: member.partition(":")[2])
        for end in range(len(members), 0, -scripts.CHUNK):
            returned = scripts.hand_back(
                self._connection,
                queue,
                failure_ttl=self._settings.failure_ttl,
                members=members[max(0, end - scripts.CHUNK) : end],
                worker=self._worker if incarnation else "",
                incarnation=incarnation,
                max_crashes=self._settings.max_crashes if crash else 0,
                reason=crash,
            )
            logger.info(
                "handed back %d documents, failed %d",
                returned.queued,
                returned.dead_lettered,
                extra={"action": "hand_back"},
            )


def _head(finishes: list[Finish]) -> list[Finish]:
    """As many as one script call takes: of one queue."""
    size = 0
    for count, item in enumerate(finishes[: scripts.CHUNK]):
        size += len(item.result_json)
        if count and (size > scripts.MAX_CALL_BYTES or item.job.queue != finishes[0].job.queue):
            return finishes[:count]
    return finishes[: scripts.CHUNK]
