"""The worker through RQ's stock command line, on the simulated engine (one that infers nothing)."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import pytest
from redis import Redis
from rq import Queue, Retry
from rq.command import send_stop_job_command
from rq.job import Job
from rq.serializers import JSONSerializer

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.limits import AdmissionLimits, write_limits
from ingestq.common.schema import Status
from ingestq.common.scripts import Admission
from support.jobs import QUEUE, fetched, put, request, row, rq_job, statuses
from support.processes import SIMULATED, WorkerProcess, environment, run, wait_until

# Steps that take no time; and steps so slow that a document is still running whenever a test looks.
FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
SLOW = {"INGEST_ENGINE_STEP_MS": "100"}


def burst(server: EmbeddedServer, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", *options, QUEUE)
    return run(*command, url=server.url, settings={**SIMULATED, **FAST, **settings})


def running(redis: Redis) -> int:
    """Leases of the queue."""
    return redis.zcard(keys.started(QUEUE))


def test_every_document_gets_one_row(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(i) for i in range(300)])

    done = burst(server)

    assert done.returncode == 0, done.stderr
    rows = [row(redis, job_id) for job_id in job_ids]
    assert {item.status for item in rows} == {Status.SUCCEEDED}
    assert [item.document_id for item in rows] == [f"doc-{i}" for i in range(300)]
    first = rows[0]
    assert first.text
    assert first.finish_reason == "length"
    assert (first.usage.output_tokens, first.attempts, first.model) == (4, 1, "sim")
    assert first.usage.prompt_tokens > 0
    assert first.queue_ms is not None
    assert first.queue_ms > 0
    assert first.engine_digest
    # The payload is replaced by a stub, and no lease is left behind.
    assert redis.hget(keys.job(job_ids[0]), "data") == b'["ingestq.ingest",null,[],{}]'
    assert running(redis) == 0
    assert not redis.keys("rq:execution*")


def test_a_plain_rq_client_needs_no_ingestq(server: EmbeddedServer, redis: Redis) -> None:
    payload = {"document_id": "plain", "text": "Some text.", "model": "sim", "chat": False}
    script = f"""
