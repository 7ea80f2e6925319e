"""deploy/users.acl on a real server: each role can do its work through the real commands, and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.retry import Retry
from rq.command import send_shutdown_command, send_stop_job_command

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import DEFAULT_OPTIONS, EmbeddedServer
from ingestq.common.errors import ServerStartError
from ingestq.common.limits import AdmissionLimits, read_limits, update_limits, write_limits
from ingestq.producer import IngestQueue, Settings, iter_results
from support.hand_worker import finish, lease, request
from support.jobs import QUEUE, put, rq_job, statuses
from support.jobs import request as simulated_request
from support.processes import SIMULATED, WorkerProcess, run, wait_until
from support.secured import DEPLOY, PLACEHOLDERS, SecuredServer

PRODUCER, WORKER, READER, OPERATOR = "ingest-producer", "ingest-worker", "ingest-reader", "ingest-operator"
ROLES = (PRODUCER, WORKER, READER, OPERATOR)
FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
BURST = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", "-n", "w", QUEUE)
TWO = "".join(json.dumps({"text": text, "id": text}) + "\n" for text in ("one", "two"))


@pytest.fixture(scope="module")
def started(server_binary: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredServer]:
    with SecuredServer(server_binary, tmp_path_factory.mktemp("secured")) as running:
        yield running


@pytest.fixture
def secured(started: SecuredServer) -> SecuredServer:
    """The server, empty, with nobody refused so far."""
    with started.client("admin") as admin:
        admin.flushall()
        admin.execute_command("ACL", "LOG", "RESET")
    return started


def command(secured: SecuredServer, user: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs an installed command as a role, which must not meet a permission that it lacks."""
    done = run(*words, url=secured.url_of(user), settings={**SIMULATED, **FAST}, **options)
    assert refusals(secured) == []
    return done


def refusals(secured: SecuredServer) -> list[tuple[str, str, str]]:
    """User, kind and object of every permission that somebody lacked."""
    with secured.client("admin") as admin:
        entries = admin.execute_command("ACL", "LOG")
    return [tuple(entry[name].decode() for name in (b"username", b"reason", b"object")) for entry in entries]


def producer_queue(secured: SecuredServer) -> IngestQueue:
    return IngestQueue(QUEUE, connection=secured.client(PRODUCER), settings=Settings())


# --- the files


def test_the_server_has_the_settings_of_the_file(secured: SecuredServer) -> None:
    with secured.client("admin") as admin:
        assert {name: admin.config_get(name)[name] for name in DEFAULT_OPTIONS} == DEFAULT_OPTIONS


@pytest.mark.parametrize("user", [None, "default", *PLACEHOLDERS.values()])
def test_nobody_gets_in_without_a_password(secured: SecuredServer, user: str | None) -> None:
    stranger = Redis(port=secured.port, username=user, password=user and "", retry=Retry(NoBackoff(), 0))
    with pytest.raises(AuthenticationError):
        stranger.ping()


def test_the_server_does_not_start_with_a_placeholder_for_a_password(server_binary: str | None, tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match=r"(?i)password hash"):
        EmbeddedServer(server_binary, directory=tmp_path, aclfile=str(DEPLOY / "users.acl")).start()


# --- what each role needs


def test_documents_go_the_whole_way_each_role_doing_its_part(secured: SecuredServer) -> None:
    enqueued = command(secured, PRODUCER, "ingestq", "enqueue", "-", "--group", "g", input=TWO)
    assert (enqueued.returncode, enqueued.stdout) == (0, "g\n")
    worked = command(secured, WORKER, *BURST)
    assert (worked.returncode, "Traceback" in worked.stderr) == (0, False)
    results = command(secured, READER, "ingestq", "results", "g")
    rows = [orjson.loads(line) for line in results.stdout.splitlines()]
    assert [(row["document_id"], row["status"]) for row in rows] == [("one", "succeeded"), ("two", "succeeded")]
    assert results.returncode == 0


