"""Failed documents: listed, shown and tried again, by the library, by `ingestq failed` and by `rq requeue`."""

from __future__ import annotations

import subprocess
import tracemalloc
from collections.abc import Callable

import orjson
import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.schema import IngestRequest, job_id
from ingestq.common.serializer import OrjsonSerializer
from ingestq.common.settings import Settings
from ingestq.producer import FailedFilter, IngestQueue, iter_results
from ingestq.producer.failed import list_failed, retry_failed
from support.hand_worker import document_of, drain, finish, lease, request
from support.processes import run as run_command

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis, settings=Settings())


@pytest.fixture
def run(server: EmbeddedServer, redis: Redis) -> Run:
    return lambda *arguments: run_command("ingestq", "failed", *arguments, url=server.url)


def id_of(document_id: str) -> str:
    return job_id(request(document_id).to_json())


def fail(queue: IngestQueue, redis: Redis, *document_ids: str, group: str | None = None, kind: str = "P") -> None:
    queue.enqueue_many([request(document_id) for document_id in document_ids], group_id=group)
    drain(redis, kind)


def lose_worker(redis: Redis, *, max_crashes: int) -> None:
    """Leases everything and loses the worker that did."""
    members = [job.member for job in lease(redis)]
    scripts.hand_back(
        redis, "ingest", members=members, failure_ttl=1000, max_crashes=max_crashes, reason="killed by SIGSEGV"
    )


def names(queue: IngestQueue, **which: object) -> list[str]:
    return [document.row.document_id for document in list_failed(queue, FailedFilter(**which))]


def make_older(redis: Redis, document_id: str, seconds: int) -> None:
    """Moves the row of a failed document into the past."""
    results = keys.results(id_of(document_id))
    (entry, fields), *_ = redis.xrevrange(results, count=1)
    redis.delete(results)
    redis.xadd(results, fields, id=f"{int(entry.partition(b'-')[0]) - seconds * 1000}-0")


# --- list


def test_failed_and_stopped_documents_are_listed_with_their_reasons(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "broken", group="g")
    fail(queue, redis, "stopped", kind="X")
    fail(queue, redis, "fine", kind="S")
    queue.enqueue(request("poison"))
    lose_worker(redis, max_crashes=1)

    found = {document.row.document_id: document for document in list_failed(queue)}

    assert set(found) == {"broken", "stopped", "poison"}
    assert found["broken"].row.error_message == "broken"
    assert (found["broken"].groups, found["poison"].groups) == (("g",), ())
    assert (found["poison"].row.error_class, found["poison"].crashes) == ("WorkerLost", 1)
    assert "killed by SIGSEGV" in (found["poison"].row.error_message or "")