import sys
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
queue = Queue("ingest", connection=Redis.from_url({server.url!r}), serializer=JSONSerializer)
print(queue.enqueue("ingestq.ingest", {payload!r}).id)
assert not any(name.startswith("ingestq") for name in sys.modules)
"""
    job_id = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    burst(server)

    result = Job.fetch(job_id, connection=redis, serializer=JSONSerializer).latest_result()
    assert result is not None
    assert result.type == result.Type.SUCCESSFUL
    assert result.return_value["document_id"] == "plain"
    assert result.return_value["status"] == "succeeded"


@pytest.mark.parametrize(
    ("fields", "error_class", "told"),
    [
        ({"text": "x" * 4000}, "PromptTooLong", ["1000 tokens", "max_model_len is 500", "split the document"]),
        ({"text": "x" * 1900, "max_tokens": 30}, "PromptTooLong", ["475", "505", "500", "INGEST_OVER_LENGTH"]),
        ({"text": ""}, "PromptEmpty", ["no tokens"]),
        ({"max_tokens": 4, "sampling": {"max_tokens": 4, "min_tokens": 9}}, "PromptRefused", ["min_tokens"]),
    ],
)
def test_a_bad_document_fails_alone_and_says_why(
    server: EmbeddedServer, redis: Redis, fields: dict, error_class: str, told: list[str]
) -> None:
    job_ids = put(redis, [request(0), request(1, **fields), request(2)])

    burst(server, INGEST_ENGINE_MAX_MODEL_LEN="500")

    assert statuses(redis, job_ids) == ["finished", "failed", "finished"]
    failure = row(redis, job_ids[1])
    assert (failure.status, failure.error_class) == (Status.FAILED, error_class)
    assert all(part in (failure.error_message or "") for part in told), failure.error_message
    assert rq_job(redis, job_ids[1]).latest_result().exc_string.startswith(error_class)
    assert job_ids[1] in Queue(QUEUE, connection=redis).failed_job_registry.get_job_ids()


def test_clamping_is_an_explicit_setting(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(0, text="x" * 1900, max_tokens=30)])

    burst(server, INGEST_ENGINE_MAX_MODEL_LEN="500", INGEST_OVER_LENGTH="clamp")

    assert row(redis, job_ids[0]).usage.output_tokens == 25


def test_nothing_named_in_redis_is_imported_or_unpickled(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (trap,))

    pickled = Queue(QUEUE, connection=redis).enqueue("os.mkdir", str(trap))
    redis.hset(pickled.key, "data", pickle.dumps(("os.mkdir", None, (Bomb(),), {})))
    redis.hset(pickled.key, "meta", pickle.dumps(Bomb()))
    named = Queue(QUEUE, connection=redis, serializer=JSONSerializer).enqueue("os.mkdir", str(trap))
    called_back = Queue(QUEUE, connection=redis, serializer=JSONSerializer).enqueue(
        "ingestq.ingest", {"document_id": "d", "text": "t", "model": "sim"}, on_success="os.mkdir"
    )
    honest = put(redis, [request(1)])

    burst(server)

    assert statuses(redis, [pickled.id, named.id, called_back.id]) == ["failed"] * 3
    assert statuses(redis, honest) == ["finished"]
    assert not trap.exists()
    reasons = [fetched(redis, [job.id])[0].exception or "" for job in (pickled, named, called_back)]
    assert "not JSON" in reasons[0]
    assert "'os.mkdir' is not served" in reasons[1]
    assert "'on_success' is not served" in reasons[2]


def test_a_worker_never_leases_another_models_documents(server: EmbeddedServer, redis: Redis) -> None:
    others = put(redis, [request(i, model="other") for i in range(200)])
    plain = Queue(QUEUE, connection=redis, serializer=JSONSerializer).enqueue(
        "ingestq.ingest", {"document_id": "p", "text": "t", "model": "other", "chat": False}
    )
    mine = put(redis, [request(i) for i in range(150)])

    burst(server)

    assert set(statuses(redis, mine)) == {"finished"}
    assert set(statuses(redis, [*others, plain.id])) == {"queued"}
    assert redis.hget(keys.job(others[0]), "attempts") is None
    assert redis.lrange(keys.queue(QUEUE), 0, -1) == [job_id.encode() for job_id in [*others, plain.id]]

    burst(server, INGEST_MODEL="other")

    assert set(statuses(redis, [*others, plain.id])) == {"finished"}


def test_limits_hold_per_worker_and_over_the_fleet(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    write_limits(redis, QUEUE, AdmissionLimits(max_in_flight=7, max_in_flight_fleet=10))
    put(redis, [request(i, max_tokens=400) for i in range(40)])

    with (
        WorkerProcess(server.url, tmp_path, name="a", **SLOW),
        WorkerProcess(server.url, tmp_path, name="b", **SLOW),
    ):
        wait_until(lambda: running(redis) == 10, "the fleet's limit is used")
        assert redis.scard(keys.worker_executions("a")) == 7
        assert redis.scard(keys.worker_executions("b")) == 3
        # Raised live: the workers take what is admitted now.
        write_limits(redis, QUEUE, AdmissionLimits(max_in_flight=7))
        wait_until(lambda: running(redis) == 14, "both workers' limits are used")


def test_a_closed_gate_makes_the_worker_wait_not_spin(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    write_limits(redis, QUEUE, AdmissionLimits(max_in_flight_fleet=0))
    job_ids = put(redis, [request(0)])

    with WorkerProcess(server.url, tmp_path, name="a", **FAST):

        def calls() -> int:
            return redis.info("commandstats")["cmdstat_evalsha"]["calls"]

        def seconds() -> int:
            return redis.time()[0]

        before, start = calls(), seconds()
        wait_until(lambda: seconds() >= start + 4, "time passes, by the server's clock")
        # A look every second, and the housekeeper's few. One that spins makes thousands a second, however slow the
        # machine.
        assert calls() - before < 60 * (seconds() - start)
        assert calls() > before
        assert statuses(redis, job_ids) == ["queued"]
        write_limits(redis, QUEUE, AdmissionLimits())
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "an opened gate lets the document through")


def test_one_document_wakes_one_idle_worker(server: EmbeddedServer, redis: Redis) -> None:
    """Idle workers wait for a token as these threads do; a worker that leaves work behind passes it on."""
    woken: SimpleQueue[bytes] = SimpleQueue()

    def idle() -> None:
        with Redis.from_url(server.url) as client:
            if client.blpop([keys.wake(QUEUE, "sim")], timeout=30):
                woken.put(b"woken")

    threads = [threading.Thread(target=idle, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: redis.info("clients")["blocked_clients"] == 4, "all are idle")
    put(redis, [request(0)])
    woken.get(timeout=30)
    assert redis.info("clients")["blocked_clients"] == 3

    # The second and third document leave one token between them, and the worker that takes the second leaves another.
    put(redis, [request(1), request(2), request(3)])
    woken.get(timeout=30)
    assert redis.info("clients")["blocked_clients"] == 2
    options = {"worker": "w", "model": "sim", "lease_ttl": 60, "call_id": "0" * 14}
    scripts.lease(redis, QUEUE, admission=Admission(documents=2), **options)
    woken.get(timeout=30)
    assert redis.info("clients")["blocked_clients"] == 1
    scripts.lease(redis, QUEUE, admission=Admission(documents=9), **options)
    assert redis.llen(keys.wake(QUEUE, "sim")) == 0


def test_a_cancelled_document_is_aborted_in_the_engine(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=2000) for i in range(3)])

    with WorkerProcess(server.url, tmp_path, name="a", **SLOW) as worker:
        wait_until(lambda: running(redis) == 3, "all run")
        rq_job(redis, job_ids[1]).cancel()
        wait_until(lambda: "the lease is gone" in worker.output, "the worker noticed")
        assert statuses(redis, job_ids) == ["started", "canceled", "started"]


def test_stop_job_stops_a_running_document(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=2000) for i in range(3)])

    with WorkerProcess(server.url, tmp_path, name="a", **SLOW):
        wait_until(lambda: running(redis) == 3, "all run")
        send_stop_job_command(redis, job_ids[1], serializer=JSONSerializer)
        wait_until(lambda: statuses(redis, job_ids)[1] == "stopped", "the document is stopped")

    assert row(redis, job_ids[1]).status is Status.STOPPED


def test_malformed_commands_do_not_stop_the_worker(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with WorkerProcess(server.url, tmp_path, name="a", **FAST) as worker:
        for message in (b"\xff", b"[]", b"{}", b'{"command": 7}', b'{"command": "stop-job", "job_id": {}}'):
            assert redis.publish("rq:pubsub:a", message) == 1
        job_ids = put(redis, [request(0)])
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "it still works")
        redis.publish("rq:pubsub:a", json.dumps({"command": "shutdown"}))
        assert worker.wait() == 0


def test_retries_wait_their_interval_and_need_no_scheduler(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(0)], retries=2, retry_intervals_json="[3600]")
    reply = scripts.lease(
        redis, QUEUE, worker="w", model="sim", admission=Admission(documents=1), lease_ttl=60, call_id="0" * 14
    )
    item = scripts.Finish(job=reply.jobs[0], kind="F", ttl=60, result_json=b"{}", exception="EngineError: no")
    assert scripts.finish(redis, QUEUE, worker="w", model="sim", finishes=[item]) == ["scheduled"]
    assert redis.zscore(keys.scheduled(QUEUE), job_ids[0]) > redis.time()[0] + 3500
    assert rq_job(redis, job_ids[0]).retries_left == 1

    with WorkerProcess(server.url, tmp_path, name="a", **FAST):
        other = put(redis, [request(1)])
        wait_until(lambda: statuses(redis, other) == ["finished"], "the worker works")
        assert statuses(redis, job_ids) == ["scheduled"]
        redis.zadd(keys.scheduled(QUEUE), {job_ids[0]: 1})  # the hour is over
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "the retried document is finished")
    assert row(redis, job_ids[0]).attempts == 2


def test_rq_retry_of_a_plain_client_is_kept(server: EmbeddedServer, redis: Redis) -> None:
    queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
    payload = {"document_id": "p", "text": "", "model": "sim", "chat": False}
    job = queue.enqueue("ingestq.ingest", payload, retry=Retry(max=3))

    burst(server)

    # An empty document can't get better: it is not tried again.
    assert job.get_status() == "failed"
    assert job.retries_left == 3


def test_a_warm_shutdown_finishes_what_runs_and_hands_back_the_rest(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    first = put(redis, [request(0, max_tokens=2)])
    running_too = put(redis, [request(i, max_tokens=30) for i in range(1, 4)])
    waiting = put(redis, [request(i, max_tokens=30) for i in range(4, 9)])

    with WorkerProcess(server.url, tmp_path, name="a", INGEST_MAX_IN_FLIGHT="4", **SLOW) as worker:
        wait_until(lambda: statuses(redis, first) == ["finished"], "the first is done, so the others are in the engine")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0

    assert statuses(redis, running_too) == ["finished"] * 3
    # One more may have taken the place of the first.
    assert statuses(redis, waiting[1:]) == ["queued"] * 4
    assert redis.lrange(keys.queue(QUEUE), -4, -1) == [job_id.encode() for job_id in waiting[1:]]
    assert not redis.exists(keys.worker_executions("a"))


def test_a_second_signal_hands_back_at_once_in_order_and_uncounted(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=4000) for i in range(300)])

    with WorkerProcess(server.url, tmp_path, name="a", INGEST_MAX_IN_FLIGHT="200", **SLOW) as worker:
        wait_until(lambda: running(redis) == 200, "200 are in flight")
        worker.signal(signal.SIGTERM)
        wait_until(lambda: "warm shut down requested" in worker.output, "the first signal was seen")
        # RQ takes a second signal within a second for an echo of the first.
        wait_until(lambda: (worker.signal(signal.SIGTERM), worker.process.poll() is not None)[1], "it ended")

    assert set(statuses(redis, job_ids)) == {"queued"}, worker.output
    assert redis.lrange(keys.queue(QUEUE), 0, -1) == [job_id.encode() for job_id in job_ids]
    assert {redis.hget(keys.job(job_id), "attempts") for job_id in job_ids[:200]} == {b"0"}
    assert running(redis) == 0


def test_leases_outlive_their_ttl_while_the_worker_works(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(0, max_tokens=2000)])

    def lease() -> list[tuple[bytes, float]]:
        return redis.zrange(keys.started(QUEUE), 0, -1, withscores=True)

    with WorkerProcess(server.url, tmp_path, name="a", INGEST_LEASE_TTL="1", **SLOW):
        wait_until(lease, "the document runs")
        (member, first), *_ = lease()
        wait_until(lambda: lease()[0][1] > first + 2, "the lease was renewed beyond its first end")
        assert lease()[0][0] == member
        assert statuses(redis, job_ids) == ["started"]


def test_a_killed_workers_documents_are_taken_over(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=30) for i in range(20)])
    with WorkerProcess(server.url, tmp_path, name="a", INGEST_LEASE_TTL="2", **SLOW) as worker:
        wait_until(lambda: running(redis) == 20, "all run")
        worker.signal(signal.SIGKILL)
        worker.wait()

    with WorkerProcess(server.url, tmp_path, name="b", INGEST_LEASE_TTL="2", **FAST):
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "the other worker finished them")
    assert {row(redis, job_id).attempts for job_id in job_ids} == {2}


def test_a_document_that_loses_every_worker_is_dead_lettered(redis: Redis) -> None:
    job_ids = put(redis, [request(0)], group_id="g")
    for attempt in range(1, 4):
        reply = scripts.lease(
            redis, QUEUE, worker="w", model="sim", admission=Admission(documents=1), lease_ttl=-1, call_id="0" * 14
        )
        assert reply.jobs[0].attempts == attempt
        returned = scripts.hand_back(redis, QUEUE, failure_ttl=60, max_crashes=3)
        assert (returned.queued, returned.dead_lettered) == ((1, 0) if attempt < 3 else (0, 1))

    job = fetched(redis, job_ids)[0]
    assert job.status == "failed"
    assert "WorkerLost" in (job.exception or "")
    assert redis.xlen(keys.group_done("g")) == 1


def test_a_late_result_is_fenced(redis: Redis) -> None:
    job_ids = put(redis, [request(0)])
    options = {"worker": "w", "model": "sim", "admission": Admission(documents=1)}
    late = scripts.lease(redis, QUEUE, lease_ttl=-1, call_id="0" * 14, **options).jobs[0]
    scripts.hand_back(redis, QUEUE, failure_ttl=60, max_crashes=3)
    current = scripts.lease(redis, QUEUE, lease_ttl=60, call_id="1" * 14, **options).jobs[0]

    def finish(job: scripts.LeasedJob, text: str) -> list[str]:
        item = scripts.Finish(job=job, kind="S", ttl=60, result_json=json.dumps(text).encode())
        return scripts.finish(redis, QUEUE, worker="w", model="sim", finishes=[item])

    assert finish(late, "late") == ["fenced"]
    assert finish(current, "current") == ["finished"]
    assert finish(late, "later") == ["fenced"]
    assert [result.return_value for result in rq_job(redis, job_ids[0]).results()] == ["current"]


def test_the_worker_outlives_a_restart_of_redis(server_binary: str | None, tmp_path: Path) -> None:
    with (
        EmbeddedServer(server_binary, appendfsync="always") as server,
        Redis.from_url(server.url) as redis,
        WorkerProcess(server.url, tmp_path, name="a", INGEST_ENGINE_STEP_MS="20") as worker,
    ):
        job_ids = put(redis, [request(i, max_tokens=50) for i in range(50)])
        wait_until(lambda: running(redis), "documents run")
        server.kill()
        wait_until(lambda: "kept in memory" in worker.output, "the worker noticed the outage")
        server.restart()
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "all is finished")
        assert [len(rq_job(redis, job_id).results()) for job_id in job_ids] == [1] * 50
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_rq_options_work_as_users_expect(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(i) for i in range(20)])

    limited = burst(server, "--max-jobs", "5")
    assert limited.returncode == 0
    assert statuses(redis, job_ids).count("finished") == 5

    run("rq", "suspend", url=server.url)
    suspended = burst(server)
    assert "suspended" in suspended.stdout + suspended.stderr
    run("rq", "resume", url=server.url)

    idle = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--max-idle-time", "1", QUEUE)
    assert run(*idle, url=server.url, settings={**SIMULATED, **FAST}).returncode == 0
    assert set(statuses(redis, job_ids)) == {"finished"}

    info = run("rq", "info", url=server.url).stdout
    assert "0 executing, 20 finished, 0 failed" in info


def test_suspension_stops_leasing_while_the_engine_is_busy(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    put(redis, [request(i, max_tokens=2000) for i in range(3)])
    with WorkerProcess(server.url, tmp_path, name="a", **SLOW):
        wait_until(lambda: running(redis) == 3, "all run")
        run("rq", "suspend", url=server.url)
        late = put(redis, [request(9)])
        looks = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
        wait_until(lambda: redis.info("commandstats")["cmdstat_evalsha"]["calls"] > looks + 10, "it looked again")
        assert statuses(redis, late) == ["queued"]
        run("rq", "resume", url=server.url)
        wait_until(lambda: statuses(redis, late) != ["queued"], "it goes on")


def test_rq_requeue_runs_a_failed_document_again(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(0, text="x" * 4000)])
    burst(server, INGEST_ENGINE_MAX_MODEL_LEN="500")
    assert statuses(redis, job_ids) == ["failed"]

    requeued = run("rq", "requeue", "--queue", QUEUE, job_ids[0], url=server.url)
    assert requeued.returncode == 0, requeued.stderr
    burst(server)

    assert statuses(redis, job_ids) == ["finished"]
    assert row(redis, job_ids[0]).attempts == 1
    assert job_ids[0] not in Queue(QUEUE, connection=redis).failed_job_registry.get_job_ids()


def test_workers_and_executions_are_listed(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    from rq import Worker

    job_ids = put(redis, [request(0, max_tokens=2000)])
    with WorkerProcess(server.url, tmp_path, name="listed", **SLOW):
        wait_until(lambda: statuses(redis, job_ids) == ["started"], "the document runs")
        (worker,) = Worker.all(connection=redis)
        assert worker.name == "listed"
        wait_until(lambda: Worker.all(connection=redis)[0].get_state() == "busy", "the worker shows that it is busy")
        (execution,) = rq_job(redis, job_ids[0]).get_executions()
        assert execution.worker_name == "listed"
        rq_job(redis, job_ids[0]).delete()
        wait_until(lambda: running(redis) == 0, "a deleted document is let go")


def test_waves_of_generate_finish_everything(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(i, max_tokens=3) for i in range(50)] + [request(99, text="")])

    burst(server, INGEST_FEED="generate", INGEST_MAX_IN_FLIGHT="16")

    assert statuses(redis, job_ids) == ["finished"] * 50 + ["failed"]


@pytest.mark.parametrize(
    ("command", "settings", "told"),
    [
        (["ingest@acme"], {}, "queue 'ingest@acme': a name has 1 to 128 letters, digits and _ . : -; tenants"),
        ([QUEUE], {"INGEST_MODL": "x"}, "INGEST_MODL is not a setting; did you mean INGEST_MODEL?"),
        ([QUEUE], {"INGEST_LEASE_TTL": "soon"}, "INGEST_LEASE_TTL='soon'"),
        ([QUEUE], {"INGEST_ENGINE_MAX_NUM_SEQ": "8"}, "did you mean max_num_seqs?"),
    ],
)
def test_bad_settings_are_one_line_and_no_traceback(
    server: EmbeddedServer, redis: Redis, command: list[str], settings: dict[str, str], told: str
) -> None:
    arguments = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", *command)
    failed = run(*arguments, url=server.url, settings={**SIMULATED, **settings})

    assert failed.returncode == 2
    assert told in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not redis.smembers("rq:workers")


def test_an_unsafe_server_is_named_at_start(server_binary: str | None) -> None:
    with EmbeddedServer(server_binary, appendonly="no", maxmemory_policy="allkeys-lru") as server:
        command = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", QUEUE)
        output = run(*command, url=server.url, settings={**SIMULATED, **FAST})
        assert "maxmemory-policy is 'allkeys-lru'" in output.stdout + output.stderr
        assert "appendonly is 'no'" in output.stdout + output.stderr


def test_the_key_prefix_of_rq_is_ours_too(server: EmbeddedServer, redis: Redis) -> None:
    script = """
import os
from redis import Redis
from support.jobs import put, request, statuses
redis = Redis.from_url(os.environ["RQ_REDIS_URL"])
ids = put(redis, [request(i) for i in range(5)], group_id="g")
import subprocess, sys
from support.processes import BIN
subprocess.run([BIN / "rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", "ingest"], check=True)
assert statuses(redis, ids) == ["finished"] * 5
assert all(key.startswith(b"{ingest}:") for key in redis.keys("*")), redis.keys("*")
"""
    settings = {**SIMULATED, **FAST, "RQ_KEY_PREFIX": "{ingest}", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], env=environment(server.url, settings), check=True, timeout=120)