def test_a_worker_may_look_at_what_queued_documents_begin_with(secured: SecuredServer, tmp_path: Path) -> None:
    task = ("--instruction", "Say in one sentence what it is about and for whom. " * 3, "--no-chat")
    command(secured, PRODUCER, "ingestq", "enqueue", "-", *task, input=TWO)
    worker = WorkerProcess(
        secured.url_of(WORKER),
        tmp_path,
        name="w",
        worker="support.warming.WarmingWorker",
        PYTHONPATH=str(Path(__file__).parents[1]),
        **FAST,
    )
    with worker:
        assert "1 shared prefixes cached" in worker.output
    assert refusals(secured) == []


@pytest.mark.parametrize("user", [PRODUCER, READER, OPERATOR])
def test_the_state_of_a_group_can_be_asked_for(secured: SecuredServer, user: str) -> None:
    command(secured, PRODUCER, "ingestq", "enqueue", "-", "--group", "g", input=TWO)
    done = command(secured, user, "ingestq", "status", "g", "--json")
    assert orjson.loads(done.stdout)["states"]["queued"] == 2


@pytest.mark.parametrize("user", [READER, OPERATOR])
def test_the_state_of_the_queue_can_be_asked_for(secured: SecuredServer, user: str) -> None:
    command(secured, PRODUCER, "ingestq", "enqueue", "-", input=TWO)
    done = command(secured, user, "ingestq", "status", "--json")
    assert orjson.loads(done.stdout)["queued"] == 2


@pytest.mark.parametrize("durability", ["aof", "replica"])
def test_a_producer_may_wait_for_the_disk_or_a_replica(secured: SecuredServer, durability: str) -> None:
    """Whether the server has the command, and a replica, is another matter."""
    settings = {**SIMULATED, "INGEST_DURABILITY": durability}
    run("ingestq", "enqueue", "-", url=secured.url_of(PRODUCER), settings=settings, input=TWO)
    assert refusals(secured) == []


def test_a_producer_cancels_what_is_queued_scheduled_or_running(secured: SecuredServer) -> None:
    queue, worker = producer_queue(secured), secured.client(WORKER)
    retry = {"retries": 1, "retry_intervals_json": "[3600]", "group_id": "g"}
    scheduled = put(worker, [request("scheduled")], **retry)
    finish(worker, lease(worker), "F")
    running = put(worker, [request("running")], group_id="g")
    lease(worker)
    queued = put(worker, [request("queued")], group_id="g")
    assert statuses(worker, scheduled + running + queued) == ["scheduled", "started", "queued"]
    assert queue.group("g").cancel().num_cancelled == 3
    assert statuses(worker, scheduled + running + queued) == ["canceled"] * 3
    assert worker.zcard(keys.started(QUEUE)) == 0
    assert refusals(secured) == []


@pytest.mark.parametrize("kind", ["S", "P", "X"])
def test_a_producer_enqueues_again_what_has_ended(secured: SecuredServer, kind: str) -> None:
    queue, worker = producer_queue(secured), secured.client(WORKER)
    queue.enqueue_many([request("a")], group_id="g1")
    finish(worker, lease(worker), kind)
    again = queue.enqueue_many([request("a")], group_id="g2")
    assert (again.num_finished, again.num_enqueued) == ((1, 0) if kind == "S" else (0, 1))
    assert refusals(secured) == []


def test_a_reader_gets_rows_that_the_stream_does_not_tell_of(secured: SecuredServer) -> None:
    """Stock tools end jobs without an entry; a sweep finds them."""
    group = producer_queue(secured).enqueue_many([request("a")], group_id="g")
    [job_id] = (raw.decode() for raw in secured.client(OPERATOR).lrange(keys.queue(QUEUE), 0, -1))
    rq_job(secured.client(OPERATOR), job_id).cancel()
    [row] = iter_results(group.id, connection=secured.client(READER), timeout=30)
    assert row.status == "cancelled"  # it would leave an entry for other readers, and does without


def test_a_worker_obeys_the_operators_commands(secured: SecuredServer, tmp_path: Path) -> None:
    operator, slow = secured.client(OPERATOR), {"INGEST_ENGINE_TIME_SCALE": "50"}
    with WorkerProcess(secured.url_of(WORKER), tmp_path, name="w", **slow) as worker:
        [job_id] = put(operator, [simulated_request(1, max_tokens=4000)])
        wait_until(lambda: statuses(operator, [job_id]) == ["started"], "the job runs")
        send_stop_job_command(operator, job_id)
        wait_until(lambda: statuses(operator, [job_id]) == ["stopped"], "the job is stopped")
        send_shutdown_command(operator, "w")
        assert worker.wait() == 0
    assert refusals(secured) == []


