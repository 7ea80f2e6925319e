from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue, Retry
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.errors import ProducerLost, QueueUnavailable, ResultTimeout, SettingsError, UnknownGroup
from ingestq.common.schema import IngestRequest, IngestResult, Status, job_id
from ingestq.common.serializer import OrjsonSerializer
from ingestq.common.settings import Settings
from ingestq.producer import Group, IngestQueue, fetch_results, iter_results
from support.hand_worker import document_of, drain, finish, lease, request
from support.processes import wait_until


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis, settings=Settings())


def requests(*document_ids: str) -> list[IngestRequest]:
    return [request(document_id) for document_id in document_ids]


def id_of(document_id: str) -> str:
    return job_id(request(document_id).to_json())


def stock_job(redis: Redis, document_id: str) -> Job:
    return Job.fetch(id_of(document_id), connection=redis, serializer=OrjsonSerializer)


def read(group: Group | str, **options: object) -> list[tuple[str, str]]:
    """Document and status of every row."""
    return [(row.document_id, row.status.value) for row in iter_results(group, **{"timeout": 30, **options})]


def end_one(redis: Redis, kind: str = "S") -> str:
    jobs = lease(redis, 1)
    finish(redis, jobs, kind)
    return document_of(jobs[0])


# --- fetch_results


def test_fetch_gives_rows_in_the_order_asked_for_and_none_for_the_rest(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("a", "b", "c"))
    finish(redis, lease(redis, 1))
    finish(redis, lease(redis, 1), "F")

    rows = fetch_results([id_of("c"), id_of("b"), id_of("a")], connection=redis)

    assert rows[0] is None
    assert [row and (row.document_id, row.status) for row in rows[1:]] == [
        ("b", Status.FAILED),
        ("a", Status.SUCCEEDED),
    ]
    assert rows[1] is not None
    assert (rows[1].error_class, rows[1].error_message) == ("EngineError", "broken")


