"""Which queues one look comes to: what a closed gate keeps waiting, and whom it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from ingestq.common import scripts
from ingestq.common.limits import AdmissionLimits
from ingestq.common.scripts import Admission, LeasedJob, LeaseReply
from ingestq.workers.leaser import Leaser, Look
from ingestq.workers.queue_shares import QueueShares

HIGH, MID, LOW = "high", "mid", "low"
QUEUES = [HIGH, MID, LOW]

JOB = LeasedJob(
    job_id="j",
    execution_id="e",
    data=b"",
    kv_tokens=100,
    enqueued_ms=None,
    leased_ms=0,
    attempts=1,
    crashes=0,
    result_ttl=None,
    failure_ttl=None,
    refused="",
)


def reply(gate: Any = "open", *, jobs: int = 0, length: int = 0, **fields: Any) -> LeaseReply:
    limits = AdmissionLimits(**fields.pop("limits", {}))
    values = {"unknown": [], "next_position": length, **fields}
    return LeaseReply(jobs=[JOB] * jobs, gate=gate, queue_length=length, limits=limits, **values)


class Redis:
    """Answers lease calls as told: queue -> reply; of others, that nothing is there."""

    def __init__(self) -> None:
        self.replies: dict[str, LeaseReply] = {}
        self.asked: list[str] = []
        self.positions: list[int] = []

    def lease(self, connection: object, queue: str, *, position: int, **_: object) -> LeaseReply:
        self.asked.append(queue)
        self.positions.append(position)
        return self.replies.get(queue, reply())


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Redis:
    redis = Redis()
    monkeypatch.setattr(scripts, "lease", redis.lease)
    return redis


def leaser_of(shares: QueueShares | None = None) -> Leaser:
    shares = shares or QueueShares(QUEUES, 0.0)
    return Leaser(None, QUEUES, shares, worker="w", model="m", lease_ttl=60.0)


def look(leaser: Leaser) -> Look:
    return leaser.look(Admission(documents=9), {queue: {} for queue in QUEUES}, company=0, companies=())


class LowerFirst(QueueShares):
    """The lower queues have a claim to be next."""

    def order(self, backlogged: object) -> list[str]:
        return [MID, LOW, HIGH]


def test_the_first_that_gives_something_ends_the_look(redis: Redis) -> None:
    redis.replies = {MID: reply(jobs=2, length=7), LOW: reply(jobs=2)}
    found = look(leaser_of())
    assert redis.asked == [HIGH, MID]
    assert (len(found.jobs), found.gate, found.searched) == (2, "open", False)


def test_empty_queues_are_all_looked_through(redis: Redis) -> None:
    found = look(leaser_of())
    assert redis.asked == QUEUES
    assert (found.jobs, found.gate, found.searched) == ((), "open", True)


@pytest.mark.parametrize("gate", ["fleet", "kv_fleet"])
def test_what_the_fleet_has_no_room_for_leaves_the_lower_queues_alone(redis: Redis, gate: str) -> None:
    redis.replies = {HIGH: reply(gate, length=3)}
    leaser = leaser_of()
    found = look(leaser)
    assert redis.asked == QUEUES
    assert (found.gate, leaser.gates) == (gate, {HIGH: gate, MID: "open", LOW: "open"})


@pytest.mark.parametrize("gate", ["suspended", "worker", "kv", "company", "prefill", "head"])
def test_what_this_worker_has_no_room_for_keeps_the_lower_queues_waiting(redis: Redis, gate: str) -> None:
    redis.replies = {HIGH: reply(gate, length=3), MID: reply(jobs=1)}
    found = look(leaser_of())
    assert redis.asked == [HIGH]
    assert (found.jobs, found.gate, found.searched) == ([], gate, False)


@pytest.mark.parametrize(("gate", "limit"), [("worker", "max_in_flight"), ("kv", "max_kv_tokens")])
def test_a_paused_queue_keeps_nobody_waiting(redis: Redis, gate: str, limit: str) -> None:
    redis.replies = {HIGH: reply(gate, length=3, limits={limit: 0}), MID: reply(jobs=1)}
    assert look(leaser_of()).jobs
    assert redis.asked == [HIGH, MID]


@pytest.mark.parametrize("gate", ["worker", "kv"])
def test_a_lower_queue_whose_turn_it_is_keeps_no_higher_one_waiting(redis: Redis, gate: str) -> None:
    """It may hold a worker to fewer documents than the higher one does, and would else drain it each time."""
    redis.replies = {MID: reply(gate, length=3), LOW: reply(gate, length=3), HIGH: reply(jobs=1)}
    assert look(leaser_of(LowerFirst(QUEUES, 0.5))).jobs
    assert redis.asked == [MID, LOW, HIGH]


@pytest.mark.parametrize("gate", ["head", "company"])
def test_a_document_that_needs_the_worker_to_drain_has_that_from_whatever_queue(redis: Redis, gate: str) -> None:
    redis.replies = {MID: reply(gate, length=3), HIGH: reply(jobs=1)}
    assert not look(leaser_of(LowerFirst(QUEUES, 0.5))).jobs
    assert redis.asked == [MID]


def test_a_gate_is_forgotten_where_the_look_does_not_come_to_its_queue(redis: Redis) -> None:
    leaser = leaser_of()
    redis.replies = {LOW: reply("fleet", length=3)}
    look(leaser)
    assert leaser.gates[LOW] == "fleet"
    redis.replies[HIGH] = reply(jobs=1)
    look(leaser)
    assert leaser.gates[LOW] == "open"


def test_a_look_goes_on_where_the_last_one_ended(redis: Redis) -> None:
    """Documents of other models are in the way."""
    leaser = leaser_of()
    redis.replies = {HIGH: reply(length=300, next_position=128)}
    assert not look(leaser).searched
    assert leaser.is_searching
    redis.replies = {HIGH: reply(length=300, next_position=300)}
    assert look(leaser).searched
    assert redis.positions[0::3] == [0, 128]
    assert not leaser.is_searching
