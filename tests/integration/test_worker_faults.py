"""What goes wrong around a worker stays where it went wrong. Faults are caused, on the simulated engine."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from redis import Redis
from redis.exceptions import ConnectionError
from rq import Queue, Worker
from rq.serializers import JSONSerializer
from rq.suspension import suspend

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.limits import AdmissionLimits, read_limits, write_limits
from ingestq.common.scripts import Admission
from ingestq.common.settings import Settings
from ingestq.workers.engines.base import Prompt
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.feed import feed_continuously
from ingestq.workers.housekeeper import Housekeeper
from ingestq.workers.pool import Ready
from support.faulty import DOCUMENT_ERRS, LOAD_SECONDS, STEP_RAISES, TOKENIZER_PANICS
from support.jobs import QUEUE, fetched, put, request, row, rq_job, statuses
from support.processes import SIMULATED, WorkerProcess, run, wait_until

FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
TESTS = str(Path(__file__).parents[1])
FAULTY = "support.faulty.FaultyWorker"


def burst(
    server: EmbeddedServer, *options: str, worker: str = "ingestq.workers.BatchWorker", **settings: str
) -> subprocess.CompletedProcess[str]:
    command = ("rq", "worker", "-w", worker, "--burst", *options, QUEUE)
    return run(*command, url=server.url, settings={**SIMULATED, **FAST, "PYTHONPATH": TESTS, **settings})


def lease(redis: Redis, *, want: int = 1, lease_ttl: float = 60.0, worker: str = "w") -> list[scripts.LeasedJob]:
    reply = scripts.lease(
        redis,
        QUEUE,
        worker=worker,
        model="sim",
        admission=Admission(documents=want),
        lease_ttl=lease_ttl,
        call_id="0" * 14,
    )
    return reply.jobs


# --- documents


def test_a_payload_that_breaks_a_parser_fails_alone(server: EmbeddedServer, redis: Redis) -> None:
    nested = "[" * 1005 + "]" * 1005
    bad = Queue(QUEUE, connection=redis, serializer=JSONSerializer).enqueue("ingestq.ingest", {})
    redis.hset(bad.key, "data", f"[{nested},null,[],{{}}]")
    honest = put(redis, [request(0)])

    done = burst(server)

    assert done.returncode == 0, done.stderr
    assert statuses(redis, [bad.id, *honest]) == ["failed", "finished"]


def test_a_tokenizers_panic_is_one_documents_failure(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(0), request(1, text=TOKENIZER_PANICS), request(2)])

    done = burst(server, worker=FAULTY)

    assert done.returncode == 0, done.stderr
    assert statuses(redis, job_ids) == ["finished", "failed", "finished"]
    assert "Panic while its prompt was built" in (row(redis, job_ids[1]).error_message or "")


def test_a_document_that_the_engine_fails_is_retried_then_dead_lettered(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(0, text=DOCUMENT_ERRS)], group_id="g", retries=2, retry_intervals_json="[0]")
    neighbour = put(redis, [request(1)])

    burst(server, worker=FAULTY)

    assert statuses(redis, [*job_ids, *neighbour]) == ["failed", "finished"]
    failure = row(redis, job_ids[0])
    assert (failure.error_class, failure.attempts) == ("EngineError", 3)
    assert "injected: this document failed" in (failure.error_message or "")
    # One terminal row, though it failed three times.
    assert redis.xlen(keys.group_done("g")) == 1


def test_an_engine_that_fails_ends_the_worker_and_counts_as_an_attempt(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(0, text=STEP_RAISES)])

    for attempt in (1, 2):
        assert burst(server, worker=FAULTY).returncode == 1
        assert statuses(redis, job_ids) == ["queued"]
        assert redis.hget(keys.job(job_ids[0]), "attempts") == str(attempt).encode()
    assert burst(server, worker=FAULTY).returncode == 1

    assert statuses(redis, job_ids) == ["failed"]
    assert "WorkerLost" in (fetched(redis, job_ids)[0].exception or "")


def test_names_in_a_refused_job_reach_the_log_cut_and_escaped(server: EmbeddedServer, redis: Redis) -> None:
    payload = {"document_id": "d", "text": "t", "model": "sim", "\x1b[31m" + "x" * 5000: 1}
    job = Queue(QUEUE, connection=redis, serializer=JSONSerializer).enqueue("ingestq.ingest", payload)

    output = burst(server)

    assert "\x1b[31m" not in output.stdout + output.stderr
    assert "x" * 200 not in output.stdout + output.stderr
    assert "Extra inputs are not permitted" in (fetched(redis, [job.id])[0].exception or "")


# --- what others put into Redis


def test_malformed_jobs_neither_stop_nor_spin_the_worker(server: EmbeddedServer, redis: Redis) -> None:
    redis.rpush(keys.queue(QUEUE), b"\xff", b"no:colon", b"", b"a-list", b"gone")
    redis.rpush(keys.job("a-list"), "x")
    odd = put(redis, [request(0), request(1)])
    redis.hset(keys.job(odd[0]), mapping={"attempts": "x", "result_ttl": 10**17, "failure_ttl": "soon"})
    redis.hset(keys.job(odd[1]), mapping={"result_ttl": -7, "groups": "no such group \xff"})

    done = burst(server)

    assert done.returncode == 0, done.stderr
    assert statuses(redis, odd) == ["finished", "finished"]
    assert redis.llen(keys.queue(QUEUE)) == 0
    assert redis.ttl(keys.job(odd[1])) == -1  # below 0: for ever, as in RQ


def test_maintenance_calls_nothing_that_redis_names(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    (tmp_path / "evilmod.py").write_text(f"open({str(trap)!r}, 'w')\ndef callback(*args):\n    pass\n")
    job_ids = put(redis, [request(0)])
    (job,) = lease(redis)
    redis.hset(keys.job(job.job_id), "failure_callback_name", "evilmod.callback")
    redis.zadd(keys.started(QUEUE), {job.member: 1})  # long expired, also by RQ's reckoning

    burst(server, PYTHONPATH=f"{TESTS}:{tmp_path}")

    assert not trap.exists()
    assert statuses(redis, job_ids) == ["failed"]
    assert "'on_failure' is not served" in (fetched(redis, job_ids)[0].exception or "")


def test_documents_behind_another_models_backlog_are_found(server: EmbeddedServer, redis: Redis) -> None:
    others = put(redis, [request(i, model="other") for i in range(3000)])
    mine = put(redis, [request(i) for i in range(200)])
    calls = redis.info("commandstats")["cmdstat_evalsha"]["calls"]

    burst(server)

    assert set(statuses(redis, mine)) == {"finished"}
    assert redis.llen(keys.queue(QUEUE)) == len(others)
    # Far ahead of its own documents it looks at 1,024 positions a call.
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - calls < 200


# --- leases


def test_all_expired_leases_are_taken_over_at_once(server: EmbeddedServer, redis: Redis) -> None:
    job_ids = put(redis, [request(i) for i in range(300)])
    held = [job for _ in range(3) for job in lease(redis, want=128)]
    redis.zadd(keys.started(QUEUE), {job.member: 1 for job in held})

    burst(server)

    assert set(statuses(redis, job_ids)) == {"finished"}
    assert {row(redis, job_id).attempts for job_id in job_ids} == {2}


def test_leases_are_not_taken_over_right_after_an_outage(redis: Redis) -> None:
    put(redis, [request(0)])
    lease(redis, lease_ttl=-1)
    housekeeper = Housekeeper(
        redis,
        Settings(queue=QUEUE, model="sim"),
        queues=[QUEUE],
        worker="b",
        incarnation="",
        worker_ttl=480,
        guardian=None,
        vitals=None,
        look=lambda: None,
        state=lambda: "idle",
        register=lambda: None,
        replaced=lambda: None,
        duties={},
    )

    def outage() -> None:
        raise ConnectionError("gone")

    housekeeper._attempt(outage)
    housekeeper._take_over()
    assert redis.llen(keys.queue(QUEUE)) == 0, "its owner, back from the same outage, is about to renew it"

    housekeeper._in_touch_since -= 30.0  # half a lease later
    housekeeper._take_over()
    assert redis.llen(keys.queue(QUEUE)) == 1


@pytest.mark.parametrize("ttl", [-1, 3600])
def test_a_dead_letter_is_kept_as_long_as_its_job_says(redis: Redis, ttl: int) -> None:
    job_ids = put(redis, [request(0)], failure_ttl=ttl)
    lease(redis, lease_ttl=-1)

    assert scripts.hand_back(redis, QUEUE, failure_ttl=60, max_crashes=1).dead_lettered == 1

    assert statuses(redis, job_ids) == ["failed"]
    for key in (keys.job(job_ids[0]), keys.results(job_ids[0])):
        assert redis.ttl(key) in (ttl, ttl - 1) if ttl > 0 else redis.ttl(key) == -1


def test_a_prompt_cancelled_on_its_way_to_the_engine_does_not_run() -> None:
    engine = SimulatedEngine.from_settings(Settings(engine="simulated", model="sim", engine_args={"time_scale": 0}))
    ready = [
        Ready(
            prompt=Prompt(prompt_id=name, token_ids=engine.encode(name), sampling=request(0).sampling),
            num_blocks=1,
            expected_output=1.0,
            kv_tokens=16,
        )
        for name in ("a", "b", "c")
    ]
    waiting = [ready[1:]]
    aborts: SimpleQueue[str] = SimpleQueue()
    completed = []
    courier = SimpleNamespace(
        start_ready=lambda load: waiting.pop() if waiting else [],
        aborts=aborts,
        in_flight=0,
        closing=False,
        post=completed.append,
        observe=lambda report: None,
    )
    aborts.put("b")

    feed_continuously(engine, courier, ready[:1], lambda: False, lambda: None)

    assert sorted(message.prompt_id for message in completed) == ["a", "c"]


# --- the worker's own life


@pytest.mark.parametrize("limits", [{"max_in_flight": 4}, {"max_in_flight_fleet": 4}])
def test_a_burst_ends_under_limits(server: EmbeddedServer, redis: Redis, limits: dict[str, int]) -> None:
    write_limits(redis, QUEUE, AdmissionLimits(**limits))
    assert read_limits(redis, QUEUE) == AdmissionLimits(**limits)
    job_ids = put(redis, [request(i) for i in range(20)])

    assert burst(server).returncode == 0

    assert set(statuses(redis, job_ids)) == {"finished"}


def test_suspended_time_is_not_idle_time(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with WorkerProcess(server.url, tmp_path, "--max-idle-time", "2", name="a", **FAST) as worker:
        suspend(redis)  # what `rq suspend` does, before the worker has been idle for long
        wait_until(lambda: "suspended" in worker.output, "the worker is suspended")
        wait_until(lambda: redis.hget(keys.worker("a"), "state") == b"suspended", "and says so")
        job_ids = put(redis, [request(i) for i in range(3)])
        # Longer than it may be idle, by the server's clock.
        start = redis.time()[0]
        wait_until(lambda: redis.time()[0] >= start + 4, "time passes")
        run("rq", "resume", url=server.url)
        wait_until(lambda: statuses(redis, job_ids) == ["finished"] * 3, "it goes on")
        assert worker.wait() == 0


def test_a_signal_while_the_engine_loads_leaves_no_record(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    put(redis, [request(0)])
    worker = WorkerProcess(server.url, tmp_path, name="a", worker=FAULTY, PYTHONPATH=TESTS, **{LOAD_SECONDS: "3600"})
    worker.start()
    wait_until(lambda: "loading the engine" in worker.output, "it loads")
    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    assert not redis.smembers("rq:workers")
    assert "Traceback" not in worker.output


def test_a_worker_that_redis_forgot_registers_again(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with WorkerProcess(server.url, tmp_path, name="a", INGEST_LEASE_TTL="1", **FAST):
        redis.delete(keys.worker("a"))
        redis.srem("rq:workers", keys.worker("a"))
        wait_until(lambda: [worker.name for worker in Worker.all(connection=redis)] == ["a"], "it is listed again")
        assert Worker.all(connection=redis)[0].pid


def test_results_written_at_the_last_moment_are_not_handed_back(redis: Redis) -> None:
    """A completion that is in the mail when the courier is told to close is written."""
    from ingestq.workers.courier import Completed, Courier
    from ingestq.workers.drain_bounds import drain_controller
    from ingestq.workers.rows import RowWriter
    from ingestq.workers.vitals import Vitals

    job_ids = put(redis, [request(0), request(1)])
    settings = Settings(engine="simulated", model="sim", queue=QUEUE, engine_args={"time_scale": 0})
    engine = SimulatedEngine.from_settings(settings)
    rows = RowWriter(worker="a", card=engine.card, result_ttl=60, failure_ttl=60)
    courier = Courier(redis, settings, engine, drain_controller(settings, engine, None), rows, Vitals.create())
    courier.start()
    wait_until(lambda: courier.in_flight == 2, "both are leased")
    wait_until(lambda: len(courier.pool) == 2, "both are ready")
    (completion,) = engine.generate([courier.pool.drain()[0].prompt])
    courier.post(Completed(completion.prompt_id, completion))
    courier.close(10.0)

    assert statuses(redis, job_ids) == ["finished", "queued"]
    assert rq_job(redis, job_ids[1]).get_status() == "queued"
    assert redis.hget(keys.job(job_ids[1]), "attempts") == b"0"


def test_a_second_copy_of_an_id_costs_no_other_its_place(redis: Redis) -> None:
    """A cancelled and re-enqueued document is twice in the queue's list, here around another model's."""
    (mine,) = put(redis, [request(0)])
    (other,) = put(redis, [request(1, model="other")])
    redis.rpush(keys.queue(QUEUE), mine, mine)
    (last,) = put(redis, [request(2)])

    leased = [job.job_id for job in lease(redis, want=10)]

    assert leased == [mine, last]
    assert redis.lrange(keys.queue(QUEUE), 0, -1) == [other.encode()]
