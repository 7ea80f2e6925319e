"""Tenants of a queue: each waits in a list of its own, and they take turns by the tokens that they were served."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import pytest
from redis import Redis

from ingestq.common import keys, scripts
from ingestq.common.scripts import Admission, EnqueueOptions, Finish, JobNeeds, LeasedJob, LeaseReply, Need, NewJob
from support.jobs import QUEUE, rq_job


def put(
    redis: Redis, tenant: str, sizes: Iterable[int], *, model: str = "m", prefix: str = "", **options: Any
) -> list[str]:
    """Enqueues one document of each size (tokens, the output counted)."""
    first = redis.incr("number-of-documents")
    jobs = [
        NewJob(f"{prefix or tenant or 'base'}-{first}-{i}", b"{}", "d", model, tokens, 1)
        for i, tokens in enumerate(size - 1 for size in sizes)
    ]
    chosen = EnqueueOptions(**{"group_ttl": 3600, "result_ttl": 3600, "failure_ttl": 3600, **options}, tenant=tenant)
    for start in range(0, len(jobs), scripts.CHUNK):
        scripts.enqueue(redis, QUEUE, jobs[start : start + scripts.CHUNK], chosen)
    return [job.job_id for job in jobs]


def lease(redis: Redis, documents: int = 128, *, model: str = "m", position: int = 0, **bounds: Any) -> LeaseReply:
    return scripts.lease(
        redis,
        QUEUE,
        worker="w",
        model=model,
        admission=Admission(documents=documents, **bounds),
        lease_ttl=60,
        call_id=secrets.token_hex(7),
        position=position,
    )


def finish(redis: Redis, jobs: Sequence[LeasedJob], kind: Any = "S") -> None:
    ends = [Finish(job=job, kind=kind, ttl=600, result_json=b"{}") for job in jobs]
    if ends:
        scripts.finish(redis, QUEUE, worker="w", model="m", finishes=ends)


def serve(redis: Redis, tokens: int, documents: int = 7) -> Counter[str]:
    """Leases and finishes until so many tokens were served; returns them by tenant."""
    served: Counter[str] = Counter()
    while served.total() < tokens and (jobs := lease(redis, documents).jobs):
        for job in jobs:
            served[job.tenant] += job.kv_tokens
        finish(redis, jobs)
    return served


def jain(shares: Sequence[float]) -> float:
    """Jain, Chiu and Hawe's index (1984): 1 where all have the same, 1/n where one has it all."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def scores(redis: Redis) -> dict[str, float]:
    return {tenant.decode(): score for tenant, score in redis.zrange(keys.tenants(QUEUE), 0, -1, withscores=True)}


# --- in proportion


@pytest.mark.parametrize("documents", [1, 7, 128])
def test_two_that_are_backlogged_100_to_1_get_the_same(redis: Redis, documents: int) -> None:
    """The short backlog is served by half the tokens; until it is done, each has as many."""
    put(redis, "many", [100] * 5000)
    put(redis, "few", [100] * 50)
    served = serve(redis, 9_000, documents)
    assert jain([served["many"], served["few"]]) >= 0.95


@pytest.mark.parametrize("documents", [1, 7, 128])
def test_tokens_count_and_not_documents(redis: Redis, documents: int) -> None:
    chance = Random(1)
    put(redis, "long", (chance.choice([1000, 4000, 16000]) for _ in range(400)))
    put(redis, "short", [50] * 8000)
    served = serve(redis, 600_000, documents)
    assert jain([served["long"], served["short"]]) >= 0.95


def test_one_call_serves_all_who_wait(redis: Redis) -> None:
    put(redis, "a", [10] * 500)
    put(redis, "b", [10] * 500)
    put(redis, "", [10] * 500)
    counts = Counter(job.tenant for job in lease(redis).jobs)
    assert sorted(counts.values()) == [42, 43, 43]


def test_many_tenants_are_served_alike(redis: Redis) -> None:
    chance = Random(2)
    for i in range(200):
        put(redis, f"t{i}", (chance.randrange(10, 200) for _ in range(chance.choice([20, 200]))))
    served = serve(redis, 200 * 1000, 64)
    assert len(served) == 200
    assert jain(list(served.values())) >= 0.95