def test_fetch_of_a_group_follows_the_order_of_submission(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"))
    jobs = lease(redis)
    finish(redis, jobs[1:])
    finish(redis, jobs[:1])

    assert [row and row.document_id for row in fetch_results(group)] == ["a", "b"]
    assert [row and row.document_id for row in fetch_results(group.id, connection=redis)] == ["a", "b"]


def test_fetch_takes_one_round_trip_for_any_number(queue: IngestQueue, redis: Redis) -> None:
    documents = [request(f"d{i}") for i in range(1000)]
    queue.enqueue_many(documents)
    drain(redis)
    job_ids = [job_id(document.to_json()) for document in documents]
    sent = []
    client = Redis.from_url(f"redis://127.0.0.1:{redis.connection_pool.connection_kwargs['port']}")
    connection = client.connection_pool.get_connection()
    original = connection.send_packed_command
    connection.send_packed_command = lambda *args, **kwargs: (sent.append(1), original(*args, **kwargs))[1]
    client.connection_pool.release(connection)

    rows = fetch_results(job_ids, connection=client)

    assert [row and row.job_id for row in rows] == job_ids
    assert len(sent) == 1
    client.close()


def test_fetch_of_nothing_is_nothing(queue: IngestQueue, redis: Redis) -> None:
    assert fetch_results([], connection=redis) == []
    assert fetch_results(queue.enqueue_many([])) == []


def test_fetch_names_what_is_not_in_redis(redis: Redis) -> None:
    (row,) = fetch_results(["0" * 32], connection=redis)

    assert row is not None
    assert (row.status, row.job_id) == (Status.EXPIRED, "0" * 32)
    with pytest.raises(UnknownGroup, match="'nope'"):
        fetch_results("nope", connection=redis)


def test_fetch_names_the_document_of_a_plain_rq_clients_cancelled_job(redis: Redis) -> None:
    plain = Queue("ingest", connection=redis, serializer=JSONSerializer)
    job = plain.enqueue("ingestq.ingest", request("plain", "x" * 5000).model_dump(mode="json", exclude_none=True))
    job.cancel()

    (row,) = fetch_results([job.id], connection=redis)

    assert row is not None
    assert (row.document_id, row.status) == ("plain", Status.CANCELLED)


# --- iter_results


def test_rows_come_in_the_order_in_which_documents_end(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b", "c"))
    jobs = lease(redis)
    for job in reversed(jobs):
        finish(redis, [job])

    assert [document for document, _ in read(group)] == ["c", "b", "a"]


def test_rows_come_while_documents_end(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"))
    rows = iter_results(group, timeout=30)

    assert end_one(redis) == next(rows).document_id
    assert end_one(redis) == next(rows).document_id
    with pytest.raises(StopIteration):
        next(rows)


def when_a_reader_waits(redis: Redis, act: Callable[[], object]) -> threading.Thread:
    def work() -> None:
        wait_until(lambda: redis.info("clients")["blocked_clients"] == 1, "the reader waits")
        act()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_waiting_reader_is_woken_by_a_row(
    queue: IngestQueue, redis: Redis, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestq.producer.results._BLOCK_MS", 3_600_000)  # it doesn't look by itself
    group = queue.enqueue_many(requests("a"))

    worker = when_a_reader_waits(redis, lambda: end_one(redis))

    with Redis.from_url(server.url, socket_timeout=None) as patient:
        assert next(iter_results(group.id, connection=patient)).document_id == "a"
    worker.join()


def test_every_kind_of_end_gives_a_row(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b", "c", "d"))
    for kind in ("S", "F", "X"):
        end_one(redis, kind)
    group.cancel()

    assert read(group) == [("a", "succeeded"), ("b", "failed"), ("c", "stopped"), ("d", "cancelled")]


def test_ten_thousand_rows_come_once_each(queue: IngestQueue, redis: Redis) -> None:
    documents = [f"d{i}" for i in range(10_000)]
    group = queue.enqueue_many(map(request, documents))
    drain(redis)

    assert [document for document, _ in read(group)] == documents


def test_a_dead_letter_without_a_row_tells_its_reason(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))
    members = [job.member for job in lease(redis)]
    scripts.hand_back(redis, "ingest", failure_ttl=1000, members=members, max_crashes=1, reason="gone")

    (row,) = iter_results(group, timeout=30)

    assert (row.document_id, row.status, row.attempts) == ("a", Status.FAILED, 1)
    assert (row.error_class, row.worker) == ("WorkerLost", "hand")
    assert row.error_message is not None
    assert row.error_message.startswith("1 workers were lost while they ran this document; the last: gone")


def test_a_dead_letter_of_stock_rq_tells_its_reason(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))
    (leased,) = lease(redis)
    redis.zadd(keys.started("ingest"), {leased.member: 1})
    StartedJobRegistry("ingest", connection=redis, serializer=OrjsonSerializer).cleanup()

    (row,) = iter_results(group, timeout=30)

    assert (row.document_id, row.status) == ("a", Status.FAILED)
    assert "due to AbandonedJobError" in (row.error_message or "")


def test_a_failure_is_not_read_as_the_success_before_it(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))
    drain(redis)
    redis.hset(keys.job(id_of("a")), "status", "failed")

    (row,) = iter_results(group, timeout=30)

    assert (row.status, row.text) == (Status.FAILED, None)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"{", "EOF"),
        (b'{"document_id": "a", "job_id": "j", "status": "great"}', "status: "),
        (b'{"document_id": "a", "job_id": "j", "status": "succeeded", "colour": 1}', "colour: Extra inputs"),
        (b"\xff\xfe", "no IngestResult"),
    ],
)
def test_a_row_that_can_not_be_read_is_a_failed_one(
    stored: bytes, message: str, queue: IngestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = queue.enqueue_many(requests("a"))
    monkeypatch.setattr(IngestResult, "to_json", lambda self: stored)
    drain(redis)

    (row,) = iter_results(group, timeout=30)

    assert (row.document_id, row.status, row.error_class) == ("a", Status.FAILED, "InvalidResult")
    assert message in (row.error_message or "")


# --- who gets which row


def join_queued(redis: Redis) -> None:
    pass


def join_running(redis: Redis) -> None:
    lease(redis)


def join_finished(redis: Redis) -> None:
    drain(redis)


@pytest.mark.parametrize("state", [join_queued, join_running, join_finished])
def test_a_group_that_joined_a_job_gets_its_row(
    state: Callable[[Redis], None], queue: IngestQueue, redis: Redis
) -> None:
    first = queue.enqueue_many(requests("a"))
    if state is join_running:
        jobs = lease(redis)
        second = queue.enqueue_many(requests("a"))
        finish(redis, jobs)
    else:
        state(redis)
        second = queue.enqueue_many(requests("a"))
        drain(redis)

    assert read(first) == read(second) == [("a", "succeeded")]


def test_cancelling_one_of_two_groups_leaves_the_other_its_row(queue: IngestQueue, redis: Redis) -> None:
    first = queue.enqueue_many(requests("a", "b"))
    second = queue.enqueue_many(requests("b", "c"))

    first.cancel()

    assert sorted(read(first)) == [("a", "cancelled"), ("b", "cancelled")]
    assert sorted(drain(redis)) == ["b", "c"]
    assert sorted(read(second)) == [("b", "succeeded"), ("c", "succeeded")]


def test_a_failed_document_enqueued_again_is_waited_for(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"), group_id="g")
    drain(redis, "F")
    queue.enqueue_many(requests("a"), group_id="g")

    rows = iter_results(group, timeout=0)
    assert next(rows).document_id == "b"
    with pytest.raises(ResultTimeout):
        next(rows)
    drain(redis)

    assert sorted(read(group)) == [("a", "succeeded"), ("b", "failed")]


def test_a_retried_document_has_one_row(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"), retry=Retry(max=1))
    end_one(redis, "F")
    end_one(redis)

    assert read(group) == [("a", "succeeded")]


# --- when it ends


def test_an_empty_sealed_group_ends_at_once(queue: IngestQueue) -> None:
    assert read(queue.enqueue_many([])) == []


def test_an_open_group_is_waited_for(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"), group_id="g", seal=False)
    drain(redis)
    rows = iter_results(group, timeout=30)
    assert next(rows).document_id == "a"

    queue.enqueue_many(requests("b"), group_id="g")
    drain(redis)

    assert [row.document_id for row in rows] == ["b"]


def test_a_lost_producer_is_reported_after_all_its_rows(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"), group_id="g", seal=False)
    redis.hset(keys.group("g"), "seen_ms", (redis.time()[0] - 61) * 1000)
    rows = iter_results(group, timeout=30)
    end_one(redis)
    assert next(rows).document_id == "a"
    worker = threading.Timer(0.2, lambda: end_one(redis))
    worker.start()
    assert next(rows).document_id == "b"

    with pytest.raises(
        ProducerLost, match=r"'g' was never sealed and its producer has been silent for 6\d s; its 2 doc"
    ):
        next(rows)
    worker.join()
    queue.enqueue_many(requests("a", "b", "c"), group_id="g")
    drain(redis)
    assert [row.document_id for row in rows] == ["c"]


def test_an_unknown_group_is_named(redis: Redis) -> None:
    with pytest.raises(UnknownGroup, match="'nope' is not in Redis"):
        next(iter_results("nope", connection=redis))


def test_a_timeout_lists_what_is_outstanding_and_can_be_waited_on(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b", "c"), group_id="g")
    end_one(redis)
    rows = iter_results(group, timeout=0)

    assert next(rows).document_id == "a"
    with pytest.raises(ResultTimeout, match=r"group 'g': 2 documents have no result after 0 s \('b', 'c'\)") as raised:
        next(rows)

    assert (raised.value.outstanding, raised.value.num_outstanding) == (["b", "c"], 2)
    end_one(redis)
    assert next(rows).document_id == "b"


def test_a_timeout_counts_more_than_it_lists(queue: IngestQueue) -> None:
    group = queue.enqueue_many(request(f"d{i}") for i in range(1100))

    with pytest.raises(ResultTimeout) as raised:
        next(iter_results(group, timeout=0))

    assert (len(raised.value.outstanding), raised.value.num_outstanding) == (1000, 1100)


def test_a_timeout_is_kept(queue: IngestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("ingestq.producer.results.monotonic", lambda: clock[0])
    group = queue.enqueue_many(requests("a"))

    hour = when_a_reader_waits(redis, lambda: clock.append(clock.pop() + 3600))

    with pytest.raises(ResultTimeout):
        next(iter_results(group, timeout=3599))
    hour.join()
    assert clock == [3600.0]


# --- cursors


def test_a_cursor_goes_on_after_the_row_returned_last(queue: IngestQueue, redis: Redis) -> None:
    documents = [f"d{i}" for i in range(300)]
    group = queue.enqueue_many(map(request, documents))
    drain(redis)
    seen: list[str] = []
    cursor = None
    while len(seen) < 300:
        rows = iter_results(group, timeout=30, cursor=cursor)
        for row, _ in zip(rows, range(70), strict=False):
            seen.append(row.document_id)
            cursor = rows.cursor

    assert seen == documents
    assert read(group, cursor=cursor) == []


def test_a_row_announced_twice_is_not_repeated_after_a_resume(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"), group_id="g")
    drain(redis)
    rows = iter_results(group, timeout=30)
    next(rows)
    queue.enqueue_many(requests("a", "b"), group_id="g")

    assert read(group, cursor=rows.cursor) == [("b", "succeeded")]


def test_a_row_that_was_passed_over_while_it_ran_again_comes_after_a_resume(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"), group_id="g")
    drain(redis, "F")
    queue.enqueue_many(requests("a"), group_id="g")
    rows = iter_results(group, timeout=0)
    assert next(rows).document_id == "b"
    drain(redis)

    assert read(group, cursor=rows.cursor) == [("a", "succeeded")]


@pytest.mark.parametrize("cursor", ["", "x", "12", "1-1;DEL"])
def test_a_malformed_cursor_is_refused(cursor: str, redis: Redis) -> None:
    with pytest.raises(SettingsError, match="cursor"):
        iter_results("g", connection=redis, cursor=cursor)


# --- what the stream does not tell


def trim(redis: Redis, group: Group) -> None:
    redis.xtrim(keys.group_done(group.id), maxlen=2, approximate=False)


def delete(redis: Redis, group: Group) -> None:
    redis.delete(keys.group_done(group.id))


@pytest.mark.parametrize("lose", [trim, delete])
def test_every_row_comes_though_the_stream_was_lost(
    lose: Callable[[Redis, Group], None], queue: IngestQueue, redis: Redis
) -> None:
    documents = sorted(f"d{i}" for i in range(600))
    group = queue.enqueue_many(map(request, documents))
    drain(redis)

    lose(redis, group)

    assert sorted(document for document, _ in read(group)) == documents
    assert redis.ttl(keys.group_done(group.id)) > 0
    assert sorted(document for document, _ in read(group)) == documents


def test_a_stream_lost_while_it_is_read_costs_no_row(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b", "c"))
    rows = iter_results(group, timeout=30)
    end_one(redis)
    assert next(rows).document_id == "a"
    end_one(redis)
    redis.delete(keys.group_done(group.id))
    end_one(redis)

    assert sorted(row.document_id for row in rows) == ["b", "c"]


def cancel_with_stock_rq(job: Job) -> None:
    job.cancel()


def delete_with_stock_rq(job: Job) -> None:
    job.delete()


@pytest.mark.parametrize(("end", "status"), [(cancel_with_stock_rq, "cancelled"), (delete_with_stock_rq, "expired")])
def test_what_stock_rq_ends_has_a_row(
    end: Callable[[Job], None], status: str, queue: IngestQueue, redis: Redis
) -> None:
    group = queue.enqueue_many(requests("a", "b"))
    end(stock_job(redis, "a"))
    drain(redis)

    assert sorted(read(group)) == [("a", status), ("b", "succeeded")]


def test_what_stock_rq_ends_while_it_is_waited_for_has_a_row(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))

    def cancel() -> None:
        wait_until(lambda: redis.info("clients")["blocked_clients"] == 1, "the reader waits")
        stock_job(redis, "a").cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()

    assert read(group) == [("a", "cancelled")]
    canceller.join()


def test_a_job_requeued_by_stock_rq_is_waited_for(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))
    drain(redis, "F")
    stock_job(redis, "a").requeue()

    with pytest.raises(ResultTimeout):
        next(iter_results(group, timeout=0))
    drain(redis)

    assert read(group) == [("a", "succeeded")]


def test_expired_rows_are_named_and_not_waited_for(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b: with a colon"))
    drain(redis)
    redis.delete(keys.job(id_of("b: with a colon")), keys.results(id_of("b: with a colon")))

    rows = {row.document_id: row for row in iter_results(group, timeout=30)}

    assert rows["a"].status is Status.SUCCEEDED
    assert rows["b: with a colon"].status is Status.EXPIRED
    assert "enqueue the document again" in (rows["b: with a colon"].error_message or "")


def test_a_row_whose_result_alone_expired_is_named_too(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))
    drain(redis)
    redis.delete(keys.results(id_of("a")))

    assert read(group) == [("a", "expired")]


def test_an_expired_row_survives_a_resume(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b"))
    drain(redis)
    redis.delete(keys.job(id_of("a")))
    rows = iter_results(group, timeout=30)
    assert next(rows).document_id == "b"

    assert read(group, cursor=rows.cursor) == [("a", "expired")]


def test_sweeps_take_a_small_share_of_the_time(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(request(f"d{i}") for i in range(3000))
    redis.config_resetstat()

    with pytest.raises(ResultTimeout):
        next(iter_results(group, timeout=4))

    # Six pages a walk: at the start, then not before 2 s.
    calls = redis.info("commandstats")["cmdstat_zrange"]["calls"]
    assert calls <= 3 * 7


# --- Redis in trouble


def test_a_reader_outlives_a_restart_of_redis(tmp_path: Path) -> None:
    with EmbeddedServer(directory=tmp_path, appendfsync="always") as server:
        redis = Redis.from_url(server.url)
        queue = IngestQueue("ingest", connection=redis, settings=Settings())
        group = queue.enqueue_many(requests("a", "b"))
        rows = iter_results(group, timeout=60)
        end_one(redis)
        assert next(rows).document_id == "a"

        def restart() -> None:
            server.kill()
            time.sleep(0.5)
            server.start()
            with Redis.from_url(server.url) as client:
                end_one(client)

        restarter = threading.Thread(target=restart)
        restarter.start()

        assert [row.document_id for row in rows] == ["b"]
        restarter.join()
        redis.close()


def test_a_reader_gives_up_at_its_timeout_and_names_its_cursor(tmp_path: Path) -> None:
    with EmbeddedServer(directory=tmp_path) as server:
        redis = Redis.from_url(server.url, retry=None)
        queue = IngestQueue("ingest", connection=redis, settings=Settings())
        rows = iter_results(queue.enqueue_many(requests("a", "b"), group_id="g"), timeout=1)
        end_one(redis)
        next(rows)
        server.kill()

        with pytest.raises(QueueUnavailable, match=rf"group 'g' can be read on from cursor '{rows.cursor}'"):
            next(rows)
        redis.close()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    wait_until(
        lambda: not any(thread.name == "ingestq-producer-alive" for thread in threading.enumerate()),
        "the producers' threads have ended",
    )
