"""A reader that may not write: by its permissions, on a replica, on a full server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq.job import Job

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.schema import job_id
from ingestq.common.serializer import OrjsonSerializer
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue, QueueRefused, fetch_results, iter_results, list_failed
from support.hand_worker import drain, finish, lease, request
from support.jobs import contents
from support.processes import run, wait_until


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis, settings=Settings())


@pytest.fixture
def reader_url(server: EmbeddedServer, redis: Redis) -> Iterator[str]:
    rules = ("on", ">pw", "resetkeys", "%R~rq:*", "+@read", "+eval_ro", "+time", "+ping")
    redis.execute_command("ACL", "SETUSER", "reader", *rules)
    redis.acl_log_reset()
    yield f"redis://reader:pw@127.0.0.1:{server.port}/0"
    redis.acl_deluser("reader")


@pytest.fixture
def reader(reader_url: str) -> Iterator[Redis]:
    client = Redis.from_url(reader_url)
    yield client
    client.close()


def id_of(document_id: str) -> str:
    return job_id(request(document_id).to_json())


def delete_with_stock_rq(redis: Redis, document_id: str) -> None:
    Job.fetch(id_of(document_id), connection=redis, serializer=OrjsonSerializer).delete()


def read(queue: IngestQueue, reader: Redis, **options: object) -> list[tuple[str, str]]:
    return [(row.document_id, row.status) for row in iter_results("g", connection=reader, timeout=60, **options)]


def test_every_row_comes_to_a_reader_that_may_not_write(queue: IngestQueue, redis: Redis, reader: Redis) -> None:
    queue.enqueue_many([request(name) for name in "abcd"], group_id="g")
    a, b, *_ = lease(redis, 2)
    finish(redis, [a])
    finish(redis, [b], "P")
    delete_with_stock_rq(redis, "c")
    queue.group("g").cancel()
    before = contents(redis)

    rows = read(queue, reader)

    assert rows[:2] == [("a", "succeeded"), ("b", "failed")]
    assert sorted(rows[2:]) == [("c", "expired"), ("d", "cancelled")]
    assert contents(redis) == before
    assert [row and row.status for row in fetch_results("g", connection=reader)] == [
        "succeeded",
        "failed",
        "expired",
        "cancelled",
    ]


def test_what_it_noted_for_itself_may_come_again_after_a_resume_but_nothing_is_left_out(
    queue: IngestQueue, redis: Redis, reader: Redis
) -> None:
    queue.enqueue_many([request(name) for name in "abc"], group_id="g")
    delete_with_stock_rq(redis, "b")
    rows = iter_results("g", connection=reader, timeout=60)
    assert next(rows).document_id == "b"
    drain(redis)
    assert [row.document_id for row in rows] == ["a", "c"]

    assert read(queue, reader, cursor=rows.cursor) == [("b", "expired")]
    assert read(queue, redis) == [("a", "succeeded"), ("c", "succeeded"), ("b", "expired")]


def test_a_document_that_runs_again_is_not_lost_to_a_resume(queue: IngestQueue, redis: Redis, reader: Redis) -> None:
    """The entry of its first end stays in the stream: cursors stay before it."""
    queue.enqueue_many([request(name) for name in "abc"], group_id="g")
    a, b, c = lease(redis)
    finish(redis, [a])
    finish(redis, [b], "P")
    finish(redis, [c])
    queue.enqueue_many([request("b")], group_id="g")
    rows = iter_results("g", connection=reader, timeout=60)
    assert [next(rows).document_id for _ in range(2)] == ["a", "c"]
    drain(redis)

    assert read(queue, reader, cursor=rows.cursor) == [("c", "succeeded"), ("b", "succeeded")]
    assert [row.document_id for row in rows] == ["b"]


def test_the_reading_commands_need_no_more(queue: IngestQueue, redis: Redis, reader_url: str, tmp_path: Path) -> None:
    queue.enqueue_many([request(name) for name in "ab"], group_id="g")
    drain(redis, "P")
    delete_with_stock_rq(redis, "a")

    for arguments, code in (
        (("results", "g", "--follow", "-o", str(tmp_path / "rows.jsonl")), 1),
        (("results", "g"), 3),  # without waiting, a sweep is not waited for
        (("status",), 0),
        (("status", "g", "--json"), 0),
        (("limits",), 0),
        (("why", id_of("b")), 0),
        (("failed", "list"), 0),
        (("failed", "show", id_of("b")), 0),
    ):
        done = run("ingestq", *arguments, url=reader_url)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_what_a_reader_may_not_do_is_one_line(queue: IngestQueue, redis: Redis, reader_url: str) -> None:
    queue.enqueue_many([request("a")], group_id="g")
    drain(redis, "P")
    before = contents(redis)

    for arguments in (("failed", "retry", "--all"), ("cancel", "g"), ("enqueue", "-", "--model", "m")):
        done = run("ingestq", *arguments, url=reader_url, input='{"text": "a"}\n')
        assert done.returncode == 4
        assert "give it those of its role in deploy/users.acl" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert contents(redis) == before


def test_a_replica_will_do_for_reading(server_binary: str | None, server: EmbeddedServer, redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings())
    queue.enqueue_many([request(name) for name in "ab"], group_id="g")
    drain(redis)
    queue.enqueue(request("failed"))
    drain(redis, "P")
    delete_with_stock_rq(redis, "b")
    redis.config_set("repl-diskless-sync-delay", 0)
    with EmbeddedServer(server_binary, replicaof=f"127.0.0.1 {server.port}") as replica:
        client = Redis.from_url(replica.url)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica has the data")

        assert read(queue, client) == [("a", "succeeded"), ("b", "expired")]
        mirror = IngestQueue("ingest", connection=client, settings=Settings())
        assert [document.row.document_id for document in list_failed(mirror)] == ["failed"]


def test_a_full_server_will_do_for_reading(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many([request(name) for name in "ab"], group_id="g")
    drain(redis)
    delete_with_stock_rq(redis, "b")
    redis.config_set("maxmemory", "1")
    try:
        assert read(queue, redis) == [("a", "succeeded"), ("b", "expired")]
    finally:
        redis.config_set("maxmemory", "0")


def test_a_reader_that_may_not_even_read_is_told_so(queue: IngestQueue, redis: Redis, reader: Redis) -> None:
    queue.enqueue_many([request("a")], group_id="g")
    redis.execute_command("ACL", "SETUSER", "reader", "resetkeys", "%R~other:*")

    with pytest.raises(QueueRefused, match=r"lacks a permission.*can be read on from cursor '0-0'"):
        next(iter_results("g", connection=reader, timeout=60))
    assert redis.exists(keys.group("g"))