def test_documents_without_a_tenant_take_their_turns(redis: Redis) -> None:
    """Also those of a plain RQ client, which has never heard of tenants."""
    put(redis, "", [100] * 200)
    put(redis, "t", [100] * 200)
    served = serve(redis, 10_000)
    assert jain([served[""], served["t"]]) >= 0.95
    while lease(redis).jobs:
        pass
    put(redis, "t", [100] * 200)
    names = put(redis, "", [100] * 50, prefix="plain")
    redis.zrem(keys.tenants(QUEUE), "")
    served = serve(redis, 5_000)
    assert jain([served[""], served["t"]]) >= 0.95
    assert names


# --- credit


def test_who_comes_later_has_saved_up_nothing(redis: Redis) -> None:
    put(redis, "early", [100] * 1000)
    serve(redis, 50_000)
    put(redis, "late", [100] * 1000)
    served = serve(redis, 10_000)
    assert jain([served["early"], served["late"]]) >= 0.95


def test_who_waits_for_another_model_has_saved_up_nothing_for_whoever_comes(redis: Redis) -> None:
    put(redis, "other", [100] * 10, model="another")
    put(redis, "early", [100] * 1000)
    serve(redis, 50_000)
    put(redis, "late", [100] * 1000)
    served = serve(redis, 10_000)
    assert jain([served["early"], served["late"]]) >= 0.95


def test_one_document_at_a_time_wins_nothing(redis: Redis) -> None:
    """Whoever's list runs empty with every lease is asked what it was served, all the same."""
    put(redis, "steady", [100] * 2000)
    served: Counter[str] = Counter()
    while served.total() < 100_000:
        if not redis.llen(keys.queue(QUEUE, "cunning")):
            put(redis, "cunning", [1600])
        jobs = lease(redis, 1).jobs
        for job in jobs:
            served[job.tenant] += job.kv_tokens
        finish(redis, jobs)
    assert jain([served["cunning"], served["steady"]]) >= 0.95


def test_what_is_handed_back_was_not_served(redis: Redis) -> None:
    put(redis, "a", [100] * 20)
    put(redis, "b", [100] * 20)
    before = scores(redis)
    jobs = lease(redis, 10).jobs
    assert scores(redis) == {"a": 500, "b": 500}
    scripts.hand_back_all(redis, QUEUE, worker="w", incarnation="", failure_ttl=60)
    assert scores(redis) == before
    assert [job.job_id for job in lease(redis, 10).jobs] == [job.job_id for job in jobs], "the same, in the same order"


def test_what_was_counted_is_what_was_served(redis: Redis) -> None:
    put(redis, "a", [100] * 2)
    put(redis, "b", [100] * 2)
    (job,) = lease(redis, 1).jobs
    admission = Admission(documents=0)
    scripts.reserve(redis, QUEUE, worker="w", admission=admission, needs=[Need(job.member, 299, 1, 300)])
    assert scores(redis) == {job.tenant: 300, "b" if job.tenant == "a" else "a": 0}


# --- lists


@pytest.mark.parametrize("way", ["retry", "later", "failed", "hand back", "taken over"])
def test_a_document_goes_back_to_its_tenants_list(redis: Redis, way: str) -> None:
    intervals = "[60]" if way == "later" else "[0]"
    retries = {"retries": 1, "retry_intervals_json": intervals} if way in ("retry", "later") else {}
    (name,) = put(redis, "t", [100], **retries)
    jobs = lease(redis).jobs
    assert (jobs[0].tenant, lease(redis).jobs, scores(redis)) == ("t", [], {})
    redis.delete(keys.queues())

    if way == "hand back":
        scripts.hand_back(redis, QUEUE, members=[jobs[0].member], failure_ttl=60)
    elif way == "taken over":
        redis.zadd(keys.started(QUEUE), {jobs[0].member: 1})
        scripts.hand_back(redis, QUEUE, failure_ttl=60, max_crashes=3)
    else:
        finish(redis, jobs, "P" if way == "failed" else "F")
    if way == "later":
        redis.zadd(keys.scheduled(QUEUE), {name: 1})
        scripts.promote(redis, QUEUE)
    if way == "failed":
        scripts.retry(redis, QUEUE, [name], stamp=scripts.now_iso())

    assert redis.lrange(keys.queue(QUEUE, "t"), 0, -1) == [name.encode()]
    assert redis.llen(keys.queue(QUEUE)) == 0
    assert scores(redis) == {"t": 0}
    assert keys.queue(QUEUE, "t").encode() in redis.smembers(keys.queues()), "rq info shows it"
    assert [job.job_id for job in lease(redis).jobs] == [name]


