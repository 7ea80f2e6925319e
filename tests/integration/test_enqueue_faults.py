"""Redis in trouble in the middle of an enqueue: one clear error, which says what was accepted and what to do; then the
same call again completes the rest, each document once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.connections import sibling
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.errors import QueueRefused, QueueUnavailable
from ingestq.common.schema import IngestRequest, job_id
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue
from support.hand_worker import drain, request
from support.processes import run, wait_until

DOCUMENTS = [request(f"d{i}") for i in range(300)]
NAMES = [document.document_id for document in DOCUMENTS]
JOB_IDS = [job_id(document.to_json()) for document in DOCUMENTS]


class Fault:
    """Something that happens to a server, until it is healed."""

    kind: type[QueueUnavailable] = QueueRefused
    # What the error says, as a regular expression.
    message: str

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        # A connection of its own, which outlives the loss of permissions.
        self.admin = Redis.from_url(server.url)
        self.admin.ping()

    def strike(self) -> None:
        raise NotImplementedError

    def heal(self) -> None:
        raise NotImplementedError


class Killed(Fault):
    kind = QueueUnavailable
    message = r"is Redis running, and can it be reached from here\?"

    def strike(self) -> None:
        self.server.kill()

    def heal(self) -> None:
        self.server.start()


class Full(Fault):
    message = "Redis is full: workers go on and make room; enqueue again when there is some, or raise maxmemory"

    def strike(self) -> None:
        self.admin.config_set("maxmemory", 1)

    def heal(self) -> None:
        self.admin.config_set("maxmemory", 0)


class Demoted(Fault):
    message = "read only replica; this is a replica: set RQ_REDIS_URL or --url to the master"

    def strike(self) -> None:
        self.admin.replicaof("127.0.0.1", "1")

    def heal(self) -> None:
        self.admin.replicaof("NO", "ONE")


class Locked(Fault):
    message = r"set user and password in RQ_REDIS_URL or --url"

    def strike(self) -> None:
        self.admin.config_set("requirepass", "changed")
        self.admin.client_kill_filter(_type="normal", skipme=True)

    def heal(self) -> None:
        self.admin.config_set("requirepass", "")


class Denied(Fault):
    message = r"the Redis user lacks a permission: give it those of its role in deploy/users.acl"

    def strike(self) -> None:
        self.admin.execute_command("ACL", "SETUSER", "default", "resetkeys", "%R~*")

    def heal(self) -> None:
        self.admin.execute_command("ACL", "SETUSER", "default", "~*")


class DiskFull(Fault):
    """A snapshot that can't be written: the folder for it is gone."""

    message = "Redis can't write to its disk: make room there"

    def strike(self) -> None:
        self.gone = self.folder / "gone"
        self.gone.mkdir()
        self.admin.config_set("dir", str(self.gone))
        self.admin.config_set("save", "1 1")
        shutil.rmtree(self.gone)
        self.admin.bgsave()
        wait_until(lambda: self.admin.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot has failed")

    def heal(self) -> None:
        self.admin.config_set("dir", str(self.server.directory))
        self.admin.config_set("save", "")


@pytest.fixture
def server(server_binary: str | None) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(server_binary, appendfsync="always", enable_protected_configs="yes") as running:
        yield running


@pytest.fixture(params=[Killed, Full, Demoted, Locked, Denied, DiskFull])
def fault(
    request: pytest.FixtureRequest, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Fault:
    monkeypatch.setattr("ingestq.producer.queue.PATIENCE", 0.2)
    monkeypatch.setattr("ingestq.producer.group.PATIENCE", 0.2)
    made: Fault = request.param(server, tmp_path)
    return made


@pytest.fixture
def queue(server: EmbeddedServer) -> IngestQueue:
    return IngestQueue("ingest", connection=sibling(Redis.from_url(server.url)), settings=Settings())


def queued(server: EmbeddedServer) -> list[str]:
    return [entry.decode() for entry in Redis.from_url(server.url).lrange(keys.queue("ingest"), 0, -1)]


def test_a_fault_midway_is_one_error_and_the_same_call_completes_the_rest(
    fault: Fault, server: EmbeddedServer, queue: IngestQueue
) -> None:
    def source() -> Iterator[IngestRequest]:
        for i, document in enumerate(DOCUMENTS):
            if i == 200:
                wait_until(lambda: len(queued(server)) == 128, "the chunk that is under way has arrived")
                fault.strike()
            yield document

    with pytest.raises(QueueUnavailable, match=rf"{fault.message}.*; 128 documents were accepted before") as raised:
        queue.enqueue_many(source(), group_id="g")
    fault.heal()

    assert type(raised.value) is fault.kind
    assert "group_id='g' completes the rest and repeats none" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.accepted == JOB_IDS[:128] == queued(server)
    assert not queue.group("g").is_sealed
    completed = queue.enqueue_many(DOCUMENTS, group_id="g")
    assert (completed.num_enqueued, completed.num_joined, completed.is_sealed) == (172, 128, True)
    assert drain(Redis.from_url(server.url)) == NAMES


def test_a_fault_before_the_first_document_accepts_none(fault: Fault, queue: IngestQueue) -> None:
    fault.strike()

    with pytest.raises(fault.kind, match=f"{fault.message}.*; 0 documents were accepted") as raised:
        queue.enqueue_many(DOCUMENTS)
    assert raised.value.accepted == []
    fault.heal()
    assert queue.enqueue_many(DOCUMENTS).num_enqueued == len(DOCUMENTS)


def test_a_fault_at_one_document_is_told_too(fault: Fault, queue: IngestQueue) -> None:
    fault.strike()

    with pytest.raises(fault.kind, match=fault.message):
        queue.enqueue(DOCUMENTS[0])
    fault.heal()
    assert queue.enqueue(DOCUMENTS[0]).outcome == "enqueued"


def test_the_command_says_it_in_one_line(server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A document.")
    fault = Full(server, tmp_path)
    fault.strike()

    done = run("ingestq", "enqueue", str(tmp_path / "a.txt"), "--model", "m", "--group", "g", url=server.url)

    assert done.returncode == 4
    assert done.stderr.splitlines()[-1].startswith("ingestq: Redis: command not allowed when used memory > 'maxmemory'")
    assert "raise maxmemory; 0 documents were accepted before that" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
