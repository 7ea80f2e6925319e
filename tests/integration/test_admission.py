"""What lease.lua admits: documents and KV tokens, of one worker and of the fleet, checked in the step that leases."""

from __future__ import annotations

import multiprocessing
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
from redis import Redis
from rq.executions import Execution

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.errors import SettingsError
from ingestq.common.limits import AdmissionLimits, read_limits, update_limits, write_limits
from ingestq.common.scripts import Admission, EnqueueOptions, Finish, JobNeeds, LeasedJob, LeaseReply, Need, NewJob
from support.jobs import QUEUE, rq_job

OPTIONS = EnqueueOptions(group_ttl=3600, result_ttl=3600, failure_ttl=3600)
MINUTE_MS = 60_000


@pytest.fixture(scope="module")
def own(server_binary: str | None) -> Iterator[EmbeddedServer]:
    """A server that writes nothing to its disk."""
    with EmbeddedServer(server_binary, appendonly="no") as server:
        yield server


@pytest.fixture
def redis(own: EmbeddedServer) -> Iterator[Redis]:
    with Redis.from_url(own.url) as client:
        client.flushall()
        yield client


def job(name: str, tokens: int = 100, max_tokens: int = 20, *, size: int = 10, **fields: Any) -> NewJob:
    return NewJob(name, b"x" * size, name, "m", tokens, max_tokens, **fields)


def put(redis: Redis, *jobs: NewJob, queue: str = QUEUE) -> None:
    for start in range(0, len(jobs), scripts.CHUNK):
        scripts.enqueue(redis, queue, jobs[start : start + scripts.CHUNK], OPTIONS)


def lease(
    redis: Redis, worker: str = "w", documents: int = 128, *, model: str = "m", queue: str = QUEUE, **bounds: Any
) -> LeaseReply:
    admission = Admission(documents=documents, **bounds)
    call_id = secrets.token_hex(7)
    return scripts.lease(redis, queue, worker=worker, model=model, admission=admission, lease_ttl=60, call_id=call_id)


def names(reply: LeaseReply) -> list[str]:
    return [leased.job_id for leased in reply.jobs]


def finish(redis: Redis, *jobs: LeasedJob, worker: str = "w") -> None:
    ends = [Finish(job=leased, kind="S", ttl=600, result_json=b"{}") for leased in jobs]
    assert set(scripts.finish(redis, QUEUE, worker=worker, model="m", finishes=ends)) <= {"finished"}


def hand_back(redis: Redis, *jobs: LeasedJob) -> None:
    scripts.hand_back(redis, QUEUE, members=[leased.member for leased in jobs], failure_ttl=60)


def reserve(redis: Redis, *needs: Need, worker: str = "w", **bounds: Any) -> list[str]:
    return list(scripts.reserve(redis, QUEUE, worker=worker, admission=Admission(documents=0, **bounds), needs=needs))


def reserved(redis: Redis) -> dict[str, int]:
    return {field.decode(): int(total) for field, total in redis.hgetall(keys.kv_tokens()).items()}


def later(redis: Redis, name: str, milliseconds: int = MINUTE_MS + 1) -> None:
    """As if so much more time had gone since the document didn't fit."""
    redis.hset(keys.job(name), "blocked_ms", int(redis.hget(keys.job(name), "blocked_ms")) - milliseconds)


# --- reservations


@pytest.mark.parametrize(
    ("new", "bounds", "kv_tokens"),
    [
        (job("a", 100, 20), {}, 120),
        (job("a", 100, 20), {"block_size": 16}, 128),
        (job("a", 112, 16), {"block_size": 16}, 128),
        (job("a", 100, 20, task="ab"), {"expected_output": {"ab": 5}}, 105),
        (job("a", 100, 20, task="ab"), {"expected_output": {"ab": 500}}, 120),
        (job("a", 100, 20, task="ab"), {"expected_output": {"other": 5}}, 120),
        (job("a", 0, 20, size=401), {}, 101 + 20),
        (job("a", 100, 0), {}, 100 + 256),
    ],
    ids=[
        "prompt and output",
        "blocks",
        "whole blocks",
        "task",
        "longer than it may",
        "another task",
        "bytes",
        "output",
    ],
)
def test_a_lease_reserves_what_the_document_is_expected_to_need(
    redis: Redis, new: NewJob, bounds: dict[str, Any], kv_tokens: int
) -> None:
    put(redis, new)
    (leased,) = lease(redis, **bounds).jobs
    assert leased.kv_tokens == kv_tokens
    assert (leased.queue, leased.task, leased.max_tokens) == (QUEUE, new.task, new.max_tokens)
    assert reserved(redis) == {"queue:ingest": kv_tokens, "worker:w": kv_tokens}
    finish(redis, leased)
    assert not redis.exists(keys.kv_tokens())