def test_a_list_is_one_of_rqs_queues(redis: Redis) -> None:
    (name,) = put(redis, "t", [100])
    assert redis.smembers(keys.queues()) == {b"rq:queue:ingest@t"}
    assert rq_job(redis, name).origin == QUEUE, "registries are the queue's"


def test_a_queue_without_tenants_has_no_record_of_any(redis: Redis) -> None:
    put(redis, "", [100] * 3)
    finish(redis, lease(redis).jobs)
    assert not redis.exists(keys.tenants(QUEUE))


def test_a_tenant_whose_documents_are_done_is_forgotten(redis: Redis) -> None:
    put(redis, "t", [100] * 3)
    put(redis, "", [100] * 3)
    finish(redis, lease(redis).jobs)
    assert lease(redis).queue_length == 0
    assert not redis.exists(keys.tenants(QUEUE))
    assert not redis.keys("rq:queue:*")


def test_what_stands_in_the_place_of_a_tenants_name_is_no_name(redis: Redis) -> None:
    (name,) = put(redis, "t", [100])
    redis.hset(keys.job(name), "tenant", "a b\n" + "x" * 200)
    jobs = lease(redis).jobs
    assert jobs[0].tenant == ""
    scripts.hand_back(redis, QUEUE, members=[jobs[0].member], failure_ttl=60)
    assert redis.lrange(keys.queue(QUEUE), 0, -1) == [name.encode()]


@pytest.mark.parametrize("key", ["zset", "list"])
def test_other_things_under_a_tenants_keys_lose_nothing(redis: Redis, key: str) -> None:
    (name,) = put(redis, "t", [100])
    jobs = lease(redis).jobs
    redis.set(keys.tenants(QUEUE) if key == "zset" else keys.queue(QUEUE, "t"), "junk")
    scripts.hand_back(redis, QUEUE, members=[jobs[0].member], failure_ttl=60)
    assert [job.job_id for job in lease(redis).jobs] == [name]


def test_a_far_look_goes_through_every_list(redis: Redis) -> None:
    """Jobs of other models are in the way in each of them."""
    for tenant in ("", "a", "b"):
        put(redis, tenant, [100] * 400, model="another")
        put(redis, tenant, [100] * 5)
    found: list[str] = []
    position = 0
    for _ in range(100):
        reply = lease(redis, position=position)
        found += [job.tenant for job in reply.jobs]
        position = 0 if reply.jobs or reply.next_position >= reply.queue_length else reply.next_position
        if reply.next_position >= reply.queue_length:
            break
    assert Counter(found) == {"": 5, "a": 5, "b": 5}
    assert reply.queue_length == 1200


def test_a_call_looks_at_a_bounded_number_of_jobs(redis: Redis) -> None:
    for i in range(300):
        put(redis, f"t{i}", [100] * 20, model="another")
    redis.config_resetstat()
    reply = lease(redis)
    assert (reply.jobs, reply.queue_length) == ([], 6000)
    assert 0 < reply.next_position < 20
    assert redis.info("commandstats")["cmdstat_hmget"]["calls"] <= 2 * 2048 + 10


def test_unknown_documents_of_tenants_are_adopted(redis: Redis) -> None:
    names = put(redis, "t", [100] * 2)
    for name in names:
        redis.hdel(keys.job(name), "model")
    reply = lease(redis)
    assert [name for name, _ in reply.unknown] == names
    scripts.adopt(redis, QUEUE, [JobNeeds(name, "m", 1) for name in names])
    assert [job.job_id for job in lease(redis).jobs] == names