def test_an_operator_runs_rqs_own_commands(secured: SecuredServer) -> None:
    worker = secured.client(WORKER)
    put(worker, [request("a")])
    finish(worker, lease(worker), "P")
    serializer = ("-S", "ingestq.common.serializer.OrjsonSerializer")
    for words in (("info",), ("suspend",), ("resume",), ("requeue", "--all", "--queue", QUEUE, *serializer)):
        done = command(secured, OPERATOR, "rq", *words)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), words
    assert worker.llen(keys.queue(QUEUE)) == 1


def test_a_reader_looks_into_failures_and_an_operator_tries_again(secured: SecuredServer) -> None:
    worker = secured.client(WORKER)
    [job_id] = put(worker, [request("a")])
    finish(worker, lease(worker), "P")
    for words in (("list",), ("show", job_id)):
        done = command(secured, READER, "ingestq", "failed", *words)
        assert (done.returncode, "EngineError" in done.stdout) == (0, True), words
    assert run("ingestq", "failed", "retry", job_id, url=secured.url_of(PRODUCER)).returncode == 4
    with secured.client("admin") as admin:
        admin.execute_command("ACL", "LOG", "RESET")
    assert command(secured, OPERATOR, "ingestq", "failed", "retry", job_id).returncode == 0
    assert statuses(worker, [job_id]) == ["queued"]


def test_a_producers_documents_take_their_tenants_turn(secured: SecuredServer) -> None:
    producer, worker = secured.client(PRODUCER), secured.client(WORKER)
    for tenant in ("a", "b", ""):
        put(producer, [simulated_request(number) for number in range(2)], tenant=tenant, group_id="g")
    reply = scripts.lease(
        worker,
        QUEUE,
        worker="w",
        model="sim",
        admission=scripts.Admission(documents=1, max_kv_tokens=10_000, max_kv_tokens_fleet=10_000, block_size=16),
        lease_ttl=60.0,
        call_id="0" * 14,
    )
    assert [job.tenant for job in reply.jobs] == ["a"]
    assert int(worker.hget(keys.kv_tokens(), "worker:w") or 0) == reply.jobs[0].kv_tokens > 0
    assert scripts.cancel(producer, "g", first=0, ttl=60)[1] == 2
    assert not worker.exists(keys.kv_tokens()), "what the cancelled one had reserved is free"
    assert refusals(secured) == []


def test_a_worker_keeps_the_accounts(secured: SecuredServer) -> None:
    worker = secured.client(WORKER)
    put(secured.client(PRODUCER), [request("a")], tenant="t")
    (job,) = lease(worker)
    need = scripts.Need(job.member, 1, 8, 9)
    assert scripts.reserve(worker, QUEUE, worker="hand", admission=scripts.Admission(documents=0), needs=[need]) == [
        "granted"
    ]
    assert scripts.recount(worker, QUEUE).kv_tokens_counted == 9
    scripts.learn(worker, QUEUE, {"ab": {1: 1}})
    scripts.hand_back(worker, QUEUE, members=[job.member], failure_ttl=60)
    assert refusals(secured) == []


def test_a_reader_sees_what_is_in_flight_against_which_limit(secured: SecuredServer) -> None:
    put(secured.client(PRODUCER), [request("a")], tenant="t")
    lease(secured.client(WORKER))
    reader = secured.client(READER)
    assert read_limits(reader, QUEUE) == AdmissionLimits()
    assert reader.hgetall(keys.kv_tokens())
    for key in (keys.loads(QUEUE), keys.lengths(QUEUE)):
        assert reader.hgetall(key) == {}
    assert reader.zrange(keys.tenants(QUEUE), 0, -1, withscores=True) == []
    assert reader.lpos(keys.queue(QUEUE, "t"), "x") is None
    assert refusals(secured) == []