def test_what_a_plain_client_enqueued_is_reserved_as_its_payload_says(redis: Redis) -> None:
    put(redis, job("a")._replace(tokens=0, max_tokens=0))
    redis.hdel(keys.job("a"), "model")
    assert [name for name, _ in lease(redis).unknown] == ["a"]
    scripts.adopt(redis, QUEUE, [JobNeeds("a", "m", 1, 70, 30, "ab")])
    (leased,) = lease(redis, expected_output={"ab": 10}).jobs
    assert (leased.tokens, leased.max_tokens, leased.task, leased.kv_tokens) == (70, 30, "ab", 80)


@pytest.mark.parametrize("where", ["settings", "limits"])
@pytest.mark.parametrize(
    ("limit", "gate"), [("max_kv_tokens", "kv"), ("max_kv_tokens_fleet", "kv_fleet"), ("max_in_flight_fleet", "fleet")]
)
def test_a_limit_is_kept_to_the_token(redis: Redis, where: str, limit: str, gate: str) -> None:
    put(redis, *(job(f"d{i}") for i in range(5)))
    value = 2 if limit == "max_in_flight_fleet" else 240
    bounds = {limit: value} if where == "settings" else {}
    if where == "limits":
        update_limits(redis, QUEUE, {limit: value})

    reply = lease(redis, **bounds)

    assert (names(reply), reply.gate, reply.queue_length) == (["d0", "d1"], gate, 3)
    assert lease(redis, **bounds).jobs == []
    others = lease(redis, "other", **bounds)
    assert (len(others.jobs), others.gate) == ((2, "kv") if gate == "kv" else (0, gate))
    finish(redis, reply.jobs[0])
    assert len(lease(redis, **bounds).jobs) == 1, "as soon as there is room"


def test_the_tighter_of_setting_and_limit_holds(redis: Redis) -> None:
    put(redis, *(job(f"d{i}") for i in range(5)))
    write_limits(redis, QUEUE, AdmissionLimits(max_kv_tokens=500))
    assert len(lease(redis, max_kv_tokens=240).jobs) == 2
    write_limits(redis, QUEUE, AdmissionLimits(max_kv_tokens=360))
    assert len(lease(redis, max_kv_tokens=500).jobs) == 1


def test_a_reply_has_the_limits_that_it_was_judged_by(redis: Redis) -> None:
    limits = AdmissionLimits(
        max_in_flight=5, max_in_flight_fleet=6, max_kv_tokens=7, max_kv_tokens_fleet=8, ttft_sla_ms=1500.5
    )
    write_limits(redis, QUEUE, limits)
    assert lease(redis).limits == limits
    redis.hset(keys.limits(QUEUE), mapping={"max_in_flight": "many", "ttft_sla_ms": "nan"})
    redis.hdel(keys.limits(QUEUE), "max_kv_tokens")
    assert lease(redis).limits == AdmissionLimits(max_in_flight_fleet=6, max_kv_tokens_fleet=8)


def test_limits_that_are_no_hash_bound_nothing(redis: Redis) -> None:
    redis.set(keys.limits(QUEUE), "7")
    put(redis, job("a"))
    reply = lease(redis)
    assert names(reply) == ["a"]
    assert reply.limits == read_limits(redis, QUEUE) == AdmissionLimits()


def test_limits_are_changed_one_by_one(redis: Redis) -> None:
    write_limits(redis, QUEUE, AdmissionLimits(max_in_flight=5, max_kv_tokens=7))
    update_limits(redis, QUEUE, {"max_kv_tokens": None, "ttft_sla_ms": 1500, "max_in_flight_fleet": 9})
    assert read_limits(redis, QUEUE) == AdmissionLimits(max_in_flight=5, max_in_flight_fleet=9, ttft_sla_ms=1500)
    for changes in ({"max_flight": 1}, {"max_in_flight": -1}, {"max_in_flight": 1.5}, {"ttft_sla_ms": float("inf")}):
        with pytest.raises(SettingsError):
            update_limits(redis, QUEUE, changes)
    assert read_limits(redis, QUEUE).max_in_flight == 5


