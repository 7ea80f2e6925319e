"""`Leaser`: asks a worker's queues for jobs, in the order in which they are to be served."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from redis import Redis

from ..common import payload, scripts
from ..common.limits import AdmissionLimits, read_limits
from ..common.schema import IngestRequest
from ..common.scripts import Admission, JobNeeds, LeasedJob
from ..common.task_id import estimated_tokens, task_id
from .prompts import needs_of
from .queue_shares import QueueShares

# Gates that close one queue only: what is behind them leaves the others alone.
_OF_ONE_QUEUE = frozenset({"open", "fleet", "kv_fleet"})

# Gates of what this worker holds, from all its queues. What a lower queue took past them would keep a higher one
# waiting for longer; what a higher one takes past a lower one is its right.
_OF_WHAT_IS_HELD = frozenset({"worker", "kv"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at the queues brought."""

    jobs: Sequence[LeasedJob] = ()
    # Jobs of plain RQ clients about which it is now known which worker they need: the next look takes ours among them.
    num_adopted: int = 0
    # What kept jobs waiting; "open": nothing did.
    gate: scripts.Gate = "open"
    # Whether every queue was looked through to its end.
    searched: bool = True


@dataclass(slots=True)
class _Seen:
    """What the last look at a queue met."""

    length: int = 0
    # Where to look next; not 0 when jobs of other models are in the way.
    position: int = 0
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)


class Leaser:
    """Leases for one worker. Not thread-safe: it is the courier's."""

    def __init__(
        self,
        connection: Redis,
        queues: Sequence[str],
        shares: QueueShares,
        *,
        worker: str,
        model: str,
        lease_ttl: float,
    ) -> None:
        self._connection = connection
        self._shares = shares
        self._worker = worker
        self._model = model
        self._lease_ttl = lease_ttl
        self._seen = {queue: _Seen() for queue in queues}
        # Queue -> what kept jobs in it at the last look. "open" where it didn't come to that queue: others went before.
        self.gates: dict[str, scripts.Gate] = dict.fromkeys(queues, "open")

    @property
    def limits(self) -> dict[str, AdmissionLimits]:
        """Queue -> its limits as they stood in Redis at the last look."""
        return {queue: seen.limits for queue, seen in self._seen.items()}

    @property
    def is_searching(self) -> bool:
        """Whether jobs of other models are in the way, so that there is further to look."""
        return any(seen.position for seen in self._seen.values())

    def look(
        self,
        admission: Admission,
        expected_output: Mapping[str, Mapping[str, int]],
        *,
        company: int,
        companies: Sequence[int],
    ) -> Look:
        """Leases from the first queue that gives something.

        Args:
            admission: what may be leased; its `expected_output` is set here.
            expected_output: queue -> task -> output tokens to reserve.
            company, companies: as for `scripts.lease`.
        """
        gates: dict[str, scripts.Gate] = dict.fromkeys(self._seen, "open")
        order = self._shares.order({queue for queue, seen in self._seen.items() if seen.length})
        for i, queue in enumerate(order):
            reply = scripts.lease(
                self._connection,
                queue,
                worker=self._worker,
                model=self._model,
                admission=replace(admission, expected_output=expected_output[queue]),
                lease_ttl=self._lease_ttl,
                call_id=os.urandom(7).hex(),
                company=company,
                companies=companies,
                position=self._seen[queue].position,
            )
            num_adopted = self._adopt(queue, reply.unknown)
            self._note(queue, reply, bool(num_adopted))
            gates[queue] = reply.gate
            if reply.jobs or num_adopted or not self._may_pass(reply, queue, order[i + 1 :]):
                self.gates = gates
                return Look(jobs=reply.jobs, num_adopted=num_adopted, gate=reply.gate, searched=False)
        self.gates = gates
        closed = [gate for gate in gates.values() if gate != "open"]
        return Look(gate=closed[-1] if closed else "open", searched=not self.is_searching)

    def _may_pass(self, reply: scripts.LeaseReply, queue: str, others: Sequence[str]) -> bool:
        """Whether a queue that gave nothing leaves the others alone, those that are to be asked after it."""
        if reply.gate in _OF_ONE_QUEUE:
            return True
        if reply.gate not in _OF_WHAT_IS_HELD:
            return False
        is_paused = 0 in (reply.limits.max_in_flight, reply.limits.max_kv_tokens)
        by_priority = list(self._seen)
        return is_paused or any(by_priority.index(other) < by_priority.index(queue) for other in others)

    def read_limits(self) -> None:
        """Reads the live limits of every queue: a look reads those of the queues that it comes to."""
        for queue, seen in self._seen.items():
            seen.limits = read_limits(self._connection, queue)

    def _note(self, queue: str, reply: scripts.LeaseReply, adopted: bool) -> None:
        seen = self._seen[queue]
        searched = reply.next_position >= reply.queue_length
        seen.position = 0 if reply.jobs or adopted or searched else reply.next_position
        seen.length, seen.limits = reply.queue_length, reply.limits
        self._shares.leased(queue, sum(job.kv_tokens for job in reply.jobs), had_room=reply.gate == "open")

    def _adopt(self, queue: str, unknown: Sequence[tuple[str, bytes]]) -> int:
        """Finds out what the jobs of plain RQ clients need."""
        if not unknown:
            return 0
        return scripts.adopt(self._connection, queue, [_needs(job_id, data) for job_id, data in unknown])


def _needs(job_id: str, data: bytes) -> JobNeeds:
    model, schema = needs_of(data)
    request = payload.request(data)
    if request is None:
        return JobNeeds(job_id, model, schema)
    return JobNeeds(job_id, model, schema, *_estimate(request))


def _estimate(request: IngestRequest) -> tuple[int, int, str]:
    """Prompt tokens, output tokens at most, task."""
    return estimated_tokens(request), request.sampling.max_tokens, task_id(request)