def test_filters_choose_by_group_error_class_and_age(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a", "b", group="first")
    fail(queue, redis, "c", group="second")
    queue.enqueue_many([request("d")], group_id="second")
    lose_worker(redis, max_crashes=1)
    make_older(redis, "b", 7200)

    assert names(queue, group="first") == ["a", "b"]
    assert names(queue, group="firs") == []
    assert names(queue, error_class="WorkerLost") == ["d"]
    assert names(queue, group="second", error_class="EngineError") == ["c"]
    assert names(queue, older_than=3600) == ["b"]
    assert sorted(names(queue, newer_than=3600)) == ["a", "c", "d"]
    assert [document.row.document_id for document in list_failed(queue, limit=2)] == ["a", "b"]


def test_ages_are_judged_by_redis_clock(queue: IngestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose clock is a day off doesn't change what "an hour ago" is."""
    monkeypatch.setattr(scripts, "now_iso", lambda: "2001-01-01T00:00:00.000000Z")
    fail(queue, redis, "a")

    assert names(queue, newer_than=3600) == ["a"]


def test_other_queues_failures_are_not_listed(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a")
    other = IngestQueue("other", connection=redis, settings=Settings())

    assert list(list_failed(other)) == []
    redis.zadd(keys.failed("other"), {id_of("a"): 2e10})  # as somebody might write
    assert list(list_failed(other)) == []
    assert retry_failed(other, [id_of("a")]) == 0


def test_whatever_is_in_the_registry_the_rest_is_listed(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a", "b", "c")
    redis.zadd(keys.failed("ingest"), {"gone": 1, "text": 2, b"\xff\xfe": 3})
    redis.set(keys.job("text"), "no hash")
    redis.hset(keys.job(id_of("b")), mapping={"crashes": "many", "groups": b"\xff"})
    redis.delete(keys.results(id_of("c")))
    redis.set(keys.results(id_of("c")), "no stream")

    assert sorted(names(queue)) == ["a", "b", "c"]


def test_a_job_of_a_plain_rq_client_is_listed_without_its_text(queue: IngestQueue, redis: Redis, run: Run) -> None:
    """RQ's description of it is the whole call."""
    plain = {"document_id": "p", "text": "a secret text", "model": "m"}
    job = Queue("ingest", connection=redis, serializer=JSONSerializer).enqueue("ingestq.ingest", plain)
    scripts.adopt(redis, "ingest", [scripts.JobNeeds(job.id, "m", 1)])
    lose_worker(redis, max_crashes=1)

    assert names(queue) == ["p"]
    assert "secret" not in run("list").stdout + run("show", job.id).stdout
    assert retry_failed(queue) == 1
    assert drain(redis) == ["p"]


# --- retry


def test_a_retried_document_has_all_its_attempts_again_and_one_row(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many([request("a")], group_id="g")
    lose_worker(redis, max_crashes=2)
    lose_worker(redis, max_crashes=2)
    assert (redis.hget(keys.job(id_of("a")), "crashes"), names(queue)) == (b"2", ["a"])

    assert retry_failed(queue) == 1

    assert (names(queue), redis.ttl(keys.job(id_of("a"))), group.counts()["queued"]) == ([], -1, 1)
    (job,) = lease(redis)
    assert (job.attempts, job.crashes) == (1, 0)
    finish(redis, [job])
    assert [(row.document_id, row.status, row.attempts) for row in iter_results(group, timeout=60)] == [
        ("a", "succeeded", 1)
    ]


def test_a_reader_that_comes_before_the_second_end_waits_for_it(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a", "b", group="g")
    retry_failed(queue, [id_of("a")])

    rows = iter_results(queue.group("g"), timeout=60)
    first = next(rows)
    drain(redis)

    assert [(row.document_id, row.status) for row in (first, *rows)] == [("b", "failed"), ("a", "succeeded")]


def test_a_reader_that_has_the_failed_row_gets_no_second(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a", group="g")
    reader = iter_results(queue.group("g"), timeout=60)
    assert next(reader).status == "failed"
    retry_failed(queue)
    drain(redis)

    assert list(reader) == []
    assert list(iter_results(queue.group("g"), timeout=60, cursor=reader.cursor)) == []
    assert [row.status for row in iter_results(queue.group("g"), timeout=60)] == ["succeeded"]


def test_a_retried_job_wakes_an_idle_worker_and_is_seen_by_rq(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a")
    redis.delete(keys.wake("ingest", "m"))
    redis.srem(keys.queues(), keys.queue("ingest"))

    retry_failed(queue)

    assert redis.llen(keys.wake("ingest", "m")) == 1
    assert [name.name for name in Queue.all(connection=redis)] == ["ingest"]
    job = Job.fetch(id_of("a"), connection=redis, serializer=OrjsonSerializer)
    assert (job.get_status(), job.ended_at, job.started_at) == ("queued", None, None)
    assert FailedJobRegistry("ingest", connection=redis).count == 0


def test_only_what_is_chosen_is_retried(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a", "b", "c", group="g")
    fail(queue, redis, "d")

    assert retry_failed(queue, FailedFilter(group="g"), limit=2) == 2
    assert drain(redis) == ["a", "b"]
    assert retry_failed(queue, FailedFilter(group="g")) == 1
    assert names(queue) == ["d"]


def test_what_can_not_be_run_again_is_left_with_a_reason(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "broken", "good")
    fail(queue, redis, "done", kind="S")
    queue.enqueue(request("queued"))
    redis.hset(keys.job(id_of("broken")), "data", b'["os.system",null,["true"],{}]')
    left: dict[str, str] = {}
    ids = [id_of("broken"), id_of("good"), id_of("done"), id_of("queued"), "no-such-job", id_of("good")]

    assert retry_failed(queue, ids, on_left=left.__setitem__) == 1

    assert left == {
        id_of("broken"): "it can't be run again: function 'os.system' is not served here; this worker runs "
        "'ingestq.ingest' only",
        id_of("done"): "it is not failed but finished",
        id_of("queued"): "it is not failed but queued",
        "no-such-job": "it is not in Redis",
    }
    assert names(queue) == ["broken"]
    assert drain(redis) == ["queued", "good"]


def test_what_fails_again_meanwhile_is_left_for_the_next_call(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, *(f"d{i}" for i in range(2 * scripts.CHUNK)))
    original, calls = scripts.retry, []

    def retry_and_fail_again(*arguments: object, **options: object) -> list[bool]:
        calls.append(arguments)
        assert len(calls) < 10
        retried = original(*arguments, **options)
        drain(redis, "P")
        return retried

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "retry", retry_and_fail_again)
        assert retry_failed(queue) == 2 * scripts.CHUNK
    assert len(names(queue)) == 2 * scripts.CHUNK


def test_a_lost_answer_is_not_taken_for_a_lost_retry(queue: IngestQueue, redis: Redis) -> None:
    fail(queue, redis, "a", "b")
    stamp = scripts.now_iso()

    assert scripts.retry(redis, "ingest", [id_of("a")], stamp=stamp) == [True]
    assert scripts.retry(redis, "ingest", [id_of("a"), id_of("b")], stamp=stamp) == [True, True]
    assert scripts.retry(redis, "ingest", [id_of("a")], stamp="later") == [False]
    assert drain(redis) == ["a", "b"]


def make_failures(redis: Redis, number: int) -> None:
    """Failed jobs as the scripts leave them, without their detour."""
    now = redis.time()[0]
    for start in range(0, number, 2000):
        with redis.pipeline(transaction=False) as pipeline:
            for i in range(start, min(start + 2000, number)):
                item: IngestRequest = request(f"d{i}")
                name = f"{i:032x}"
                data = b'["ingestq.ingest",null,[' + item.to_json() + b"],{}]"
                fields = {"status": "failed", "origin": "ingest", "data": data, "model": "m", "groups": "(lone)"}
                pipeline.hset(keys.job(name), mapping={**fields, "description": item.document_id})
                exception = scripts.pack_exception("WorkerLost: gone")
                pipeline.xadd(keys.results(name), {"type": 2, "exc_string": exception})
                pipeline.zadd(keys.failed("ingest"), {name: now + 1000 + i // 500})
            pipeline.execute()


def test_a_large_registry_is_streamed_with_flat_memory_and_short_calls(
    queue: IngestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = scripts.retry
    monkeypatch.setattr(
        scripts, "retry", lambda *args, **options: sizes.append(len(args[2])) or original(*args, **options)
    )

    def peak_of(number: int) -> int:
        redis.flushall()
        make_failures(redis, number)
        tracemalloc.start()
        listed = sum(1 for _ in list_failed(queue))
        retried = retry_failed(queue)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (listed, retried, redis.llen(keys.queue("ingest"))) == (number, number, number)
        return peak

    peak_of(200)  # imports and caches
    assert peak_of(4000) < 2 * peak_of(500)
    assert max(sizes) <= scripts.CHUNK


# --- rq requeue


def test_rq_requeue_gives_all_attempts_again(queue: IngestQueue, redis: Redis, server: EmbeddedServer) -> None:
    queue.enqueue(request("a"))
    lose_worker(redis, max_crashes=2)
    lose_worker(redis, max_crashes=2)
    assert names(queue) == ["a"]

    requeued = run_command("rq", "requeue", "--queue", "ingest", id_of("a"), url=server.url)

    assert requeued.returncode == 0, requeued.stderr
    (job,) = lease(redis)
    assert (job.attempts, job.crashes, document_of(job)) == (1, 0, "a")


# --- the command


def test_list_prints_one_line_a_document(queue: IngestQueue, redis: Redis, run: Run) -> None:
    fail(queue, redis, "a", "b\u202e\u200b")
    make_older(redis, "a", 7200)

    done = run("list")

    assert done.returncode == 0, done.stderr
    first, second = sorted(done.stdout.splitlines(), key=lambda line: "2h ago" not in line)
    assert first == f"{id_of('a')}  2h ago  attempts 1  a  EngineError: broken"
    assert r"b\u202e\u200b" in second
    assert run("list", "--older-than", "1h", "--error-class", "EngineError").stdout.splitlines() == [first]
    assert run("list", "--group", "none").stdout == ""


def test_show_and_list_have_the_whole_row_as_json(queue: IngestQueue, redis: Redis, run: Run) -> None:
    fail(queue, redis, "a", group="g")

    listed, shown = run("list", "--json"), run("show", id_of("a"), "no-such-job", "--json")

    assert (listed.returncode, shown.returncode) == (0, 1)
    assert listed.stdout == shown.stdout
    row = orjson.loads(listed.stdout)
    assert (row["job_id"], row["error_message"], row["groups"], row["crashes"]) == (id_of("a"), "broken", ["g"], 0)
    assert row["failed_at"].startswith("20")
    assert shown.stderr == "job no-such-job: not a failed one of this queue\n"
    assert "error_message: broken\n" in run("show", id_of("a")).stdout


def test_retry_by_command(queue: IngestQueue, redis: Redis, run: Run) -> None:
    fail(queue, redis, "a", "b", group="g")
    fail(queue, redis, "c")

    by_id = run("retry", id_of("c"), id_of("x"))
    assert (by_id.returncode, by_id.stderr.splitlines()) == (
        1,
        [f"left: job {id_of('x')}: it is not in Redis", "1 queued again, 1 left"],
    )
    by_group = run("retry", "--group", "g")
    assert (by_group.returncode, by_group.stderr) == (0, "2 queued again, 0 left\n")
    assert run("retry", "--all").stderr == "0 queued again, 0 left\n"
    assert drain(redis) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retry",), "name jobs, or choose by options, or say --all"),
        (("retry", "a", "--all"), "name jobs"),
        (("retry", "a", "--group", "g"), "name jobs"),
        (("list", "--older-than", "soon"), "'soon' is not an age like 90, 30m, 12h or 7d"),
        (("list", "--group", "a b"), "group 'a b'"),
        (("show",), "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)

    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


def test_a_full_redis_retries_nothing_and_says_so(queue: IngestQueue, redis: Redis, run: Run) -> None:
    fail(queue, redis, "a")
    redis.config_set("maxmemory", "1")
    try:
        done = run("retry", "--all")
    finally:
        redis.config_set("maxmemory", "0")

    assert done.returncode == 4
    assert "raise maxmemory" in done.stderr
    assert names(queue) == ["a"]