def test_a_limit_of_nothing_closes_the_queue_and_fails_nobody(redis: Redis) -> None:
    put(redis, job("a"))
    reserve_exactly(redis, "a", 100)
    for limit, gate in {"max_kv_tokens": "kv", "max_kv_tokens_fleet": "kv_fleet", "max_in_flight": "worker"}.items():
        write_limits(redis, QUEUE, AdmissionLimits(**{limit: 0}))
        reply = lease(redis)
        assert (reply.jobs, reply.gate) == ([], gate)


def reserve_exactly(redis: Redis, name: str, tokens: int) -> None:
    """As after a worker counted the tokens of its prompt and had no room."""
    leased = next(each for each in lease(redis).jobs if each.job_id == name)
    reserve(redis, Need(leased.member, tokens, 20, tokens + 20))
    hand_back(redis, leased)
    assert redis.hmget(keys.job(name), "tokens", "tokens_exact") == [str(tokens).encode(), b"1"]


def test_an_estimate_beyond_the_whole_limit_is_for_the_worker_to_check(redis: Redis) -> None:
    put(redis, job("a"), job("huge", 5000), job("b"))
    reply = lease(redis, max_kv_tokens=400, block_size=16)
    assert [(leased.job_id, leased.kv_tokens) for leased in reply.jobs] == [("a", 128), ("huge", 272)]
    assert reserved(redis)["worker:w"] == 400


def test_an_exact_need_beyond_the_whole_limit_is_leased_to_be_failed(redis: Redis) -> None:
    put(redis, job("huge", 50))
    reserve_exactly(redis, "huge", 5000)
    put(redis, job("a"))
    for bounds in ({"max_kv_tokens": 130}, {"max_kv_tokens_fleet": 130}):
        reply = lease(redis, **bounds)
        assert [(leased.job_id, leased.kv_tokens, leased.tokens) for leased in reply.jobs] == [
            ("huge", 0, 5000),
            ("a", 120, 100),
        ]
        hand_back(redis, *reply.jobs)


def test_a_limit_of_less_than_a_block_is_for_the_worker_to_report(redis: Redis) -> None:
    put(redis, job("a"))
    for bounds in ({"max_kv_tokens": 10}, {"max_kv_tokens_fleet": 10}):
        reply = lease(redis, block_size=16, **bounds)
        assert [(leased.job_id, leased.kv_tokens) for leased in reply.jobs] == [("a", 0)]
        hand_back(redis, *reply.jobs)


def test_what_no_engine_will_see_needs_no_room(redis: Redis) -> None:
    put(redis, job("a"), job("malformed"), job("refused"), job("b"))
    redis.hset(keys.job("malformed"), "model", "*")
    redis.hset(keys.job("refused"), "repeats_left", "3")
    reply = lease(redis, max_kv_tokens=240)
    assert [(leased.job_id, leased.kv_tokens) for leased in reply.jobs] == [
        ("a", 120),
        ("malformed", 0),
        ("refused", 0),
        ("b", 120),
    ]


@pytest.mark.parametrize(
    ("room", "leased", "gate"),
    [
        (None, 4, "open"),
        (0, 1, "prefill"),
        (99, 1, "prefill"),
        (100, 1, "prefill"),
        (300, 3, "prefill"),
        (400, 4, "open"),
    ],
)
def test_prompt_tokens_are_bounded_but_for_the_first_document(
    redis: Redis, room: int | None, leased: int, gate: str
) -> None:
    put(redis, *(job(f"d{i}") for i in range(4)))
    reply = lease(redis, prompt_tokens=room)
    assert (len(reply.jobs), reply.gate) == (leased, gate)


# --- exact needs


def test_a_worker_reserves_what_it_counted(redis: Redis) -> None:
    put(redis, *(job(name) for name in "abcd"))
    a, b, c, d = lease(redis).jobs
    scripts.hand_back(redis, QUEUE, members=[d.member], failure_ttl=60)
    needs = [
        Need(a.member, 40, 20, 60),
        Need(b.member, 150, 20, 170),
        Need(c.member, 130, 15, 145),
        Need(d.member, 1, 20, 21),
    ]

    assert reserve(redis, *needs, max_kv_tokens=360) == ["granted", "granted", "denied", "lost"]

    assert reserved(redis) == {"queue:ingest": 350, "worker:w": 350}
    assert redis.hmget(keys.job("c"), "tokens", "tokens_exact", "max_tokens") == [b"130", b"1", b"15"]
    assert redis.hmget(keys.job("d"), "tokens", "tokens_exact") == [b"100", None]
    hand_back(redis, c)
    assert reserved(redis)["worker:w"] == 230
    assert lease(redis, max_kv_tokens=360, documents=1).jobs[0].job_id == "d", "there is no room for what c needs"
    finish(redis, a)
    assert names(lease(redis, max_kv_tokens=460, documents=1)) == ["c"]


