"""Releases side by side: jobs for newer workers wait for them; the scripts of this release and of the one before agree.

A worker of the release before this one knows nothing of newer schemas: it fails such jobs. Workers are upgraded first.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.schema import IngestResult, Status
from ingestq.common.scripts import Admission, Finish, LeasedJob
from ingestq.producer import iter_results
from support import former
from support.jobs import QUEUE, put, request, row, rq_job, statuses
from support.newer import NewerRequest
from support.processes import SIMULATED, WorkerProcess, run, wait_until

FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
TESTS = str(Path(__file__).parents[1])


def burst(server: EmbeddedServer, worker: str = "ingestq.workers.BatchWorker") -> subprocess.CompletedProcess[str]:
    command = ("rq", "worker", "-w", worker, "--burst", QUEUE)
    done = run(*command, url=server.url, settings={**SIMULATED, **FAST, "PYTHONPATH": TESTS})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


# --- jobs of a newer schema


def put_newer(redis: Redis) -> list[str]:
    """By a plain RQ client, by a newer producer, and by one that wrote the schema into the payload only."""
    newer = [NewerRequest(document_id=f"newer-{i}", text="t", model="sim", chat=False, tone="calm") for i in range(3)]
    queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
    plain = queue.enqueue("ingestq.ingest", json.loads(newer[0].to_json())).id
    marked, unmarked = put(redis, newer[1:])
    redis.hset(keys.job(marked), "schema", 2)
    return [plain, marked, unmarked]


def lease_calls(redis: Redis) -> int:
    return int(redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def test_jobs_of_a_newer_schema_wait_for_a_newer_worker(server: EmbeddedServer, redis: Redis) -> None:
    newer = put_newer(redis)
    older = put(redis, [request(number) for number in range(200)])
    calls = lease_calls(redis)

    burst(server)

    assert statuses(redis, newer) == ["queued"] * 3
    assert set(statuses(redis, older)) == {"finished"}, "those behind them are run"
    assert sorted(redis.lrange(keys.queue(QUEUE), 0, -1)) == sorted(name.encode() for name in newer)
    assert all(int(redis.hget(keys.job(name), "attempts") or 0) == 0 for name in newer)
    assert lease_calls(redis) - calls < 60
    shown = run("ingestq", "status", "--json", url=server.url, settings={"INGEST_MODEL": "sim"})
    assert json.loads(shown.stdout)["for_newer_workers"] == 3

    burst(server, "support.newer.NewerWorker")

    assert statuses(redis, newer) == ["finished"] * 3
    assert [row(redis, name).document_id for name in newer] == ["newer-0", "newer-1", "newer-2"]
    assert [len(rq_job(redis, name).results()) for name in newer] == [1] * 3


def test_a_queue_of_newer_jobs_does_not_make_a_worker_spin(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    newer = put_newer(redis)
    with WorkerProcess(server.url, tmp_path, name="a", **FAST) as worker:
        wait_until(lambda: redis.hget(keys.job(newer[2]), "schema") == b"2", "the worker has seen them all")
        before, start = lease_calls(redis), redis.time()[0]
        wait_until(lambda: redis.time()[0] >= start + 4, "time passes, by the server's clock")
        assert lease_calls(redis) - before < 60 * (redis.time()[0] - start)
        assert worker.output.count("wait for a newer worker") == 1
    assert statuses(redis, newer) == ["queued"] * 3
    assert redis.hget(keys.job(newer[2]), "attempts") == b"0", "it was leased once, and that doesn't count"


# --- scripts of two releases


def lease(redis: Redis, release: str, worker: str, want: int = 128) -> list[LeasedJob]:
    call_id = secrets.token_hex(7)
    if release == "former":
        return former.lease(redis, worker=worker, want=want, call_id=call_id)
    admission = Admission(documents=want)
    return scripts.lease(
        redis, QUEUE, worker=worker, model="sim", admission=admission, lease_ttl=60, call_id=call_id
    ).jobs


def finish(redis: Redis, release: str, worker: str, jobs: Sequence[LeasedJob], kind: str = "S") -> list[str]:
    status = Status.SUCCEEDED if kind == "S" else Status.FAILED
    words: list[str] = []
    for job in jobs:
        result = IngestResult(document_id=worker, job_id=job.job_id, status=status, worker=worker).to_json()
        if release == "former":
            words += former.finish(redis, worker, [job], kind, result)
        else:
            exception = "" if kind == "S" else "EngineError: no"
            item = Finish(job=job, kind=kind, ttl=3600, result_json=result, exception=exception)
            words += scripts.finish(redis, QUEUE, worker=worker, model="sim", finishes=[item])
    return words


def hand_back(redis: Redis, release: str, members: Sequence[str] = (), *, crash: bool = False) -> tuple[int, int, int]:
    if release == "former":
        return former.hand_back(redis, members, max_attempts=3 if crash else 0)
    done = scripts.hand_back(redis, QUEUE, members=members, failure_ttl=3600, max_crashes=3 if crash else 0, reason="-")
    return done.queued, done.dead_lettered, done.lost


def expire(redis: Redis) -> None:
    members = redis.zrange(keys.started(QUEUE), 0, -1)
    redis.zadd(keys.started(QUEUE), dict.fromkeys(members, 1.0))


def drain(redis: Redis, release: str) -> None:
    while jobs := lease(redis, release, "last"):
        finish(redis, release, "last", jobs)


def assert_one_row_each(redis: Redis, job_ids: Sequence[str]) -> list[IngestResult]:
    scripts.touch_group(redis, "g", queue=QUEUE, group_ttl=3600, seal=True)
    given = list(iter_results("g", connection=redis, timeout=30))
    assert sorted(result.job_id for result in given) == sorted(job_ids)
    assert redis.xlen(keys.group_done("g")) == len(job_ids)
    assert [len(rq_job(redis, name).results()) for name in job_ids] == [1] * len(job_ids)
    registered = [name for key in (keys.finished(QUEUE), keys.failed(QUEUE)) for name in redis.zrange(key, 0, -1)]
    assert sorted(registered) == sorted(name.encode() for name in job_ids)
    for key in (keys.queue(QUEUE), keys.started(QUEUE), keys.scheduled(QUEUE)):
        assert not redis.exists(key), key
    scripts.recount(redis, QUEUE)
    assert not redis.exists(keys.kv_tokens()), "what the release before left reserved is counted anew"
    assert not redis.keys("rq:execution*")
    assert not redis.keys("rq:worker:*:executions")
    return given


End = Callable[[Redis, str, list[LeasedJob]], None]


def finishes(redis: Redis, release: str, jobs: list[LeasedJob]) -> None:
    assert finish(redis, release, "a", jobs[:2]) == ["finished"] * 2
    assert finish(redis, release, "a", jobs[2:4], "P") == ["failed"] * 2
    assert finish(redis, release, "a", jobs[4:], "F") == ["queued"] * (len(jobs) - 4)  # RQ's Retry


def hands_back(redis: Redis, release: str, jobs: list[LeasedJob]) -> None:
    assert hand_back(redis, release, [job.member for job in jobs]) == (len(jobs), 0, 0)
    assert {redis.hget(keys.job(job.job_id), "attempts") for job in jobs} == {b"0"}
    assert redis.lrange(keys.queue(QUEUE), 0, -1) == [job.job_id.encode() for job in jobs]
    assert set(finish(redis, release, "a", jobs)) == {"fenced"}


def takes_over(redis: Redis, release: str, jobs: list[LeasedJob]) -> None:
    expire(redis)
    assert hand_back(redis, release, crash=True) == (len(jobs), 0, 0)
    assert redis.lrange(keys.queue(QUEUE), 0, -1) == [job.job_id.encode() for job in jobs]
    assert set(finish(redis, release, "a", jobs)) == {"fenced"}


def renews(redis: Redis, release: str, jobs: list[LeasedJob]) -> None:
    expire(redis)
    if release == "former":
        assert former.renew(redis, "a", [job.member for job in jobs]) == []
    else:
        scripts.renew(redis, [QUEUE], worker="a", incarnation="i", lease_ttl=60, worker_ttl=480)
    assert hand_back(redis, "former") == hand_back(redis, "this") == (0, 0, 0), "neither finds an expired one"
    assert finish(redis, release, "a", jobs) == ["finished"] * len(jobs)


@pytest.mark.parametrize("end", [finishes, hands_back, takes_over, renews])
@pytest.mark.parametrize(
    ("producer", "leaser", "ender"),
    [
        ("former", "former", "this"),
        ("this", "this", "former"),
        ("former", "this", "former"),
        ("this", "former", "this"),
    ],
)
def test_what_one_release_leases_another_may_end(
    redis: Redis, producer: str, leaser: str, ender: str, end: End
) -> None:
    requests = [request(number) for number in range(6)]
    if producer == "former":
        job_ids = former.put(redis, requests, group_id="g", retries="1")
    else:
        job_ids = put(redis, requests, group_id="g", retries=1, retry_intervals_json="[]")

    jobs = lease(redis, leaser, "a")
    assert [job.job_id for job in jobs] == job_ids
    end(redis, ender, jobs)
    drain(redis, leaser)

    assert_one_row_each(redis, job_ids)


@pytest.mark.parametrize("first", ["former", "this"])
def test_a_document_that_every_worker_is_lost_with_ends_whoever_counts(redis: Redis, first: str) -> None:
    """The release before counts leases, this one lost workers: either ends it after a few."""
    job_ids = put(redis, [request(0)], group_id="g")
    releases = ["former", "this"] if first == "former" else ["this", "former"]
    for turn in range(6):
        release = releases[turn % 2]
        jobs = lease(redis, release, "a")
        expire(redis)
        if hand_back(redis, release, crash=True) == (0, 1, 0):
            break
        assert len(jobs) == 1
    (result,) = assert_one_row_each(redis, job_ids)
    assert result.error_class == "WorkerLost"


def test_what_the_release_before_leases_and_ends_is_counted_anew(redis: Redis) -> None:
    """It reserves nothing, and releases nothing: until the next count the totals are too high, never too low."""
    put(redis, [request(number) for number in range(4)])
    held = lease(redis, "this", "a", 2)
    lease(redis, "former", "b", 2)
    each = held[0].kv_tokens
    assert each > 0
    assert finish(redis, "former", "a", held[:1]) == ["finished"]
    found = scripts.recount(redis, QUEUE)
    assert (found.kv_tokens_held, found.kv_tokens_counted, found.num_leases) == (2 * each, each, 3)
    assert finish(redis, "this", "a", held[1:]) == ["finished"]
    assert not redis.exists(keys.kv_tokens())


@pytest.mark.parametrize("record", [{"birth": "x"}, {"birth": "x", "death": "x"}])
def test_the_name_of_a_former_releases_worker_is_free_only_once_it_is_dead(redis: Redis, record: dict) -> None:
    """Its record is RQ's alone: alive until RQ forgets it or it has signed off."""
    redis.hset(keys.worker("a"), mapping=record)
    redis.expire(keys.worker("a"), 400)

    seconds = scripts.claim(
        redis, [QUEUE], worker="a", incarnation="i", dead="", lease_ttl=60, worker_ttl=480, record={"birth": "y"}
    )

    assert (seconds > 0) == ("death" not in record)