def test_an_operator_sets_the_limits(secured: SecuredServer) -> None:
    update_limits(secured.client(OPERATOR), QUEUE, {"max_kv_tokens": 5, "max_in_flight": None})
    write_limits(secured.client(OPERATOR), QUEUE, AdmissionLimits(max_in_flight_fleet=0))
    put(secured.client(OPERATOR), [simulated_request(1)])
    assert (
        scripts.lease(
            secured.client(WORKER),
            QUEUE,
            worker="w",
            model="sim",
            admission=scripts.Admission(documents=1),
            lease_ttl=60.0,
            call_id="0" * 14,
        ).gate
        == "fleet"
    )


# --- what is denied


# Of everybody but `admin`.
ADMINISTRATION = (
    "ACL LIST",
    "ACL SETUSER x on nopass +@all",
    "BGREWRITEAOF",
    "CLIENT KILL TYPE normal",
    "CLIENT LIST",
    "CLIENT PAUSE 100000",
    "CLIENT TRACKING on BCAST",
    "CONFIG GET *",
    "CONFIG SET appendonly no",
    "DBSIZE",
    "FLUSHALL",
    "FLUSHDB",
    "FUNCTION LIST",
    "KEYS *",
    "MIGRATE 127.0.0.1 1 rq:job:x 0 1",
    "MODULE LIST",
    "MONITOR",
    "RANDOMKEY",
    "REPLICAOF 127.0.0.1 1",
    "SAVE",
    "SCAN 0",
    "SCRIPT FLUSH",
    "SCRIPT KILL",
    "SHUTDOWN NOSAVE",
    "SLOWLOG GET",
    "SWAPDB 0 1",
    # Other prefixes, such as another producer's.
    "DEL rq-b:job:x",
    "EXISTS rq-b:job:x",
    "HGETALL rq-b:job:x",
    "HSET rq-b:job:x status queued",
    "COPY rq:job:x rq-b:job:x",
)
DENIED = {
    PRODUCER: (
        # Commands to workers.
        "PUBLISH rq:pubsub:w {}",
        "SPUBLISH rq:pubsub:w {}",
        "SUBSCRIBE rq:pubsub:w",
        # Results: neither to read nor to forge.
        "XRANGE rq:results:x - +",
        "XREVRANGE rq:results:x + -",
        "XREAD STREAMS rq:results:x 0",
        "XADD rq:results:x * type 1",
        "COPY rq:results:x rq:job:y",
        "RENAME rq:results:x rq:job:y",
        "DUMP rq:results:x",
        # What is the workers' or an operator's.
        "SET rq:suspended 1",
        "HSET rq:worker:w state idle",
        "HGETALL rq:worker:w",
        "SADD rq:workers rq:worker:w",
        "SADD rq:worker:w:executions x:y",
        "HSET rq:ingest:limits:ingest max_in_flight 0",
        "HSET rq:ingest:engines:ingest w {}",
        "HSET rq:ingest:machines:ingest m {}",
        "HSET rq:ingest:kv_tokens queue:ingest 0",
        "DEL rq:ingest:kv_tokens",
        "HSET rq:ingest:loads:ingest w {}",
        "HSET rq:ingest:lengths:ingest ab:1 1",
        "ZREM rq:ingest:tenants:ingest t",
        "ZADD rq:wip:ingest 1 x:y",
        "ZADD rq:finished:ingest 1 x",
        "ZADD rq:failed:ingest 1 x",
        "ZRANGE rq:wip:ingest 0 -1",
        "ZRANGE rq:failed:ingest 0 -1",
        "HSET rq:execution:x:y worker_name w",
        # The queue's work.
        "LPOP rq:queue:ingest",
        "LRANGE rq:queue:ingest 0 -1",
        "LREM rq:queue:ingest 0 x",
        "DEL rq:queue:ingest",
        "DEL rq:ingest:group:g",
        "HGETALL rq:job:x",
    ),
    WORKER: (
        "PUBLISH rq:pubsub:w {}",
        "SPUBLISH rq:pubsub:w {}",
        "PSUBSCRIBE *",
        "SUBSCRIBE other",
    ),
    READER: (
        "PUBLISH rq:pubsub:w {}",
        "SUBSCRIBE rq:pubsub:w",
        "HSET rq:job:x status queued",
        "DEL rq:results:x",
        "EXPIRE rq:results:x 1",
        "PERSIST rq:results:x",
        "XADD rq:results:x * type 1",
        "XADD rq:ingest:group:g:done * j x",
        "XDEL rq:ingest:group:g:done 1-1",
        "XTRIM rq:ingest:group:g:done MAXLEN 0",
        "LPOP rq:queue:ingest",
        "LPUSH rq:queue:ingest x",
        "SET rq:suspended 1",
        "HSET rq:ingest:limits:ingest max_in_flight 0",
        "HSET rq:ingest:loads:ingest w {}",
        "HINCRBY rq:ingest:kv_tokens queue:ingest 1",
        "ZADD rq:ingest:tenants:ingest 1 t",
        "ZADD rq:finished:ingest 1 x",
        "EVAL return{} 0",
        "EVAL return{} 1 rq:job:x",
    ),
    OPERATOR: (
        "SUBSCRIBE rq:pubsub:w",
        "PUBLISH other {}",
    ),
}