@pytest.mark.parametrize("limit", ["max_kv_tokens", "max_kv_tokens_fleet"])
def test_a_limit_in_redis_holds_for_what_was_counted(redis: Redis, limit: str) -> None:
    put(redis, job("a"))
    (a,) = lease(redis).jobs
    update_limits(redis, QUEUE, {limit: 130})
    assert reserve(redis, Need(a.member, 111, 20, 131)) == ["denied"]
    assert reserve(redis, Need(a.member, 110, 20, 130)) == ["granted"]
    update_limits(redis, QUEUE, {limit: 10})
    assert reserve(redis, Need(a.member, 100, 20, 120)) == ["granted"], "less is always granted"
    assert reserve(redis, Need(a.member, 100, 20, 120), worker="other") == ["lost"]


# --- the head of the line


def blocked(redis: Redis, others: int = 300) -> None:
    """The document at the head needs 900 of 1,000 KV tokens, of which 200 are taken; the others need 10 each."""
    put(redis, job("first", 180, 20))
    assert names(lease(redis, documents=1)) == ["first"]
    put(redis, job("big", 880, 20), *(job(f"d{i}", 8, 2) for i in range(others)))


OWN = {"max_kv_tokens": 1000}
FLEET = {"max_kv_tokens_fleet": 1000}


def shut(bounds: dict[str, int]) -> str:
    """The gate of a queue whose head nobody may pass: the fleet's limit leaves a worker's other queues alone."""
    return "head" if bounds is OWN else "kv_fleet"


@pytest.mark.parametrize("bounds", [OWN, FLEET])
def test_at_most_128_pass_one_that_does_not_fit(redis: Redis, bounds: dict[str, int]) -> None:
    blocked(redis)
    passed = []
    for _ in range(20):
        reply = lease(redis, documents=10, **bounds)
        passed += names(reply)
        finish(redis, *reply.jobs)
    assert passed == [f"d{i}" for i in range(128)], "in their order"
    assert (reply.jobs, reply.gate, reply.next_position) == ([], shut(bounds), 0)


@pytest.mark.parametrize("bounds", [OWN, FLEET])
def test_one_call_lets_no_more_pass_than_are_left(redis: Redis, bounds: dict[str, int]) -> None:
    blocked(redis)
    reply = lease(redis, documents=100, **bounds)
    assert len(reply.jobs) == 80, "what fits"
    finish(redis, *reply.jobs)
    reply = lease(redis, documents=100, **bounds)
    assert (len(reply.jobs), reply.gate) == (48, shut(bounds))


@pytest.mark.parametrize("bounds", [OWN, FLEET])
def test_they_pass_for_a_minute(redis: Redis, bounds: dict[str, int]) -> None:
    blocked(redis)
    assert names(lease(redis, documents=1, **bounds)) == ["d0"]
    later(redis, "big", MINUTE_MS - 10_000)
    assert names(lease(redis, documents=1, **bounds)) == ["d1"]
    later(redis, "big", 10_001)
    reply = lease(redis, documents=1, **bounds)
    assert (reply.jobs, reply.gate) == ([], shut(bounds))


def test_one_that_the_fleet_has_no_room_for_stops_every_worker(redis: Redis) -> None:
    blocked(redis)
    lease(redis, documents=1, **FLEET)
    later(redis, "big")
    for worker in ("w", "x", "y"):
        assert lease(redis, worker, **FLEET).gate == "kv_fleet"
    assert redis.hget(keys.job("big"), "held_for") is None
    (first,) = [raw.decode() for raw in redis.zrange(keys.started(QUEUE), 0, -1) if raw.startswith(b"first")]
    scripts.hand_back(redis, QUEUE, members=[first], failure_ttl=60)
    redis.lrem(keys.queue(QUEUE), 1, "first")
    reply = lease(redis, "y", documents=2, **FLEET)
    assert names(reply) == ["big", "d1"], "as soon as it fits"
    assert redis.hmget(keys.job("big"), "blocked_ms", "passed", "held_for") == [None] * 3


