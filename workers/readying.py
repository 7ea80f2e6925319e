"""`Readying`: leased documents on their way to the pool: parsed, encoded, and what they need reserved."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import groupby
from operator import attrgetter

from redis import Redis

from ..common import scripts
from ..common.errors import DocumentError, PromptRefused
from ..common.limits import AdmissionLimits
from ..common.scripts import Admission, Finish, JobNeeds, LeasedJob, Need
from .holdings import Holdings
from .intake import Intake
from .pool import Ready, ReadyPool
from .prompts import ANY_MODEL, NewerSchema
from .rows import RowWriter

logger = logging.getLogger(__name__)


class Readying:
    """Keeps its place over an outage of Redis: what one call could not do, the next one does. The courier's alone."""

    def __init__(
        self,
        connection: Redis,
        intake: Intake,
        holdings: Holdings,
        pool: ReadyPool,
        rows: RowWriter,
        bounds: Admission,
        *,
        limits: Callable[[str], AdmissionLimits],
        settle: Callable[[Finish], None],
        lost: Callable[[str], None],
        give_back: Callable[[Collection[str]], None],
    ) -> None:
        """
        Args:
            bounds: on what this worker may have reserved.
            limits: of a queue, as they stand in Redis.
            settle: takes the row of a document that can't be run.
            lost: takes a lease, "id:execution", that turned out to be gone.
            give_back: takes the prompt ids of documents that are to go back into their queues, uncounted.
        """
        self._connection = connection
        self._intake = intake
        self._holdings = holdings
        self._pool = pool
        self._rows = rows
        self._bounds = bounds
        self._limits = limits
        self._settle = settle
        self._lost = lost
        self._give_back = give_back
        # Tokens of one step of the engine.
        self._step_tokens = rows.card.max_num_batched_tokens or 1
        # Not yet encoded; encoded, and what they need not yet reserved; for newer workers, prompt id -> schema, and not
        # yet given back.
        self._unready: deque[LeasedJob] = deque()
        self._unreserved: list[Ready] = []
        self._newer: dict[str, int] = {}

    def add(self, jobs: Iterable[LeasedJob]) -> None:
        """Takes what was leased."""
        self._unready.extend(jobs)

    def drain(self) -> list[str]:
        """Gives up everything that isn't in the pool yet; returns the prompt ids."""
        prompt_ids = [ready.prompt_id for ready in self._unreserved]
        prompt_ids += [job.execution_id for job in self._unready]
        prompt_ids += self._newer
        self._unreserved, self._newer = [], {}
        self._unready.clear()
        return prompt_ids

    def run(self) -> None:
        """Readies all that there is."""
        while self._unready or self._unreserved:
            # Not all at once: the engine may be waiting for the first of them while the last are encoded.
            while self._unready and sum(ready.num_prompt_tokens for ready in self._unreserved) < self._step_tokens:
                self._encode(self._unready.popleft())
            self._reserve()
        if self._newer:
            self._leave_to_newer()

    def _encode(self, job: LeasedJob) -> None:
        """Readies one document; a bad one fails here, alone."""
        held = self._holdings.open.get(job.execution_id)
        if held is None:
            return  # stopped or lost meanwhile
        try:
            held.request = self._intake.request(job)
            self._unreserved.append(self._intake.ready(job, held.request, self._limits(job.queue)))
        except NewerSchema as error:
            self._newer[job.execution_id] = error.schema
        except DocumentError as error:
            self._settle(self._rows.ended(job, held.request, error))
        except BaseException as error:
            # Whatever a tokenizer makes of a text (Rust's panics are no Exceptions), it is this document's end.
            refusal = PromptRefused(f"{type(error).__name__} while its prompt was built")
            self._settle(self._rows.ended(job, held.request, refusal))

    def _reserve(self) -> None:
        """Reserves what documents really need, now that their tokens are counted; what has no room goes back."""
        while self._unreserved:
            # Of one queue, as a call takes them; those that were stopped or lost meanwhile are held no more.
            first = self._holdings.open.get(self._unreserved[0].prompt_id)
            if first is None:
                self._unreserved.pop(0)
                continue
            self._reserve_of(first.job.queue)

    def _reserve_of(self, queue: str) -> None:
        asked = [
            (held, ready)
            for ready in self._unreserved
            if (held := self._holdings.open.get(ready.prompt_id)) and held.job.queue == queue
        ]
        words = scripts.reserve(
            self._connection,
            queue,
            worker=self._rows.worker,
            admission=self._bounds,
            needs=[
                Need(held.job.member, ready.num_prompt_tokens, ready.prompt.sampling.max_tokens, ready.kv_tokens)
                for held, ready in asked
            ],
        )
        answered = {ready.prompt_id for _, ready in asked}
        self._unreserved = [ready for ready in self._unreserved if ready.prompt_id not in answered]
        denied = []
        for (held, ready), word in zip(asked, words, strict=True):
            if word == "granted":
                held.kv_tokens = ready.kv_tokens
                self._pool.put(ready)
            elif word == "denied":
                denied.append(ready.prompt_id)
            else:
                self._lost(held.job.member)
        if denied:
            self._give_back(denied)
            logger.info(
                "%d documents are longer than was thought, and there is no room for them yet; they went back",
                len(denied),
                extra={"action": "reservation_denied"},
            )

    def _leave_to_newer(self) -> None:
        """Hands back jobs of schemas yet to come, marked, so that no worker of ours takes them again."""
        newer = self._newer
        leases = [held for prompt_id in newer if (held := self._holdings.open.get(prompt_id))]
        for queue, part in groupby(leases, key=attrgetter("job.queue")):
            needs = [JobNeeds(held.job.job_id, ANY_MODEL, newer[held.job.execution_id]) for held in part]
            scripts.adopt(self._connection, queue, needs)
        self._newer = {}
        self._give_back(newer)
        logger.warning(
            "%d documents wait for a newer worker: they are of schema version %d",
            len(leases),
            max(newer.values()),
            extra={"action": "newer_schema"},
        )
