"""INGEST_DURABILITY, shown by killing servers with and without it.

What kill -9 takes from a server: Redis writes its append-only file before it answers, and what was written outlives
the process (not the machine: that is what the fsync of WAITAOF adds, and no test here pulls a plug). So a killed server
with an append-only file in working order has everything, whatever the setting. Lost is what no file or replica had
been given: with the append-only file off, or still being made (`CONFIG SET appendonly yes` takes as long as the data is
large), or with the replica that is promoted out of reach.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from os import kill
from pathlib import Path

import pytest
from redis import Redis

from ingestq.common import durability, keys
from ingestq.common.connections import sibling
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.errors import NotDurable
from ingestq.common.schema import IngestRequest, job_id
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue
from support.hand_worker import drain, request
from support.processes import run, wait_until

DOCUMENTS = [request(f"d{i}") for i in range(300)]
NAMES = [document.document_id for document in DOCUMENTS]


def queue_on(server: EmbeddedServer, setting: str) -> IngestQueue:
    # A client that retries nothing by itself: what is tried again here is ours.
    connection = sibling(Redis.from_url(server.url))
    return IngestQueue("ingest", connection=connection, settings=Settings(durability=setting))


def queued(server: EmbeddedServer) -> int:
    return int(Redis.from_url(server.url).llen(keys.queue("ingest")))


def has_waitaof(server: EmbeddedServer) -> bool:
    return b"waitaof" in Redis.from_url(server.url).command_list()


@pytest.fixture
def master(server_binary: str | None) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(server_binary, repl_diskless_sync_delay=0) as running:
        yield running


@pytest.fixture
def replica(server_binary: str | None, master: EmbeddedServer) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(server_binary, replicaof=f"127.0.0.1 {master.port}") as running:
        wait_until(lambda: linked(running, master), "the replica has its master's data")
        yield running


def linked(replica: EmbeddedServer, master: EmbeddedServer) -> bool:
    """By what both say: a replica calls its link up a little before its master counts it in."""
    info = Redis.from_url(master.url).info("replication")
    replica_info = Redis.from_url(replica.url).info("replication")
    return (
        replica_info["master_link_status"] == "up"
        and info["connected_slaves"] == 1
        and info["slave0"]["state"] == "online"
    )


def promoted(replica: EmbeddedServer) -> Redis:
    redis = Redis.from_url(replica.url)
    redis.replicaof("NO", "ONE")
    return redis


# --- aof


def test_without_an_append_only_file_a_killed_server_loses_what_memory_accepted(
    server_binary: str | None, tmp_path: Path
) -> None:
    with EmbeddedServer(server_binary, directory=tmp_path, appendonly="no") as server:
        assert queue_on(server, "memory").enqueue_many(DOCUMENTS).num_enqueued == len(DOCUMENTS)
        server.kill()
        server.start()

        assert queued(server) == 0


def test_without_an_append_only_file_aof_is_refused_before_anything_is_written(
    server_binary: str | None, tmp_path: Path
) -> None:
    with EmbeddedServer(server_binary, directory=tmp_path, appendonly="no") as server:
        problem = "append-only file is off; set appendonly yes" if has_waitaof(server) else "this server has no WAITAOF"

        with pytest.raises(NotDurable, match=f"INGEST_DURABILITY=aof: .*{problem}.*; 0 documents were acc") as raised:
            queue_on(server, "aof").enqueue_many(DOCUMENTS)
        with pytest.raises(NotDurable, match=problem):
            queue_on(server, "aof").enqueue(request("a"))
        assert raised.value.accepted == []
        assert Redis.from_url(server.url).dbsize() == 0


@pytest.fixture
def beginning(server_binary: str | None, tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server whose append-only file has just been switched on and takes some two seconds to begin."""
    with EmbeddedServer(server_binary, directory=tmp_path, appendonly="no") as server:
        if not has_waitaof(server):
            pytest.skip("the server has no WAITAOF")
        redis = Redis.from_url(server.url)
        redis.mset({f"other:{i}": i for i in range(20)})
        redis.config_set("rdb-key-save-delay", 100_000)  # microseconds
        redis.config_set("appendonly", "yes")
        yield server


def restarted_with_aof(server: EmbeddedServer, server_binary: str | None) -> EmbeddedServer:
    server.kill()
    return EmbeddedServer(server_binary, directory=server.directory)