def test_one_that_an_engine_has_no_room_for_is_held_by_one_worker(redis: Redis) -> None:
    blocked(redis)
    put(redis, job("x1", 180, 20), queue="other")
    lease(redis, "x", documents=1, queue="other")
    lease(redis, documents=1, **OWN)
    later(redis, "big")

    assert lease(redis, "w", **OWN).gate == "head"
    assert redis.hget(keys.job("big"), "held_for") == b"w"
    assert names(lease(redis, "x", documents=2, **OWN)) == ["d1", "d2"], "the others go on"
    assert lease(redis, "w", **OWN).jobs == [], "it waits for its room"

    redis.hset(keys.job("big"), "held_until", 1)  # w is heard of no more
    assert lease(redis, "x", **OWN).gate == "head"
    assert redis.hget(keys.job("big"), "held_for") == b"x"
    assert names(lease(redis, "w", documents=1, **OWN)) == ["d3"]
    assert names(lease(redis, "fresh", documents=1, **OWN)) == ["big"], "one that has the room takes it at once"
    assert redis.hmget(keys.job("big"), "blocked_ms", "held_for", "held_until") == [None] * 3


def test_a_worker_without_any_room_does_not_look_through_the_queue(redis: Redis) -> None:
    put(redis, job("first", 980, 20))
    lease(redis, **OWN)
    put(redis, *(job(f"d{i}", 8, 2) for i in range(200)))
    redis.config_resetstat()
    reply = lease(redis, **OWN)
    assert (reply.jobs, reply.gate) == ([], "kv")
    assert redis.info("commandstats")["cmdstat_hmget"]["calls"] < 6


def test_a_wake_token_is_left_where_others_can_go_on(redis: Redis) -> None:
    put(redis, *(job(f"d{i}", 80, 20) for i in range(20)))
    token = keys.wake(QUEUE, "m")
    for bounds, is_left in (({"max_kv_tokens": 200}, True), ({"max_kv_tokens_fleet": 400}, False)):
        redis.delete(token)
        assert len(lease(redis, str(bounds), **bounds).jobs) == 2
        assert redis.exists(token) == is_left
    jobs = lease(redis, documents=1).jobs
    redis.delete(token)
    finish(redis, *jobs)
    assert redis.exists(token), "room for whoever waits"


# --- counted anew


def test_a_recount_heals_what_stock_tools_left(redis: Redis) -> None:
    put(redis, *(job(name) for name in "abcd"))
    put(redis, job("e"), queue="other")
    a, b, c, _ = lease(redis, "w").jobs
    lease(redis, "w", queue="other")
    rq_job(redis, "a").cancel()
    rq_job(redis, "b").delete()
    with redis.pipeline() as pipeline:
        Execution(c.execution_id, "c", redis, "w").delete(rq_job(redis, "c"), pipeline)
        pipeline.execute()
    assert reserved(redis) == {"queue:ingest": 480, "queue:other": 120, "worker:w": 600}

    found = scripts.recount(redis, QUEUE)

    assert (found.kv_tokens_counted, found.kv_tokens_held, found.num_leases) == (120, 480, 1)
    assert reserved(redis) == {"queue:ingest": 120, "queue:other": 120, "worker:w": 240}
    for leased in (a, b, c):
        hand_back(redis, leased)
    assert reserved(redis)["queue:ingest"] == 120


@pytest.mark.parametrize("junk", ["a field", "the key"])
def test_a_recount_makes_nothing_of_junk(redis: Redis, junk: str) -> None:
    put(redis, job("a"), job("b"))
    lease(redis, documents=1)
    if junk == "the key":
        redis.set(keys.kv_tokens(), "junk")
    else:
        redis.hset(keys.kv_tokens(), mapping={"queue:ingest": "junk", "worker:gone": 500, "worker:w": 1})
    assert scripts.recount(redis, QUEUE).kv_tokens_counted == 120
    assert reserved(redis) == {"queue:ingest": 120, "worker:w": 120}
    redis.hset(keys.kv_tokens(), "queue:ingest", "junk")
    lease(redis)
    scripts.recount(redis, QUEUE)
    assert reserved(redis) == {"queue:ingest": 240, "worker:w": 240}