@pytest.mark.parametrize(
    ("user", "words"),
    [(user, words) for user in ROLES for words in (*ADMINISTRATION, *DENIED[user])],
)
def test_is_denied(secured: SecuredServer, user: str, words: str) -> None:
    with secured.client("admin") as admin:
        admin.hset("rq:job:x", "status", "failed")
        admin.xadd("rq:results:x", {"type": "1"})
    with secured.client(user) as client, pytest.raises(NoPermissionError):
        client.execute_command(*words.split())


@pytest.mark.parametrize(
    ("user", "body"),
    [
        (PRODUCER, "redis.call('XRANGE', 'rq:results:x', '-', '+')"),
        (PRODUCER, "redis.call('PUBLISH', 'rq:pubsub:w', '{}')"),
        (PRODUCER, "redis.call('SET', 'rq:suspended', '1')"),
        (WORKER, "redis.call('PUBLISH', 'rq:pubsub:w', '{}')"),
        (WORKER, "redis.call('GET', 'rq-b:suspended')"),
        (OPERATOR, "redis.call('FLUSHALL')"),
    ],
)
def test_a_script_may_do_no_more_than_its_user(secured: SecuredServer, user: str, body: str) -> None:
    with secured.client(user) as client, pytest.raises(ResponseError, match=r"(?i)ACL failure|can't (run|access)"):
        client.eval(f"#!lua\nreturn {body}", 0)
    assert refusals(secured)


def test_a_reader_writes_nothing_by_way_of_a_script(secured: SecuredServer) -> None:
    with secured.client(READER) as reader, pytest.raises(ResponseError, match=r"(?i)write|'del'|run"):
        reader.eval_ro("return redis.call('DEL', 'rq:job:x')", 0)


# --- passwords


def test_no_password_is_on_a_command_line_or_in_a_log(secured: SecuredServer, tmp_path: Path) -> None:
    secret = secured.passwords[WORKER]
    with WorkerProcess(secured.url_of(WORKER), tmp_path, "--verbose", name="w") as worker:
        put(secured.client(OPERATOR), [simulated_request(1)])
        wait_until(lambda: secured.client(OPERATOR).zcard(keys.finished(QUEUE)) == 1, "the document is done")
        command_lines = _command_lines()
        assert command_lines[worker.process.pid]
        assert not any(secret.encode() in line for line in command_lines.values())
        secured.kill()
        wait_until(lambda: "kept in memory" in worker.output, "the worker notices that Redis is away")
        secured.start()
        worker.signal(15)
        worker.wait()
        assert secret not in worker.output


def _command_lines() -> dict[int, bytes]:
    """Of all processes, and so of whatever the worker has started."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            lines[int(path.parent.name)] = path.read_bytes()
    return lines


@pytest.mark.parametrize("words", [("ingestq", "status"), BURST, ("rq", "info")])
def test_no_error_shows_a_password(secured: SecuredServer, words: tuple[str, ...]) -> None:
    secret = "S3cret" + secured.passwords[WORKER]
    url = f"redis://{WORKER}:{secret}@127.0.0.1"
    for port in (secured.port, 1):  # a wrong password; nobody there
        done = run(*words, url=f"{url}:{port}/0", settings=SIMULATED)
        assert done.returncode != 0
        assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