def test_while_the_append_only_file_begins_a_killed_server_loses_what_memory_accepted(
    server_binary: str | None, beginning: EmbeddedServer
) -> None:
    queue_on(beginning, "memory").enqueue_many(DOCUMENTS)

    with restarted_with_aof(beginning, server_binary) as server:
        assert queued(server) == 0


def test_while_the_append_only_file_begins_aof_waits_and_a_killed_server_has_everything(
    server_binary: str | None, beginning: EmbeddedServer
) -> None:
    queue_on(beginning, "aof").enqueue_many(DOCUMENTS)

    with restarted_with_aof(beginning, server_binary) as server:
        assert drain(Redis.from_url(server.url)) == NAMES


def test_one_document_waits_as_well(server_binary: str | None, beginning: EmbeddedServer) -> None:
    queue_on(beginning, "aof").enqueue(request("a"))

    with restarted_with_aof(beginning, server_binary) as server:
        assert drain(Redis.from_url(server.url)) == ["a"]


def test_a_disk_that_is_never_synced_is_reported_and_the_group_stays_open(
    master: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_waitaof(master):
        pytest.skip("the server has no WAITAOF")
    monkeypatch.setattr(durability, "_WAIT", 0.2)
    redis = Redis.from_url(master.url)
    redis.config_set("appendfsync", "no")
    queue = queue_on(master, "aof")

    with pytest.raises(NotDurable, match="not on Redis' disk; look at its disk and appendfsync") as raised:
        queue.enqueue_many(DOCUMENTS, group_id="g")
    assert raised.value.accepted == []
    assert not queue.group("g").is_sealed
    redis.config_set("appendfsync", "always")
    group = queue.enqueue_many(DOCUMENTS, group_id="g")

    assert (group.num_joined, group.is_sealed) == (len(DOCUMENTS), True)
    assert drain(redis) == NAMES


# --- replica


def test_what_replica_accepted_survives_the_promotion_of_the_replica(
    master: EmbeddedServer, replica: EmbeddedServer
) -> None:
    queue = queue_on(master, "replica")
    queue.enqueue_many(DOCUMENTS[1:], group_id="g")
    queue.enqueue(DOCUMENTS[0])
    master.kill()

    redis = promoted(replica)

    assert queue_on(replica, "memory").group("g").is_sealed
    assert sorted(drain(redis)) == sorted(NAMES)


def test_what_memory_accepted_is_lost_where_the_promoted_replica_was_out_of_reach(
    master: EmbeddedServer, replica: EmbeddedServer
) -> None:
    replica.kill()
    queue_on(master, "memory").enqueue_many(DOCUMENTS)
    master.kill()
    replica.start()

    assert drain(promoted(replica)) == []


def test_without_a_replica_nothing_is_written(master: EmbeddedServer) -> None:
    with pytest.raises(NotDurable, match=r"INGEST_DURABILITY=replica: no replica is online.*; 0 documents") as raised:
        queue_on(master, "replica").enqueue_many(DOCUMENTS)

    assert raised.value.accepted == []
    assert Redis.from_url(master.url).dbsize() == 0


def test_a_replica_that_stops_keeps_the_call_waiting(master: EmbeddedServer, replica: EmbeddedServer) -> None:
    assert replica.pid is not None
    queue = queue_on(master, "replica")
    queue.enqueue(request("before"))
    redis = Redis.from_url(master.url)
    kill(replica.pid, signal.SIGSTOP)
    try:
        call = threading.Thread(target=queue.enqueue_many, args=(DOCUMENTS,), kwargs={"group_id": "g"})
        call.start()
        wait_until(lambda: redis.hexists(keys.group("g"), "sealed_ms"), "the master has everything")
        call.join(0.2)
        assert call.is_alive()
    finally:
        kill(replica.pid, signal.SIGCONT)
    call.join(60)
    master.kill()

    assert drain(promoted(replica)) == ["before", *NAMES]


def test_what_was_sent_on_another_connection_is_waited_for(master: EmbeddedServer, replica: EmbeddedServer) -> None:
    """Documents go by a connection of their own; the one that asks has written nothing since it opened the group."""
    assert replica.pid is not None
    redis = Redis.from_url(master.url)

    def has_acknowledged_all() -> bool:
        info = redis.info("replication")
        return bool(info["slave0"]["offset"] == info["master_repl_offset"])

    def source() -> Iterator[IngestRequest]:
        wait_until(lambda: Redis.from_url(replica.url).exists(keys.group("g")), "the replica has the open group")
        wait_until(has_acknowledged_all, "and has said so")
        kill(replica.pid, signal.SIGSTOP)
        yield from DOCUMENTS[:256]  # two full chunks

    options = {"group_id": "g", "seal": False}
    call = threading.Thread(target=queue_on(master, "replica").enqueue_many, args=(source(),), kwargs=options)
    call.start()
    try:
        wait_until(lambda: queued(master) == 256, "the master has everything")
        call.join(0.2)
        assert call.is_alive()
    finally:
        kill(replica.pid, signal.SIGCONT)
    call.join(60)
    master.kill()

    assert drain(promoted(replica)) == NAMES[:256]


def test_a_replica_lost_midway_is_reported_and_the_same_call_completes_later(
    master: EmbeddedServer, replica: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "_WAIT", 2.0)
    monkeypatch.setattr("ingestq.producer.queue._CONFIRM_EVERY", 0.0)
    queue = queue_on(master, "replica")

    def source() -> Iterator[IngestRequest]:
        for i, document in enumerate(DOCUMENTS):
            if i == 257:  # two chunks are under way, the first of them confirmed
                replica.kill()
            yield document

    with pytest.raises(NotDurable, match=r"not on a replica.*; 128 documents were accepted before that") as raised:
        queue.enqueue_many(source(), group_id="g")
    assert raised.value.accepted == [job_id(document.to_json()) for document in DOCUMENTS[:128]]
    replica.start()
    wait_until(lambda: linked(replica, master), "the replica is back")
    queue.enqueue_many(DOCUMENTS, group_id="g")
    master.kill()

    assert drain(promoted(replica)) == NAMES


def test_a_server_that_restarted_midway_is_not_believed(
    master: EmbeddedServer, replica: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have lost its last second, and would confirm what it has left."""
    monkeypatch.setattr(durability, "_WAIT", 2.0)
    queue = queue_on(master, "replica")

    def source() -> Iterator[IngestRequest]:
        for i, document in enumerate(DOCUMENTS):
            if i == 200:
                master.kill()
                master.start()
            yield document

    with pytest.raises(NotDurable, match=r"restarted or failed over meanwhile.*; 0 documents"):
        queue.enqueue_many(source(), group_id="g")
    wait_until(lambda: linked(replica, master), "the replica is back")

    assert queue.enqueue_many(DOCUMENTS, group_id="g").num_members == len(DOCUMENTS)
    assert sorted(drain(Redis.from_url(master.url))) == sorted(NAMES)


def test_a_dropped_connection_is_healed(master: EmbeddedServer, replica: EmbeddedServer) -> None:
    redis = Redis.from_url(master.url)

    def source() -> Iterator[IngestRequest]:
        for i, document in enumerate(DOCUMENTS):
            if i % 100 == 50:
                redis.client_kill_filter(_type="normal", skipme=True)
            yield document
        redis.client_kill_filter(_type="normal", skipme=True)

    assert queue_on(master, "replica").enqueue_many(source(), group_id="g").num_members == len(DOCUMENTS)


# --- both


def test_the_setting_reaches_the_command_line(master: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A document.")
    command = ("ingestq", "enqueue", str(tmp_path / "a.txt"), "--model", "m")

    refused = run(*command, url=master.url, settings={"INGEST_DURABILITY": "replica"})

    assert refused.returncode == 4
    assert refused.stderr.splitlines()[-1].startswith("ingestq: INGEST_DURABILITY=replica: no replica is online")
    assert queued(master) == 0
    assert run(*command, url=master.url).returncode == 0


def test_a_full_server_still_tells_what_it_has_accepted(master: EmbeddedServer, replica: EmbeddedServer) -> None:
    redis = Redis.from_url(master.url)
    queue = queue_on(master, "replica")

    def source() -> Iterator[IngestRequest]:
        for i, document in enumerate(DOCUMENTS):
            if i == 200:
                wait_until(lambda: queued(master) == 128, "the chunk that is under way has arrived")
                redis.config_set("maxmemory", 1)
            yield document

    with pytest.raises(Exception, match="raise maxmemory; 128 documents were accepted") as raised:
        queue.enqueue_many(source(), group_id="g")
    assert len(raised.value.accepted) == 128