def test_a_total_never_falls_below_zero(redis: Redis) -> None:
    put(redis, job("a"))
    jobs = lease(redis).jobs
    redis.hset(keys.kv_tokens(), "worker:w", 5)
    finish(redis, *jobs)
    assert reserved(redis) == {}


# --- several queues


def test_leases_of_several_queues_are_one_workers(redis: Redis) -> None:
    for queue in ("high", QUEUE):
        put(redis, *(job(f"{queue}{i}") for i in range(3)), queue=queue)
        assert len(lease(redis, documents=2, queue=queue).jobs) == 2
    assert reserved(redis) == {"queue:high": 240, "queue:ingest": 240, "worker:w": 480}
    expiries = {queue: redis.zrange(keys.started(queue), 0, -1, withscores=True) for queue in ("high", QUEUE)}

    scripts.renew(redis, ["high", QUEUE], worker="w", incarnation="i", lease_ttl=90, worker_ttl=600)

    for queue, before in expiries.items():
        after = redis.zrange(keys.started(queue), 0, -1, withscores=True)
        assert [(member, score > 20 + old) for (member, score), (_, old) in zip(after, before, strict=True)] == [
            (member, True) for member, _ in before
        ]
    assert redis.scard(keys.worker_executions("w")) == 4

    options = {"worker": "w", "incarnation": "", "failure_ttl": 60}
    assert scripts.hand_back_all(redis, "high", **options).queued == 2
    assert redis.scard(keys.worker_executions("w")) == 2
    assert reserved(redis) == {"queue:ingest": 240, "worker:w": 240}
    rq_job(redis, f"{QUEUE}0").cancel()
    returned = scripts.hand_back_all(redis, QUEUE, **options)
    assert (returned.queued, returned.lost) == (1, 1)
    assert redis.scard(keys.worker_executions("w")) == 0


def test_a_renewal_drops_what_no_queue_holds(redis: Redis) -> None:
    put(redis, job("a"), job("b"))
    lease(redis)
    rq_job(redis, "a").cancel()
    scripts.renew(redis, ["high", QUEUE], worker="w", incarnation="i", lease_ttl=90, worker_ttl=600)
    assert [raw.decode()[:2] for raw in redis.smembers(keys.worker_executions("w"))] == ["b:"]


def test_a_worker_is_on_the_lists_of_all_its_queues(redis: Redis) -> None:
    queues = ["high", QUEUE]
    options = {"lease_ttl": 60.0, "worker_ttl": 600, "record": {"birth": "x"}}
    assert scripts.claim(redis, queues, worker="w", incarnation="i", dead="", **options) == 0
    for queue in queues:
        assert redis.smembers(keys.workers_of(queue)) == {keys.worker("w").encode()}
        scripts.write_fields(redis, keys.engines(queue), {"w": "{}", "other": "{}"})
        scripts.write_fields(redis, keys.loads(queue), {"w": "{}", "other": "{}"})
    scripts.sign_off(redis, queues, worker="w", incarnation="i")
    assert not redis.exists(keys.workers())
    for queue in queues:
        assert not redis.exists(keys.workers_of(queue))
        assert redis.hkeys(keys.engines(queue)) == redis.hkeys(keys.loads(queue)) == [b"other"]


# --- lengths


def test_lengths_are_added_up_and_age(redis: Redis) -> None:
    assert scripts.learn(redis, QUEUE, {}) == {}
    assert scripts.learn(redis, QUEUE, {"ab": {3: 5}}) == {"ab": {3: 5}}
    assert scripts.learn(redis, QUEUE, {"ab": {3: 1, 4: 2}, "cd": {1: 1}}) == {"ab": {3: 6, 4: 2}, "cd": {1: 1}}
    assert scripts.learn(redis, QUEUE, {"ab": {3: 2034, 9: 6}})["ab"] == {3: 2040, 4: 2, 9: 6}
    assert scripts.learn(redis, QUEUE, {"ab": {2: 1}})["ab"] == {3: 1020, 4: 1, 9: 3}, "what is rare is forgotten"
    assert scripts.learn(redis, QUEUE, {}) == {"ab": {3: 1020, 4: 1, 9: 3}, "cd": {1: 1}}
    assert 0 < redis.ttl(keys.lengths(QUEUE)) <= 30 * 86400