def test_one_that_does_not_fit_lets_the_others_pass_for_a_minute(redis: Redis) -> None:
    (held,) = put(redis, "", [200])
    assert [job.job_id for job in lease(redis).jobs] == [held]
    (big,) = put(redis, "a", [900])
    put(redis, "a", [10] * 200)
    put(redis, "b", [10] * 200)
    counts = Counter(job.tenant for job in lease(redis, 40, max_kv_tokens_fleet=1000).jobs)
    assert counts == {"a": 20, "b": 20}
    redis.hincrby(keys.job(big), "blocked_ms", -61_000)
    reply = lease(redis, 40, max_kv_tokens_fleet=1000)
    assert (reply.jobs, reply.gate) == ([], "kv_fleet"), "whose turn it is, or not"


@pytest.mark.parametrize("bound", ["max_kv_tokens", "max_kv_tokens_fleet"])
def test_small_documents_do_not_keep_the_room_from_large_ones_of_another(redis: Redis, bound: str) -> None:
    """Without room saved for them, large ones fit only when by chance many small ones end at once."""
    chance = Random(3)
    put(redis, "small", [1000] * 2500)
    put(redis, "large", [16000] * 150)
    served: Counter[str] = Counter()
    held = list(lease(redis, 64, **{bound: 48_000}).jobs)
    for _ in range(1200):
        job = held.pop(chance.randrange(len(held)))
        finish(redis, [job])
        served[job.tenant] += job.kv_tokens
        held += lease(redis, 64, **{bound: 48_000}).jobs
    assert jain([served["small"], served["large"]]) >= 0.95


# --- what somebody else wrote


@pytest.mark.parametrize("tenant", ["", "t"])
def test_a_list_that_is_none_is_empty(redis: Redis, tenant: str) -> None:
    put(redis, "a", [100] * 2)
    put(redis, tenant, [100])
    redis.set(keys.queue(QUEUE, tenant), "x")
    reply = lease(redis)
    assert [job.tenant for job in reply.jobs] == ["a", "a"]
    assert redis.hget(keys.kv_tokens(), "queue:ingest") == b"200"
    redis.set(keys.queue(QUEUE, tenant), "x")
    assert lease(redis, 0).queue_length == 0


@pytest.mark.parametrize("tenant", ["", "t"])
def test_a_retry_whose_list_is_none_is_queued(redis: Redis, tenant: str) -> None:
    (name,) = put(redis, tenant, [100], retries=1, retry_intervals_json="[1]")
    finish(redis, lease(redis).jobs, "F")
    redis.zadd(keys.scheduled(QUEUE), {name: 1})
    redis.set(keys.queue(QUEUE, tenant), "x")
    assert scripts.promote(redis, QUEUE) == 1
    finish(redis, lease(redis).jobs, "P")
    redis.set(keys.queue(QUEUE, tenant), "x")
    assert scripts.retry(redis, QUEUE, [name], stamp="now") == [True]
    assert [job.job_id for job in lease(redis).jobs] == [name]


@pytest.mark.parametrize("score", [float("-inf"), float("inf"), 1e300, -1e300])
def test_a_score_that_can_not_be_is_the_lowest(redis: Redis, score: float) -> None:
    put(redis, "a", [100] * 200)
    put(redis, "b", [100] * 200)
    redis.zadd(keys.tenants(QUEUE), {"a": score, "b": 500})
    served = serve(redis, 10_000)
    assert jain([served["a"], served["b"]]) >= 0.95


def test_nothing_is_left_of_tenants_that_are_through(redis: Redis) -> None:
    put(redis, "", [100] * 3)
    put(redis, "t", [10])
    serve(redis, 1000, 2)
    assert not redis.exists(keys.tenants(QUEUE)), "or every end of a job would wake workers for nothing"


# --- while jobs of another model are in the way


def test_a_short_list_is_looked_at_while_a_long_one_is_searched(redis: Redis) -> None:
    put(redis, "long", [100] * 500, model="another")
    (name,) = put(redis, "new", [100])
    assert [job.job_id for job in lease(redis, position=200).jobs] == [name]
    reply = lease(redis, position=200)
    assert (reply.jobs, reply.next_position) == ([], 500)


def test_more_tenants_than_are_opened_at_once_are_looked_at_where_the_first_give_nothing(redis: Redis) -> None:
    for i in range(300):
        put(redis, f"t{i:03}", [100], model="another")
    (name,) = put(redis, "u", [100])
    assert [job.job_id for job in lease(redis).jobs] == [name]
    assert 0 < lease(redis, 0).queue_length <= 300
