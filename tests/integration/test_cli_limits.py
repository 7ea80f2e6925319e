"""`ingestq limits` and tenants as scripts use them: a subprocess, a real server, exit codes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import orjson
import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import publish
from ingestq.common.errors import SettingsError
from ingestq.common.limits import AdmissionLimits, read_limits
from ingestq.common.task_id import estimated_tokens, task_id
from ingestq.common.worker_load import publish_load
from ingestq.producer import IngestQueue
from ingestq.producer.cli_limits import parse_changes
from support import processes
from support.hand_worker import finish, lease, request
from support.live_workers import card, load

Command = Callable[..., "subprocess.CompletedProcess[str]"]

TWO = '{"text": "one", "id": "a"}\n{"text": "two", "id": "b"}\n'


@pytest.fixture
def ingestq(server: EmbeddedServer, redis: Redis) -> Command:
    def run(*arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        settings = {"INGEST_MODEL": "m", "COLUMNS": "100", **settings}
        return processes.run("ingestq", *arguments, url=server.url, settings=settings, timeout=60, input=stdin)

    return run


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis)


# --- show


def test_limits_that_are_not_set_say_so(ingestq: Command) -> None:
    done = ingestq("limits")

    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:2] == ["queue: ingest", "limit                       value  from"]
    assert lines[2].split()[:3] == ["max_in_flight", "none", "unset"]
    assert lines[2].endswith("documents that one worker has leased: no worker")


def test_each_limit_stands_beside_what_is_in_flight_against_it(
    ingestq: Command, queue: IngestQueue, redis: Redis
) -> None:
    queue.enqueue_many([request(name) for name in "abc"])
    held = lease(redis, want=2)
    publish(redis, "ingest", "hand", card())
    publish(redis, "ingest", "w1", card())
    publish_load(redis, ["ingest"], "w1", load())
    ingestq("limits", "set", "max_in_flight_fleet=7", "ttft_sla_ms=2000.5")
    tokens = sum(job.kv_tokens for job in held)
    assert tokens > 0

    shown = ingestq("limits").stdout
    found = orjson.loads(ingestq("limits", "--json").stdout)

    for line in (
        "max_in_flight                none  unset  documents that one worker has leased: hand=2, w1=0",
        "max_in_flight_fleet             7  Redis  documents leased from the queue: 2",
        f"max_kv_tokens                none  unset  KV tokens reserved by one worker: hand={tokens}, w1=0",
        f"max_kv_tokens_fleet          none  unset  KV tokens reserved for the queue's documents: {tokens}",
        "ttft_sla_ms               2,000.5  Redis  time to first token in ms, p95 of a worker: w1=1,804",
    ):
        assert line in shown.splitlines()
    assert found == {
        "queue": "ingest",
        "limits": {
            "max_in_flight": {"value": None, "from": "unset"},
            "max_in_flight_fleet": {"value": 7, "from": "Redis"},
            "max_kv_tokens": {"value": None, "from": "unset"},
            "max_kv_tokens_fleet": {"value": None, "from": "unset"},
            "ttft_sla_ms": {"value": 2000.5, "from": "Redis"},
        },
        "in_flight": {"documents": 2, "kv_tokens": tokens},
        "workers": {
            "hand": {"documents": 2, "kv_tokens": tokens, "ttft_p95_ms": None},
            "w1": {"documents": 0, "kv_tokens": 0, "ttft_p95_ms": 1804.3},
        },
    }


def test_show_is_what_limits_does_by_itself(ingestq: Command) -> None:
    assert ingestq("limits", "show", "--queue", "other").stdout == ingestq("limits", "--queue", "other").stdout
    assert "set" in ingestq("limits", "--help").stdout


# --- set


def test_several_limits_are_set_at_once_and_others_stay(ingestq: Command, redis: Redis) -> None:
    ingestq("limits", "set", "max_in_flight=20", "max_kv_tokens=100")
    done = ingestq("limits", "set", "max_in_flight=200", "max_kv_tokens_fleet=1000", "ttft_sla_ms=2000")

    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        "queue ingest: max_in_flight 200, was 20",
        "queue ingest: max_kv_tokens_fleet 1000, was none",
        "queue ingest: ttft_sla_ms 2000, was none",
    ]
    assert read_limits(redis, "ingest") == AdmissionLimits(
        max_in_flight=200, max_kv_tokens=100, max_kv_tokens_fleet=1000, ttft_sla_ms=2000.0
    )


def test_none_removes_a_limit(ingestq: Command, redis: Redis) -> None:
    ingestq("limits", "set", "max_in_flight=20", "ttft_sla_ms=10")
    ingestq("limits", "set", "max_in_flight=none")

    assert read_limits(redis, "ingest") == AdmissionLimits(ttft_sla_ms=10.0)


def test_a_limit_is_in_force_with_the_next_lease(ingestq: Command, queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many([request(name) for name in "abcd"])
    ingestq("limits", "set", "max_in_flight_fleet=1")
    assert len(lease(redis)) == 1

    ingestq("limits", "set", "max_in_flight_fleet=3")
    assert len(lease(redis)) == 2


def test_a_limit_under_which_documents_are_failed_is_warned_of(ingestq: Command, redis: Redis) -> None:
    publish(redis, "ingest", "w1", card(max_model_len=2048))

    done = ingestq("limits", "set", "max_kv_tokens=2047", "max_kv_tokens_fleet=0", "max_in_flight=1")

    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if line.startswith("warning")] == [
        "warning: max_kv_tokens is 2,047, and the engines run documents of up to 2,048 tokens: those that need more "
        "than the limit by themselves are failed (KvLimitExceeded)"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_in_fligt=1", "'max_in_fligt' is not a limit; did you mean max_in_flight?"),
        (
            "x=1",
            "'x' is not a limit; limits are max_in_flight, max_in_flight_fleet, max_kv_tokens, max_kv_tokens_fleet, "
            "ttft_sla_ms",
        ),
        ("max_in_flight", "max_in_flight needs a value: max_in_flight=NUMBER, or max_in_flight=none"),
        ("max_in_flight=many", "max_in_flight=many: not a whole number; or max_in_flight=none for no bound"),
        ("max_in_flight=1.5", "max_in_flight=1.5: not a whole number; or max_in_flight=none for no bound"),
        ("max_in_flight=-1", "max_in_flight=-1: a limit is 0 (nothing is admitted) to 2147483647"),
        ("ttft_sla_ms=soon", "ttft_sla_ms=soon: not a number; or ttft_sla_ms=none for no bound"),
        ("ttft_sla_ms=nan", "ttft_sla_ms=nan: a limit is 0 (no bound) to 86400000"),
        ("ttft_sla_ms=5", "ttft_sla_ms is named twice; name it once"),
    ],
)
def test_a_wrong_change_names_what_is_right(change: str, message: str) -> None:
    valid = "ttft_sla_ms=2" if "twice" in message else "max_kv_tokens=2"

    with pytest.raises(SettingsError) as error:
        parse_changes([valid, change])
    assert str(error.value) == message


def test_a_wrong_change_is_one_line_and_changes_nothing(ingestq: Command, redis: Redis) -> None:
    done = ingestq("limits", "set", "max_kv_tokens=2", "max_in_fligt=1")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["ingestq: 'max_in_fligt' is not a limit; did you mean max_in_flight?"]
    assert read_limits(redis, "ingest") == AdmissionLimits()


# --- check


def test_a_check_of_right_counts_finds_nothing(ingestq: Command, queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many([request(name) for name in "ab"])
    tokens = sum(job.kv_tokens for job in lease(redis))

    done = ingestq("limits", "check")

    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"queue ingest: 2 leases have {tokens} KV tokens reserved, and so says the total"
    ]


def test_a_check_mends_what_other_tools_left_and_says_so(ingestq: Command, queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many([request(name) for name in "ab"])
    first, second = lease(redis)
    redis.zrem(keys.started("ingest"), second.member)  # as stock RQ would

    done = ingestq("limits", "check")

    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"queue ingest: 1 leases have {first.kv_tokens} KV tokens reserved; the total said "
        f"{first.kv_tokens + second.kv_tokens}, which is mended"
    ]
    assert ingestq("limits", "check").returncode == 0
    finish(redis, [first])
    assert orjson.loads(ingestq("limits", "--json").stdout)["in_flight"] == {"documents": 0, "kv_tokens": 0}


# --- what a job carries, and tenants


def test_a_job_carries_its_task_and_about_how_long_it_is(queue: IngestQueue, redis: Redis) -> None:
    item = request("a", text="x" * 4000)
    job_id = queue.enqueue(item).job_id

    fields = redis.hmget(keys.job(job_id), ["tokens", "max_tokens", "task", "tenant"])
    assert fields == [b"%d" % estimated_tokens(item), b"8", task_id(item).encode(), None]


def test_documents_of_a_tenant_wait_in_its_own_list(ingestq: Command, redis: Redis) -> None:
    assert ingestq("enqueue", "-", "--tenant", "acme", stdin=TWO).returncode == 0

    assert redis.llen(keys.queue("ingest")) == 0
    [first, _] = redis.lrange(keys.queue("ingest", "acme"), 0, -1)
    assert redis.hmget(keys.job(first.decode()), ["tenant", "origin"]) == [b"acme", b"ingest"]
    assert len(lease(redis)) == 2


def test_the_tenant_of_the_environment_holds_unless_another_is_named(ingestq: Command, redis: Redis) -> None:
    ingestq("enqueue", "-", stdin='{"text": "one"}\n', INGEST_TENANT="acme")
    ingestq("enqueue", "-", "--tenant", "beta", stdin='{"text": "two"}\n', INGEST_TENANT="acme")
    ingestq("enqueue", "-", "--tenant", "", stdin='{"text": "three"}\n', INGEST_TENANT="acme")

    assert [redis.llen(keys.queue("ingest", tenant)) for tenant in ("acme", "beta", "")] == [1, 1, 1]


def test_a_document_of_two_tenants_runs_once_in_the_turn_of_the_first(queue: IngestQueue, redis: Redis) -> None:
    first = queue.enqueue(request("a"), tenant="acme")
    second = queue.enqueue(request("a"), tenant="beta")

    assert (second.job_id, second.outcome) == (first.job_id, "joined")
    assert [redis.llen(keys.queue("ingest", tenant)) for tenant in ("acme", "beta")] == [1, 0]
    assert len(lease(redis)) == 1


def test_a_malformed_tenant_is_refused_before_anything_is_queued(ingestq: Command, redis: Redis) -> None:
    done = ingestq("enqueue", "-", "--tenant", "a b", stdin=TWO)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "ingestq: tenant 'a b': a name has 1 to 128 letters, digits and _ . : -"
    assert redis.keys() == []