def test_tasks_beyond_256_go_by_how_little_is_known_of_them(redis: Redis) -> None:
    scripts.learn(redis, QUEUE, {f"{i:016x}": {1: 10 + i} for i in range(256)})
    known = scripts.learn(redis, QUEUE, {"new": {1: 1}})
    assert len(known) == 256
    assert "new" in known
    assert f"{0:016x}" not in known


# --- all at once

WORKERS, LIMIT, FLEET_LIMIT, DOCUMENTS_LIMIT = 4, 1000, 2500, 40

# What is reserved in all, and by how many leases, seen in one step with what the leases themselves say.
_SNAPSHOT = """
local leases, counted, workers = redis.call('ZRANGE', KEYS[1], 0, -1), 0, {}
for _, member in ipairs(leases) do
  local f = redis.call('HMGET', 'rq:execution:' .. member, 'kv_tokens', 'worker_name')
  counted = counted + f[1]
  workers[f[2]] = (workers[f[2]] or 0) + f[1]
end
local most = 0
for _, kv_tokens in pairs(workers) do most = math.max(most, kv_tokens) end
return {#leases, counted, most, tonumber(redis.call('HGET', KEYS[2], 'queue:ingest') or 0)}
"""


def _work(url: str, number: int) -> tuple[int, int]:
    """Leases, counts, and ends what it got, until the queue is empty; how many documents, and how many were denied."""
    chance, worker = Random(number), f"w{number}"
    bounds = {"max_kv_tokens": LIMIT, "max_kv_tokens_fleet": FLEET_LIMIT, "max_in_flight_fleet": DOCUMENTS_LIMIT}
    held: list[LeasedJob] = []
    done = denied = 0
    with Redis.from_url(url) as redis:
        while True:
            reply = lease(redis, worker, chance.randrange(1, 20), block_size=16, **bounds)
            needs = [
                Need(leased.member, tokens, 20, -(-(tokens + 20) // 16) * 16)
                for leased in reply.jobs
                if (tokens := chance.randrange(max(1, leased.tokens // 2), 2 * leased.tokens))
            ]
            answers = dict(
                zip((need.member for need in needs), reserve(redis, *needs, worker=worker, **bounds), strict=True)
            )
            refused = [leased for leased in reply.jobs if answers[leased.member] == "denied"]
            if refused:
                hand_back(redis, *refused)
            denied += len(refused)
            held += [leased for leased in reply.jobs if answers[leased.member] == "granted"]
            ended = [leased for leased in held if not reply.jobs or chance.random() < 0.4]
            finish(redis, *ended, worker=worker)
            done += len(ended)
            held = [leased for leased in held if leased not in ended]
            if not held and not redis.llen(keys.queue(QUEUE)) and not redis.zcard(keys.started(QUEUE)):
                return done, denied


def _watch(url: str, is_over: Any) -> tuple[int, list[list[int]]]:
    """Snapshots while others work: how many, and those that show a limit overshot or a wrong total."""
    seen, wrong = 0, []
    with Redis.from_url(url) as redis:
        while not is_over():
            found = redis.eval(_SNAPSHOT, 2, keys.started(QUEUE), keys.kv_tokens())
            leases, counted, most, total = found
            seen += 1
            if leases > DOCUMENTS_LIMIT or counted > FLEET_LIMIT or most > LIMIT or counted != total:
                wrong.append(found)
    return seen, wrong


def _fill(redis: Redis, number: int) -> None:
    chance = Random(7)
    put(redis, *(job(f"d{i}", chance.choice([20, 50, 100, 300, 450]), 20) for i in range(number)))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_that_lease_at_once_overshoot_no_limit(redis: Redis, own: EmbeddedServer, kind: str) -> None:
    _fill(redis, 600)
    arguments: Sequence[tuple[str, int]] = [(own.url, number) for number in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS + 1) as threads, multiprocessing.get_context("spawn").Pool(WORKERS) as processes:
        if kind == "threads":
            futures = [threads.submit(_work, *each) for each in arguments]
            seen, wrong = _watch(own.url, lambda: all(future.done() for future in futures))
            worked = [future.result() for future in futures]
        else:
            pending = processes.starmap_async(_work, arguments)
            seen, wrong = _watch(own.url, pending.ready)
            worked = pending.get()
    assert wrong == []
    assert seen > 50
    assert sum(done for done, _ in worked) == 600
    assert sum(denied for _, denied in worked) > 0, "there was no room for all"
    assert redis.zcard(keys.finished(QUEUE)) == 600
    assert reserved(redis) == {}
