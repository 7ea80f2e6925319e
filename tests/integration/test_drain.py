"""The drain controller in the worker, on a simulated engine: queues by priority, tenants, KV tokens, outages."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from redis import Redis
from redis.exceptions import ConnectionError
from rq import Queue, Worker
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import live_cards
from ingestq.common.limits import update_limits
from ingestq.common.schema import IngestRequest, Sampling
from ingestq.common.scripts import EnqueueOptions, Recount
from ingestq.common.settings import Settings
from ingestq.common.task_id import task_id
from ingestq.common.worker_load import WorkerLoad, live_loads
from ingestq.workers.courier import Courier
from ingestq.workers.drain import EngineLoad
from ingestq.workers.drain_bounds import drain_controller
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.feed import feed_continuously
from ingestq.workers.lengths import bucket_of
from ingestq.workers.rows import RowWriter
from ingestq.workers.vitals import Vitals
from support.faulty import DOCUMENT_ERRS
from support.jobs import new_job, request, row, statuses
from support.newer import SCHEMA_VERSION as NEWER
from support.processes import SIMULATED, WorkerProcess, children, run, wait_until

TESTS = str(Path(__file__).parents[1])
HIGH, LOW = "ingest-high", "ingest"

# Steps that take no time; and steps so slow that a document is still running whenever a test looks.
FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
SLOW = {"INGEST_ENGINE_STEP_MS": "100"}
# Nothing comes back by the end of its lease.
LONG = {"INGEST_LEASE_TTL": "600"}


def put(
    redis: Redis, items: Sequence[IngestRequest], *, queue: str = LOW, tokens: int | None = None, **options: Any
) -> list[str]:
    """Enqueues; `tokens`: what the producer takes each prompt for, if it is wrong."""
    jobs = [new_job(item) for item in items]
    if tokens is not None:
        jobs = [job._replace(tokens=tokens) for job in jobs]
    chosen = EnqueueOptions(**{"group_ttl": 3600, "result_ttl": 3600, "failure_ttl": 3600, **options})
    for start in range(0, len(jobs), scripts.CHUNK):
        scripts.enqueue(redis, queue, jobs[start : start + scripts.CHUNK], chosen)
    return [job.job_id for job in jobs]


def sized(number: int, *, prompt_tokens: int, max_tokens: int) -> IngestRequest:
    """A document whose prompt and output have exactly so many tokens."""
    head = f"document number {number} "
    return request(number, text=head.ljust(4 * prompt_tokens, "x"), max_tokens=max_tokens)


def worker_of(server: EmbeddedServer, folder: Path, *options: str, name: str = "w", **settings: str) -> WorkerProcess:
    """A worker of both queues."""
    return WorkerProcess(server.url, folder, *options, HIGH, name=name, queue=LOW, **settings)


def burst(
    server: EmbeddedServer, *options: str, worker: str = "ingestq.workers.BatchWorker", **settings: str
) -> subprocess.CompletedProcess[str]:
    command = ("rq", "worker", "-w", worker, "--burst", *options, HIGH, LOW)
    done = run(*command, url=server.url, settings={**SIMULATED, **FAST, "PYTHONPATH": TESTS, **settings})
    assert done.returncode == 0, done.stderr
    return done


def in_flight(redis: Redis, *queues: str) -> int:
    return sum(redis.zcard(keys.started(queue)) for queue in queues or (HIGH, LOW))


def queued(redis: Redis, queue: str, tenant: str = "") -> list[str]:
    return [job_id.decode() for job_id in redis.lrange(keys.queue(queue, tenant), 0, -1)]


def reserved(redis: Redis) -> dict[str, int]:
    """KV tokens by "queue:Q" and "worker:W"."""
    return {field.decode(): int(tokens) for field, tokens in redis.hgetall(keys.kv_tokens()).items()}


def attempts(redis: Redis, job_id: str) -> tuple[bytes | None, ...]:
    return tuple(redis.hmget(keys.job(job_id), "attempts", "crashes"))


def assert_nothing_is_left(redis: Redis) -> None:
    """No lease, no reservation, and the leases say the same."""
    assert in_flight(redis) == 0
    assert reserved(redis) == {}
    for queue in (HIGH, LOW):
        assert scripts.recount(redis, queue) == Recount(kv_tokens_counted=0, kv_tokens_held=0, num_leases=0)
    assert not list(redis.scan_iter("rq:execution*"))


# --- two queues in priority order


def test_the_first_queue_is_served_first_and_both_to_the_end(server: EmbeddedServer, redis: Redis) -> None:
    low = put(redis, [request(i) for i in range(20)])
    high = put(redis, [request(i) for i in range(100, 120)], queue=HIGH)

    burst(server, "--max-jobs", "20", INGEST_MAX_IN_FLIGHT="4")
    assert set(statuses(redis, high)) == {"finished"}
    assert queued(redis, LOW) == low

    burst(server)
    assert set(statuses(redis, low)) == {"finished"}
    for queue, job_ids in ((HIGH, high), (LOW, low)):
        assert sorted(Queue(queue, connection=redis).finished_job_registry.get_job_ids()) == sorted(job_ids)
    info = run("rq", "info", url=server.url).stdout
    assert info.count("0 executing, 20 finished, 0 failed") == 2, info
    assert_nothing_is_left(redis)


def test_a_worker_is_seen_in_all_its_queues(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with worker_of(server, tmp_path, **SLOW):
        high = put(redis, [request(1, max_tokens=3000)], queue=HIGH)
        low = put(redis, [request(2, max_tokens=3000), request(3, max_tokens=3000)])
        wait_until(lambda: in_flight(redis, HIGH) == 1 and in_flight(redis, LOW) == 2, "all run")
        for queue, job_ids in ((HIGH, high), (LOW, low)):
            assert [worker.name for worker in Worker.all(queue=Queue(queue, connection=redis))] == ["w"]
            assert Queue(queue, connection=redis).started_job_registry.get_job_ids() == job_ids
            assert list(live_cards(redis, queue)) == ["w"]
            wait_until(
                lambda queue=queue: (load := live_loads(redis, queue).get("w")) and load.in_flight == 3,
                "its load counts the leases of both",
            )
        assert reserved(redis)["worker:w"] == sum(reserved(redis)[f"queue:{queue}"] for queue in (HIGH, LOW))


def test_a_killed_workers_leases_return_each_into_its_queue(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    with worker_of(server, tmp_path, INGEST_MAX_IN_FLIGHT="300", **SLOW, **LONG) as worker:
        high = put(redis, [request(i, max_tokens=3000) for i in range(150)], queue=HIGH)
        low = put(redis, [request(i, max_tokens=3000) for i in range(1000, 1250)])
        wait_until(lambda: in_flight(redis) == 300 and in_flight(redis, HIGH) == 150, "it is full")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: in_flight(redis) == 0, "its guardian hands back what it held")

    assert queued(redis, HIGH) == high
    assert queued(redis, LOW) == low
    assert {attempts(redis, job_id) for job_id in (high[0], low[0], low[149])} == {(b"1", b"1")}
    assert attempts(redis, low[150]) == (None, None)
    wait_until(lambda: not Worker.all(connection=redis), "it is off the lists")
    assert live_loads(redis, HIGH) == live_loads(redis, LOW) == {}
    assert_nothing_is_left(redis)


def kill_with_guardian(worker: WorkerProcess) -> None:
    for pid, command in children(worker.process.pid):
        if "ingestq.workers.guardian" in command:
            os.kill(pid, signal.SIGKILL)
    worker.signal(signal.SIGKILL)
    worker.wait()


def test_expired_leases_of_both_queues_are_taken_over(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=40) for i in range(10)], queue=HIGH)
    job_ids += put(redis, [request(i, max_tokens=40) for i in range(100, 110)])
    with worker_of(server, tmp_path, name="a", INGEST_LEASE_TTL="2", **SLOW) as lost:
        wait_until(lambda: in_flight(redis) == 20, "all are leased")
        kill_with_guardian(lost)
        with worker_of(server, tmp_path, name="b", INGEST_LEASE_TTL="2", **FAST):
            wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "the other one finishes all")

    assert {(row(redis, job_id).worker, row(redis, job_id).attempts) for job_id in job_ids} == {("b", 2)}
    assert_nothing_is_left(redis)


def test_the_next_worker_of_a_name_takes_over_both_queues(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=40) for i in range(5)], queue=HIGH)
    job_ids += put(redis, [request(i, max_tokens=40) for i in range(100, 105)])
    with worker_of(server, tmp_path, **SLOW, **LONG) as lost:
        wait_until(lambda: in_flight(redis) == 10, "all are leased")
        kill_with_guardian(lost)
    with worker_of(server, tmp_path, **FAST, **LONG):
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "ten minutes before the leases end")

    assert {row(redis, job_id).attempts for job_id in job_ids} == {2}
    assert_nothing_is_left(redis)


def test_a_warm_shutdown_returns_what_waits_for_the_engine_into_its_queue(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    high = put(redis, [request(i, max_tokens=40) for i in range(6)], queue=HIGH)
    low = put(redis, [request(i, max_tokens=40) for i in range(100, 106)])
    limits = {"INGEST_MAX_IN_FLIGHT": "9", "INGEST_ENGINE_MAX_NUM_SEQS": "4"}
    with worker_of(server, tmp_path, **limits, **SLOW, **LONG) as worker:
        wait_until(lambda: (load := load_of(redis, LOW)) and load.num_ready == 5, "the engine runs four, five wait")
        assert in_flight(redis, LOW) == 3
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0

    assert statuses(redis, high[:4]) == ["finished"] * 4, "what was in the engine is finished"
    assert (queued(redis, HIGH), queued(redis, LOW)) == (high[4:], low)
    assert {attempts(redis, job_id) for job_id in (*high[4:], *low[:3])} == {(b"0", None)}
    assert_nothing_is_left(redis)


def test_a_cold_shutdown_returns_everything_into_its_queue(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    high = put(redis, [request(i, max_tokens=4000) for i in range(10)], queue=HIGH)
    low = put(redis, [request(i, max_tokens=4000) for i in range(100, 110)])
    with worker_of(server, tmp_path, **SLOW, **LONG) as worker:
        wait_until(lambda: in_flight(redis) == 20, "all are leased")
        worker.signal(signal.SIGTERM)
        wait_until(lambda: "warm shut down requested" in worker.output, "the first signal was seen")
        wait_until(lambda: (worker.signal(signal.SIGTERM), worker.process.poll() is not None)[1], "it ended")

    assert (queued(redis, HIGH), queued(redis, LOW)) == (high, low)
    assert {attempts(redis, job_id) for job_id in (*high, *low)} == {(b"0", None)}
    assert_nothing_is_left(redis)


def test_suspension_holds_for_all_queues(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with worker_of(server, tmp_path, **FAST) as worker:
        run("rq", "suspend", url=server.url)
        job_ids = put(redis, [request(1)], queue=HIGH) + put(redis, [request(2)])
        wait_until(lambda: "suspended" in worker.output, "it is suspended")
        assert statuses(redis, job_ids) == ["queued"] * 2
        run("rq", "resume", url=server.url)
        wait_until(lambda: statuses(redis, job_ids) == ["finished"] * 2, "it goes on")


def test_a_retried_document_comes_back_into_its_queue(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    options = {"retries": 1, "retry_intervals_json": "[3600]"}
    (job_id,) = put(redis, [request(1, text=DOCUMENT_ERRS)], queue=HIGH, **options)
    with worker_of(server, tmp_path, worker="support.faulty.FaultyWorker", PYTHONPATH=TESTS, **FAST):
        wait_until(lambda: statuses(redis, [job_id]) == ["scheduled"], "it failed, and waits an hour")
        assert (redis.zcard(keys.scheduled(HIGH)), redis.zcard(keys.scheduled(LOW))) == (1, 0)
        redis.zadd(keys.scheduled(HIGH), {job_id: 1})
        wait_until(lambda: statuses(redis, [job_id]) == ["failed"], "it ran again")
    assert row(redis, job_id).attempts == 2
    assert (redis.zcard(keys.failed(HIGH)), redis.zcard(keys.failed(LOW))) == (1, 0)


def test_stop_job_stops_documents_of_any_queue(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    high = put(redis, [request(i, max_tokens=3000) for i in range(2)], queue=HIGH)
    low = put(redis, [request(i, max_tokens=3000) for i in range(10, 12)])
    with worker_of(server, tmp_path, **SLOW):
        wait_until(lambda: in_flight(redis) == 4, "all run")
        for job_id in (high[1], low[0]):
            send_stop_job_command(redis, job_id, serializer=JSONSerializer)
        wait_until(lambda: statuses(redis, high + low) == ["started", "stopped", "stopped", "started"], "two stop")
    assert (redis.zcard(keys.failed(HIGH)), redis.zcard(keys.failed(LOW))) == (1, 1)


@pytest.mark.parametrize("limit", ["max_in_flight", "max_in_flight_fleet", "max_kv_tokens", "max_kv_tokens_fleet"])
def test_a_queue_that_is_closed_leaves_the_others_alone_until_it_opens(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, limit: str
) -> None:
    update_limits(redis, HIGH, {limit: 0})
    high, low = put(redis, [request(1)], queue=HIGH), put(redis, [request(2)])
    with worker_of(server, tmp_path, **FAST):
        wait_until(lambda: statuses(redis, low) == ["finished"], "the lower queue is served")
        assert statuses(redis, high) == ["queued"]
        update_limits(redis, LOW, {limit: 0})
        later = put(redis, [request(3)])
        start = redis.time()[0]
        wait_until(lambda: redis.time()[0] >= start + 3, "it has looked often")
        assert statuses(redis, [*high, *later]) == ["queued"] * 2
        update_limits(redis, LOW, {limit: None})
        wait_until(lambda: statuses(redis, later) == ["finished"], "the lower one is open again")
        update_limits(redis, HIGH, {limit: None})
        wait_until(lambda: statuses(redis, high) == ["finished"], "and the higher one")


def test_a_limit_is_raised_under_a_full_worker(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    for queue in (HIGH, LOW):
        update_limits(redis, queue, {"max_in_flight": 2})
    put(redis, [request(i, max_tokens=4000) for i in range(10)])
    with worker_of(server, tmp_path, **SLOW):
        wait_until(lambda: in_flight(redis) == 2, "it is full")
        update_limits(redis, LOW, {"max_in_flight": 5})
        wait_until(lambda: in_flight(redis) == 5, "long before anything ends")


# --- shares


def test_the_lower_queue_has_its_share_of_the_tokens(server: EmbeddedServer, redis: Redis) -> None:
    high = put(redis, [sized(i, prompt_tokens=500, max_tokens=12) for i in range(900)], queue=HIGH)
    low = put(redis, [sized(i, prompt_tokens=500, max_tokens=12) for i in range(1000, 1900)])

    burst(server, "--max-jobs", "800", INGEST_LOWER_SHARE="0.25", INGEST_MAX_IN_FLIGHT="16")
    of_high, of_low = (statuses(redis, job_ids).count("finished") for job_ids in (high, low))
    assert of_high + of_low == 800
    assert 0.15 < of_low / 800 < 0.35

    burst(server, INGEST_LOWER_SHARE="0.25")
    assert set(statuses(redis, [*high, *low])) == {"finished"}
    assert_nothing_is_left(redis)


def test_tenants_backlogged_100_to_1_are_served_alternately(server: EmbeddedServer, redis: Redis) -> None:
    many = put(redis, [request(i) for i in range(1000)], tenant="many")
    few = put(redis, [request(i) for i in range(2000, 2010)], tenant="few")

    burst(server, "--max-jobs", "20", INGEST_MAX_IN_FLIGHT="4")
    assert [statuses(redis, job_ids).count("finished") for job_ids in (many, few)] == [10, 10]

    burst(server)
    assert set(statuses(redis, many)) == {"finished"}
    assert_nothing_is_left(redis)


def test_a_tenants_document_that_comes_back_ends_in_a_row(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    options = {"retries": 1, "retry_intervals_json": "[0]", "tenant": "t"}
    failing = put(redis, [request(1, text=DOCUMENT_ERRS)], **options)
    burst(server, worker="support.faulty.FaultyWorker")
    assert (statuses(redis, failing), row(redis, failing[0]).attempts) == (["failed"], 2)

    others = put(redis, [request(i, max_tokens=3000) for i in range(10, 15)], tenant="t")
    with worker_of(server, tmp_path, **SLOW, **LONG) as worker:
        wait_until(lambda: in_flight(redis) == 5, "all run")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: queued(redis, LOW, "t") == others, "they are handed back to the tenant's list")

    requeued = run("rq", "requeue", "--queue", LOW, failing[0], url=server.url)
    assert requeued.returncode == 0, requeued.stderr
    burst(server)
    assert set(statuses(redis, [*failing, *others])) == {"finished"}
    assert row(redis, failing[0]).attempts == 1
    assert_nothing_is_left(redis)


# --- KV tokens


class Snapshot(NamedTuple):
    """One moment of Redis."""

    limit: int
    # KV tokens of the queue and of the worker.
    of_queue: int
    of_worker: int
    leases: frozenset[bytes]


class Sampler:
    """Looks at the low queue and the worker "w" as often as it can, from a thread of its own."""

    def __init__(self, server: EmbeddedServer, limit: str) -> None:
        self.seen: list[Snapshot] = []
        self._redis = Redis.from_url(server.url)
        self._limit = limit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hget(keys.limits(LOW), self._limit)
                pipeline.hmget(keys.kv_tokens(), f"queue:{LOW}", "worker:w")
                pipeline.zrange(keys.started(LOW), 0, -1)
                limit, (of_queue, of_worker), leases = pipeline.execute()
            self.seen.append(Snapshot(int(limit or 0), int(of_queue or 0), int(of_worker or 0), frozenset(leases)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._redis.close()


@pytest.mark.parametrize("limit", ["max_kv_tokens", "max_kv_tokens_fleet"])
def test_a_live_limit_of_kv_tokens_is_never_exceeded(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, limit: str
) -> None:
    """Half of the documents are ten times as long as their producer thought."""
    update_limits(redis, LOW, {limit: 1600})
    job_ids = []
    for i in range(160):
        estimate = 10 if i % 2 else None
        job_ids += put(redis, [sized(i, prompt_tokens=100, max_tokens=60)], tokens=estimate)

    def held() -> int:
        return reserved(redis).get(f"queue:{LOW}", 0)

    with Sampler(server, limit) as sampler, worker_of(server, tmp_path, INGEST_ENGINE_STEP_MS="10"):
        wait_until(lambda: held() >= 1440, "the limit is used")
        update_limits(redis, LOW, {limit: 480})
        wait_until(lambda: held() <= 480, "it fell below the lower limit")
        wait_until(lambda: 320 <= held() <= 480 and any(seen.limit == 480 for seen in sampler.seen), "and goes on")
        update_limits(redis, LOW, {limit: 3200})
        wait_until(lambda: held() > 1600, "the higher limit is used")
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "all end")

    assert max(seen.of_queue for seen in sampler.seen) <= 3200
    before = sampler.seen[0]
    for seen in sampler.seen[1:]:
        assert seen.of_queue == seen.of_worker
        if seen.limit == before.limit and seen.of_queue > seen.limit:
            assert seen.leases <= before.leases, "nothing is leased while more is held than the limit"
        if seen.limit == before.limit and before.of_queue <= seen.limit:
            assert seen.of_queue <= seen.limit
        before = seen
    assert {row(redis, job_id).attempts for job_id in job_ids} == {1}
    assert_nothing_is_left(redis)


@pytest.mark.parametrize("tokens", [None, 10], ids=["estimated", "underestimated"])
@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("setting", "INGEST_MAX_KV_TOKENS is 1600"),
        ("max_kv_tokens", "the queue's limit max_kv_tokens is 1600"),
        ("max_kv_tokens_fleet", "the queue's limit max_kv_tokens_fleet is 1600"),
    ],
)
def test_a_document_beyond_the_whole_limit_is_dead_lettered_with_both_numbers(
    server: EmbeddedServer, redis: Redis, bound: str, told: str, tokens: int | None
) -> None:
    settings = {"INGEST_MAX_KV_TOKENS": "1600"} if bound == "setting" else {}
    if bound != "setting":
        update_limits(redis, LOW, {bound: 1600})
    (large,) = put(redis, [sized(1, prompt_tokens=2000, max_tokens=4)], tokens=tokens)
    small = put(redis, [request(2)])

    burst(server, **settings)

    assert statuses(redis, [large, *small]) == ["failed", "finished"]
    failure = row(redis, large)
    assert failure.error_class == "KvLimitExceeded"
    assert "needs 2016 KV tokens (2000 of prompt, 4 of expected output" in (failure.error_message or "")
    assert told in (failure.error_message or "")
    assert_nothing_is_left(redis)


def test_an_underestimated_document_goes_back_once_and_comes_again(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    update_limits(redis, LOW, {"max_kv_tokens": 1600})
    blocker = put(redis, [sized(1, prompt_tokens=100, max_tokens=1180)])
    with worker_of(server, tmp_path, **SLOW) as worker:
        wait_until(lambda: in_flight(redis) == 1, "the engine has little room left")
        (large,) = put(redis, [sized(2, prompt_tokens=700, max_tokens=4)], tokens=4)
        wait_until(lambda: "they went back" in worker.output, "it was counted, and went back")
        start, calls = redis.time()[0], redis.info("commandstats")["cmdstat_evalsha"]["calls"]
        wait_until(lambda: redis.time()[0] >= start + 3, "time passes, by the server's clock")
        seconds = redis.time()[0] - start
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - calls < 60 * seconds
        assert worker.output.count("they went back") == 1
        assert (statuses(redis, [large]), attempts(redis, large)) == (["queued"], (b"0", None))
        assert redis.hmget(keys.job(large), "tokens", "tokens_exact") == [b"700", b"1"]
        send_stop_job_command(redis, blocker[0], serializer=JSONSerializer)
        wait_until(lambda: statuses(redis, [large]) == ["finished"], "it has its turn")

    assert row(redis, large).attempts == 1
    assert_nothing_is_left(redis)


def test_what_went_back_is_not_counted_by_max_jobs_and_no_burst_ends_before_it(
    server: EmbeddedServer, redis: Redis
) -> None:
    update_limits(redis, LOW, {"max_kv_tokens": 1600})
    job_ids = put(redis, [sized(1, prompt_tokens=900, max_tokens=4)])
    job_ids += put(redis, [sized(i, prompt_tokens=900, max_tokens=4) for i in (2, 3, 4)], tokens=4)

    done = burst(server, "--max-jobs", "3")
    assert "they went back" in done.stdout + done.stderr
    assert statuses(redis, job_ids).count("finished") == 3

    burst(server)
    assert set(statuses(redis, job_ids)) == {"finished"}
    assert_nothing_is_left(redis)


def test_a_large_document_is_passed_for_a_minute_and_then_has_its_turn(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    update_limits(redis, LOW, {"max_kv_tokens": 1600})
    blocker = put(redis, [sized(1, prompt_tokens=100, max_tokens=1180)])
    with worker_of(server, tmp_path, **SLOW):
        wait_until(lambda: in_flight(redis) == 1, "the engine has little room left")
        (large,) = put(redis, [sized(2, prompt_tokens=700, max_tokens=4)])
        small = put(redis, [request(i, max_tokens=2) for i in range(10, 20)])
        wait_until(lambda: set(statuses(redis, small)) == {"finished"}, "small ones pass it")
        assert statuses(redis, [large]) == ["queued"]
        since = int(redis.hget(keys.job(large), "blocked_ms"))

        redis.hset(keys.job(large), "blocked_ms", since - 61_000)
        late = put(redis, [request(i, max_tokens=2) for i in range(30, 40)])
        wait_until(lambda: redis.hget(keys.job(large), "held_for") == b"w", "the worker makes room for it")
        wait_until(lambda: "head" in gates(redis, LOW), "and says so")
        assert set(statuses(redis, late)) == {"queued"}
        send_stop_job_command(redis, blocker[0], serializer=JSONSerializer)
        wait_until(lambda: statuses(redis, [large]) == ["finished"], "it has its turn")
        wait_until(lambda: set(statuses(redis, late)) == {"finished"}, "and then the others")
    assert_nothing_is_left(redis)


def test_an_idle_worker_goes_on_when_another_makes_room_in_the_fleet(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    update_limits(redis, LOW, {"max_kv_tokens_fleet": 1600})
    blocker = put(redis, [sized(1, prompt_tokens=100, max_tokens=1480)])
    with worker_of(server, tmp_path, name="a", **SLOW) as first:
        wait_until(lambda: in_flight(redis) == 1, "the fleet has little room left")
        # From here on it leases nothing: the room that it makes is all for the other one.
        first.signal(signal.SIGTERM)
        wait_until(lambda: redis.hget(keys.worker("a"), "shutdown_requested_date"), "it takes no more")
        with worker_of(server, tmp_path, name="b", INGEST_MAX_IN_FLIGHT="2", **FAST):
            large = put(redis, [sized(i, prompt_tokens=700, max_tokens=4) for i in range(10, 20)])
            wait_until(lambda: "kv_fleet" in gates(redis, LOW, "b"), "the other one is told to wait")
            send_stop_job_command(redis, blocker[0], serializer=JSONSerializer)
            wait_until(lambda: set(statuses(redis, large)) == {"finished"}, "all end")
    assert {row(redis, job_id).worker for job_id in large} == {"b"}
    assert_nothing_is_left(redis)


def test_reservations_become_as_small_as_outputs_are(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    engine = {"INGEST_ENGINE_OUTPUT_TOKENS_MEDIAN": "20", "INGEST_ENGINE_OUTPUT_TOKENS_SIGMA": "0.1"}

    def item(number: int) -> IngestRequest:
        return request(number, sampling=Sampling(max_tokens=2000))

    put(redis, [item(i) for i in range(40)])
    burst(server, **engine)
    (job_id,) = put(redis, [item(100)])
    with worker_of(server, tmp_path, name="b", **engine, **SLOW):
        wait_until(lambda: statuses(redis, [job_id]) != ["queued"], "another worker leases one more")
        # Of max_tokens there would be 2,000.
        assert 16 < reserved(redis)["worker:b"] < 100
        wait_until(lambda: statuses(redis, [job_id]) == ["finished"], "and it ends")
    assert_nothing_is_left(redis)


# --- what a worker says of itself


def load_of(redis: Redis, queue: str, worker: str = "w") -> WorkerLoad | None:
    return live_loads(redis, queue).get(worker)


def gates(redis: Redis, queue: str, worker: str = "w") -> set[str]:
    load = load_of(redis, queue, worker)
    return {closed.gate for closed in load.closed} if load else set()


def test_the_published_load_is_true(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    put(redis, [request(i, max_tokens=3000) for i in range(20)])
    limits = {"INGEST_MAX_IN_FLIGHT": "8", "INGEST_ENGINE_MAX_NUM_SEQS": "5", "INGEST_MAX_KV_TOKENS": "100000"}
    with worker_of(server, tmp_path, **limits, **SLOW):
        wait_until(lambda: in_flight(redis) == 8, "it is full")
        wait_until(lambda: (load := load_of(redis, HIGH)) and load.num_ready == 3, "it is published")
        load = load_of(redis, LOW)
        assert load is not None
        assert (load.in_flight, load.max_in_flight, load.num_running, load.num_ready) == (8, 8, 5, 3)
        assert load.kv_tokens == reserved(redis)["worker:w"]
        assert load.max_kv_tokens == 100_000
        assert {closed.gate for closed in load.closed} == {"in_flight", "start: sequences"}
        told = {closed.gate: closed.why for closed in load.closed}
        assert told["in_flight"] == "8 documents are in flight, the limit is 8 now"
        assert told["start: sequences"] == "the engine runs 5 sequences, as many as it may"
        assert load.queue_p50_ms is not None
        update_limits(redis, HIGH, {"ttft_sla_ms": 1234})
        wait_until(lambda: (load := load_of(redis, LOW)) and load.ttft_sla_ms == 1234, "a live limit is heeded")


# --- feeding


def test_waves_keep_to_limits_and_serve_all_queues(server: EmbeddedServer, redis: Redis) -> None:
    update_limits(redis, LOW, {"max_kv_tokens": 1600})
    high = put(redis, [request(i) for i in range(60)], queue=HIGH)
    low = put(redis, [sized(i, prompt_tokens=100, max_tokens=60) for i in range(100, 130)])
    low += put(redis, [sized(i, prompt_tokens=100, max_tokens=60) for i in range(200, 230)], tokens=10)
    with Sampler(server, "max_kv_tokens") as sampler:
        burst(server, "-n", "w", INGEST_FEED="generate")

    assert set(statuses(redis, [*high, *low])) == {"finished"}
    assert max(seen.of_queue for seen in sampler.seen) <= 1600
    assert_nothing_is_left(redis)


def test_an_engine_that_preempts_ends_everything_and_is_given_less(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    """The fleet knows short outputs of a task; now they are 30 times as long."""
    items = [request(i, max_tokens=240) for i in range(64)]
    scripts.learn(redis, LOW, {task_id(items[0]): {bucket_of(8): 100}})
    job_ids = put(redis, items)
    engine = {"INGEST_ENGINE_NUM_KV_BLOCKS": "64", "INGEST_ENGINE_MAX_MODEL_LEN": "512"}
    limits = {"INGEST_MAX_IN_FLIGHT": "32", "INGEST_MIN_IN_FLIGHT": "2"}
    smallest = 32
    with worker_of(server, tmp_path, INGEST_ENGINE_STEP_MS="4", **engine, **limits):

        def done() -> bool:
            nonlocal smallest
            if load := load_of(redis, LOW):
                smallest = min(smallest, load.max_in_flight)
            return set(statuses(redis, job_ids)) == {"finished"}

        wait_until(done, "all end")
        wait_until(lambda: (load := load_of(redis, LOW)) and load.in_flight == 0, "its last word")
        load = load_of(redis, LOW)
        assert load is not None
        assert load.num_preemptions > 0
        assert smallest < 32
    assert_nothing_is_left(redis)


# --- outages of Redis between two calls, in this process: exactly there


@contextmanager
def courier_of(redis: Redis, **settings: Any) -> Iterator[Courier]:
    """A courier and the step loop of an engine that takes no time."""
    chosen = Settings(engine="simulated", model="sim", queue=HIGH, engine_args={"time_scale": 0}, **settings)
    engine = SimulatedEngine.from_settings(chosen)
    rows = RowWriter(worker="w", card=engine.card, result_ttl=600, failure_ttl=600)
    controller = drain_controller(chosen, engine, None)
    courier = Courier(redis, chosen, engine, controller, rows, Vitals.create(), queues=[HIGH, LOW])
    stop = threading.Event()

    def feed() -> None:
        while not stop.is_set():
            if courier.pool.wait(0.02) and (ready := courier.start_ready(EngineLoad())):
                feed_continuously(engine, courier, ready, stop.is_set, lambda: None)

    thread = threading.Thread(target=feed, daemon=True)
    courier.start()
    thread.start()
    try:
        yield courier
    finally:
        stop.set()
        thread.join()
        courier.close(10.0)
        assert courier.failure is None


def fails_once(call: Callable[..., Any], *, done: bool) -> Callable[..., Any]:
    """`call`, of which the first for the low queue fails; `done`: Redis did it, and the answer was lost."""
    failed = False

    def called(connection: Redis, queue: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if failed or queue != LOW:
            return call(connection, queue, *args, **kwargs)
        failed = True
        if done:
            call(connection, queue, *args, **kwargs)
        raise ConnectionError("injected: Redis is away")

    return called


@pytest.mark.parametrize("done", [False, True], ids=["not done", "answer lost"])
@pytest.mark.parametrize("name", ["lease", "reserve", "hand_back", "adopt", "learn"])
def test_an_outage_between_two_calls_costs_no_document(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, name: str, done: bool
) -> None:
    update_limits(redis, LOW, {"max_kv_tokens": 1600})
    monkeypatch.setattr(scripts, name, fails_once(getattr(scripts, name), done=done))
    # One is for a newer worker, some fit, some are denied and handed back, one is a plain client's.
    newer = put(redis, [request(100)])
    data = redis.hget(keys.job(newer[0]), "data").replace(b'"model"', b'"schema_version":%d,"model"' % NEWER)
    redis.hset(keys.job(newer[0]), "data", data)
    job_ids = put(redis, [sized(i, prompt_tokens=300, max_tokens=20) for i in range(6)])
    job_ids += put(redis, [sized(i, prompt_tokens=700, max_tokens=20) for i in range(10, 16)], tokens=10)
    plain = Queue(LOW, connection=redis, serializer=JSONSerializer)
    payload = {"document_id": "p", "text": "Some text.", "model": "sim", "chat": False}
    job_ids += [plain.enqueue("ingestq.ingest", payload).id]
    job_ids += put(redis, [request(i) for i in range(200, 210)], queue=HIGH)

    with courier_of(redis) as courier:
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "all end in rows")
        wait_until(lambda: courier.in_flight == 0, "nothing is stuck")
        wait_until(lambda: redis.hget(keys.job(newer[0]), "schema") == str(NEWER).encode(), "the newer one is marked")
        assert statuses(redis, newer) == ["queued"]
        assert attempts(redis, newer[0]) == (b"0", None)

    assert {row(redis, job_id).attempts for job_id in job_ids} == {1}
    assert_nothing_is_left(redis)
