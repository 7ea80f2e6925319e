"""What survives a worker, and what ends one that should not live: real processes, killed, stopped and hung."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from redis import Redis
from rq import Worker

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.machine_health import read_health, record_failure
from ingestq.common.scripts import Admission
from ingestq.workers.processes import identity, is_dead
from support.faulty import CHILD, LOAD_RAISES, LOAD_SECONDS, LOAD_SWALLOWS, MACHINE, ORDERS, POISONS
from support.jobs import QUEUE, fetched, put, request, row, rq_job, statuses
from support.processes import WorkerProcess, children, run, wait_until

TESTS = str(Path(__file__).parents[1])
# Long enough that nothing in these tests comes back by the end of its lease.
LONG = {"INGEST_LEASE_TTL": "600"}
# A step takes a tenth of a second, so that documents stay in flight.
SLOW = {"INGEST_ENGINE_STEP_MS": "100"}


def faulty(server: EmbeddedServer, folder: Path, *options: str, name: str = "w", **settings: str) -> WorkerProcess:
    settings = {"PYTHONPATH": TESTS, MACHINE: name, **LONG, **SLOW, ORDERS: str(folder / f"{name}.orders"), **settings}
    return WorkerProcess(server.url, folder, *options, name=name, worker="support.faulty.FaultyWorker", **settings)


def order(folder: Path, what: str, *, name: str = "w") -> None:
    """Tells a faulty worker what to do; it appears at once, whole."""
    (folder / "order").write_text(what)
    (folder / "order").rename(folder / f"{name}.orders")


def guardian_of(worker: WorkerProcess) -> int:
    (pid,) = [pid for pid, command in children(worker.process.pid) if "ingestq.workers.guardian" in command]
    return pid


def in_flight(redis: Redis) -> int:
    return int(redis.zcard(keys.started(QUEUE)))


def queued(redis: Redis) -> list[str]:
    return [job_id.decode() for job_id in redis.lrange(keys.queue(QUEUE), 0, -1)]


# --- a worker that is gone


def test_a_killed_workers_leases_return_at_once_in_order(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=3_000) for i in range(300)])
    with faulty(server, tmp_path, INGEST_MAX_IN_FLIGHT="200") as worker:
        wait_until(lambda: in_flight(redis) == 200, "it is full")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: in_flight(redis) == 0, "its guardian hands back what it held")

    assert queued(redis) == job_ids
    assert redis.hmget(keys.job(job_ids[0]), "attempts", "crashes") == [b"1", b"1"]
    wait_until(lambda: not Worker.all(connection=redis), "and takes it off RQ's list")
    said = "killed by signal 9 (SIGKILL); 200 documents queued again, 0 failed"
    wait_until(lambda: said in worker.output, "and says so, last of all")
    assert rq_job(redis, job_ids[0]).get_status() == "queued"


@pytest.mark.parametrize(
    ("death", "told"),
    [("segfault", r"killed by signal 11 \(SIGSEGV\)"), ("exhaust", r"killed by signal 9 \(SIGKILL\)")],
)
@pytest.mark.parametrize("instant", ["after-lease", "feed", "step", "before-finish", "after-finish"])
def test_a_dead_letter_says_how_its_worker_ended(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, instant: str, death: str, told: str
) -> None:
    with faulty(server, tmp_path, INGEST_MAX_CRASHES="1") as worker:
        order(tmp_path, f"{instant} {death}")
        job_ids = put(redis, [request(0)])
        worker.wait()

    wait_until(lambda: in_flight(redis) == 0, "nothing is held")
    if instant == "after-finish":
        assert statuses(redis, job_ids) == ["finished"]
    else:
        assert re.search(f"WorkerLost: 1 workers were lost .* {told}", fetched(redis, job_ids)[0].exception or "")


def test_one_poison_among_many_is_failed_alone(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    poison, how = next(iter(POISONS.items()))
    job_ids = put(redis, [request(i, text=f"{i} {poison}" if i == 11 else f"text {i}") for i in range(30)])
    starts = 0
    while {"queued", "started"} & set(statuses(redis, job_ids)):
        starts += 1
        assert starts <= 4, "three workers died of it, and one did the rest"
        with faulty(server, tmp_path, "--burst", INGEST_MAX_IN_FLIGHT="16", INGEST_ENGINE_STEP_MS="1") as worker:
            worker.wait()
            wait_until(lambda: in_flight(redis) == 0, "its leases are back")

    wrong = {job.job_id: job for job in fetched(redis, job_ids) if job.status != "finished"}
    assert list(wrong) == [job_ids[11]]
    assert how in (wrong[job_ids[11]].exception or "")
    # Its neighbours, too, were there when a worker died; that is no attempt of theirs to fail.
    assert {row(redis, job_id).status for job_id in job_ids if job_id not in wrong} == {"succeeded"}


def test_processes_that_a_worker_leaves_behind_are_killed(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with faulty(server, tmp_path, **{CHILD: "1"}) as worker:
        (child,) = [pid for pid, command in children(worker.process.pid) if "sleep" in command]
        started = identity(child)
        worker.signal(signal.SIGKILL)
        wait_until(lambda: is_dead(started), "the engine's process is gone")


def test_without_guardian_and_worker_another_worker_takes_over(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=40) for i in range(20)])
    with faulty(server, tmp_path, name="a", INGEST_LEASE_TTL="2") as lost:
        wait_until(lambda: in_flight(redis) == 20, "all are leased")
        os.kill(guardian_of(lost), signal.SIGKILL)
        lost.signal(signal.SIGKILL)
        lost.wait()
        assert in_flight(redis) == 20
        with faulty(server, tmp_path, name="b", INGEST_LEASE_TTL="2", INGEST_ENGINE_STEP_MS="1"):
            wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "the other one finishes all")

    assert {row(redis, job_id).worker for job_id in job_ids} == {"b"}


def test_a_killed_guardian_is_replaced_and_leases_live_on(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=60) for i in range(5)])
    with faulty(server, tmp_path, INGEST_LEASE_TTL="1") as worker:
        wait_until(lambda: in_flight(redis) == 5, "all are leased")
        first = guardian_of(worker)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: [pid for pid, _ in children(worker.process.pid)] not in ([], [first]), "another one starts")
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "six leases later all are done")

    assert {row(redis, job_id).attempts for job_id in job_ids} == {1}


def test_a_stopped_guardian_does_not_cost_the_leases(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=50) for i in range(5)])
    with faulty(server, tmp_path, INGEST_LEASE_TTL="1") as worker:
        wait_until(lambda: in_flight(redis) == 5, "all are leased")
        guardian = guardian_of(worker)
        os.kill(guardian, signal.SIGSTOP)
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "five leases later all are done")
        os.kill(guardian, signal.SIGKILL)

    assert {row(redis, job_id).attempts for job_id in job_ids} == {1}


# --- a worker that should not live


@pytest.mark.parametrize("fault", ["step hang 3600", "step hold-gil 3600", "before-finish hold-gil 3600"])
def test_a_hung_worker_keeps_its_leases_until_its_guardian_kills_it(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, fault: str
) -> None:
    settings = {"INGEST_LEASE_TTL": "1", "INGEST_STEP_TIMEOUT": "3", "FAULTY_SOCKET_TIMEOUT": "1"}
    with faulty(server, tmp_path, **settings) as worker:
        order(tmp_path, fault)
        job_ids = put(redis, [request(i, max_tokens=20) for i in range(5)])
        assert worker.wait() == -signal.SIGKILL
        wait_until(lambda: in_flight(redis) == 0, "its leases are back")

    assert queued(redis) == job_ids
    # Once: they did not lapse while the worker hung for three times as long as a lease lasts.
    assert {redis.hget(keys.job(job_id), "crashes") for job_id in job_ids} == {b"1"}
    assert "is killed: " in worker.output


def test_a_stopped_worker_is_killed_at_its_deadline(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(5)])
    with faulty(server, tmp_path, INGEST_STEP_TIMEOUT="2") as worker:
        wait_until(lambda: in_flight(redis) == 5, "all are leased")
        worker.signal(signal.SIGSTOP)
        assert worker.wait() == -signal.SIGKILL
        wait_until(lambda: queued(redis) == job_ids, "its leases are back")


def test_late_results_of_a_worker_taken_for_dead_are_fenced(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=30) for i in range(20)], group_id="g")
    settings = {"INGEST_LEASE_TTL": "2"}
    with faulty(server, tmp_path, name="a", **settings) as stopped:
        wait_until(lambda: in_flight(redis) == 20, "all are leased")
        guardian = guardian_of(stopped)
        os.kill(guardian, signal.SIGSTOP)
        stopped.signal(signal.SIGSTOP)
        with faulty(server, tmp_path, name="b", INGEST_ENGINE_STEP_MS="1", **settings):
            wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "the other one has done all")
        os.kill(guardian, signal.SIGCONT)
        stopped.signal(signal.SIGCONT)
        # It goes on, with what it does not hold any more out of its engine.
        more = put(redis, [request(100)])
        wait_until(lambda: statuses(redis, more) == ["finished"], "the woken worker goes on")
        wait_until(lambda: "the lease is gone" in stopped.output or "results dropped" in stopped.output, "and says so")

    assert {row(redis, job_id).worker for job_id in job_ids} == {"b"}
    assert redis.xlen(keys.group_done("g")) == 20
    assert row(redis, more[0]).worker == "a"


# --- preemption and shutdown


@contextmanager
def metadata_server() -> Iterator[tuple[str, threading.Event]]:
    """A stand-in for Google's metadata server, and what makes it say that the machine is preempted."""
    preempted = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"TRUE" if preempted.is_set() else b"FALSE")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/computeMetadata/v1/instance/preempted", preempted
    finally:
        server.shutdown()
        server.server_close()


def test_a_preempted_worker_hands_back_while_a_step_goes_on(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    done = put(redis, [request(1000, max_tokens=1)])
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(50)])
    with (
        metadata_server() as (url, preempted),
        faulty(server, tmp_path, INGEST_PREEMPTION_URL=url, INGEST_MAX_IN_FLIGHT="20") as worker,
    ):
        wait_until(lambda: statuses(redis, done) == ["finished"] and in_flight(redis) == 20, "it is full")
        order(tmp_path, "step hang 3600")
        wait_until(lambda: not (tmp_path / "w.orders").exists(), "a step goes on for an hour")
        preempted.set()
        wait_until(lambda: in_flight(redis) == 0, "all is handed back")

    assert queued(redis) == job_ids
    assert {redis.hget(keys.job(job_id), "attempts") for job_id in job_ids[:20]} == {b"0"}
    assert redis.hget(keys.job(job_ids[0]), "crashes") is None
    assert "about to be preempted" in worker.output


def test_a_second_signal_hands_back_while_a_step_goes_on(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(10)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: in_flight(redis) == 10, "all are leased")
        order(tmp_path, "step hang 3600")
        wait_until(lambda: not (tmp_path / "w.orders").exists(), "a step goes on for an hour")
        worker.signal(signal.SIGTERM)
        second = redis.time()[0] + 2
        wait_until(lambda: redis.time()[0] > second, "RQ counts a second signal after a second")
        worker.signal(signal.SIGTERM)
        wait_until(lambda: in_flight(redis) == 0, "all is handed back")

    assert queued(redis) == job_ids
    assert {redis.hget(keys.job(job_id), "attempts") for job_id in job_ids} == {b"0"}


def test_the_kill_of_a_worker_that_was_told_to_stop_is_no_crash(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(10)])
    first = put(redis, [request(1000, max_tokens=1)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: statuses(redis, first) == ["finished"], "all are in the engine")
        worker.signal(signal.SIGTERM)
        wait_until(lambda: redis.hget(keys.worker("w"), "shutdown_requested_date"), "it knows")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: queued(redis) == job_ids, "all is handed back")

    assert {tuple(redis.hmget(keys.job(job_id), "attempts", "crashes")) for job_id in job_ids} == {(b"0", None)}
    assert read_health(redis, QUEUE) == {}


def test_a_signal_during_a_step_is_heard_at_once(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    first = put(redis, [request(1000, max_tokens=1)])
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(10)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: statuses(redis, first) == ["finished"], "all are in the engine")
        order(tmp_path, "step hang 3600")
        wait_until(lambda: not (tmp_path / "w.orders").exists(), "a step goes on for an hour")
        more = put(redis, [request(2000)])
        worker.signal(signal.SIGTERM)
        soon = redis.time()[0] + 2
        wait_until(lambda: redis.time()[0] > soon, "ten looks of the housekeeper later")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: in_flight(redis) == 0, "all is handed back")

    assert set(queued(redis)) == {*job_ids, *more}
    assert {tuple(redis.hmget(keys.job(job_id), "attempts", "crashes")) for job_id in job_ids} == {(b"0", None)}


@pytest.mark.parametrize("swallowed", ["", "1"])
def test_a_signal_while_an_engine_loads_ends_the_worker_whatever_the_engine_makes_of_it(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, swallowed: str
) -> None:
    job_ids = put(redis, [request(0)])
    worker = faulty(server, tmp_path, **{LOAD_SECONDS: "3600", LOAD_SWALLOWS: swallowed})
    worker.start()
    wait_until(lambda: "loading the engine" in worker.output, "it loads")
    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    assert read_health(redis, QUEUE) == {}
    assert statuses(redis, job_ids) == ["queued"]


def test_a_machine_that_is_preempted_while_an_engine_loads_stops_it(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    with metadata_server() as (url, preempted):
        worker = faulty(server, tmp_path, INGEST_PREEMPTION_URL=url, **{LOAD_SECONDS: "3600"})
        worker.start()
        wait_until(lambda: "loading the engine" in worker.output, "it loads")
        preempted.set()
        assert worker.wait() in (0, -signal.SIGKILL)
    assert read_health(redis, QUEUE) == {}


# --- names


def test_a_name_is_never_taken_from_a_live_worker(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    put(redis, [request(0, max_tokens=10_000)])
    with faulty(server, tmp_path) as first:
        wait_until(lambda: in_flight(redis) == 1, "it holds a lease")
        (tmp_path / "other").mkdir()
        second = faulty(server, tmp_path / "other")
        second.start()

        assert second.wait() == 2
        assert re.search(r"a worker named 'w' is alive; .* its name is free in \d+ s", second.output)
        assert "Traceback" not in second.output
        assert in_flight(redis) == 1
        assert [worker.pid for worker in Worker.all(connection=redis)] == [first.process.pid]


def test_the_next_worker_of_a_name_takes_over_what_a_dead_one_held(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=50) for i in range(10)])
    with faulty(server, tmp_path) as first:
        wait_until(lambda: in_flight(redis) == 10, "all are leased")
        os.kill(guardian_of(first), signal.SIGKILL)
        first.signal(signal.SIGKILL)
        first.wait()
    with faulty(server, tmp_path, INGEST_ENGINE_STEP_MS="1"):
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "ten minutes before the leases end")

    assert {row(redis, job_id).attempts for job_id in job_ids} == {2}


def test_a_worker_whose_name_was_taken_stops_and_leaves_its_successor_alone(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(5)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: in_flight(redis) == 5, "all are leased")
        # As if it had been stopped for longer than its leases last, on a machine that others can't look into.
        redis.hset(keys.worker("w"), "alive_until", 0)
        record = {field.decode(): value for field, value in redis.hgetall(keys.worker("w")).items()}
        put(redis, [request(i, model="other") for i in range(100, 103)])
        claimed = scripts.claim(
            redis, QUEUE, worker="w", incarnation="another", dead="", lease_ttl=600, worker_ttl=600, record=record
        )
        assert claimed == 0
        successors = scripts.lease(
            redis, QUEUE, worker="w", model="other", admission=Admission(documents=3), lease_ttl=600, call_id="0" * 14
        ).jobs
        assert worker.wait() == 0
        assert "another worker has taken this name" in worker.output

    assert redis.hmget(keys.worker("w"), "incarnation", "death") == [b"another", None]
    assert queued(redis) == job_ids
    assert {member.decode() for member in redis.smembers(keys.worker_executions("w"))} == {
        job.member for job in successors
    }
    assert in_flight(redis) == 3


def test_a_new_guardian_knows_what_the_old_one_was_told(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    put(redis, [request(0, max_tokens=10_000)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: in_flight(redis) == 1, "it runs")
        first = guardian_of(worker)
        os.kill(first, signal.SIGKILL)
        renewed = redis.hget(keys.worker("w"), "alive_until")
        wait_until(lambda: redis.hget(keys.worker("w"), "alive_until") != renewed, "another one is at work")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: in_flight(redis) == 0, "it hands back")
        wait_until(lambda: "w" in read_health(redis, QUEUE), "and takes note")

    assert (read_health(redis, QUEUE)["w"].start_failures, read_health(redis, QUEUE)["w"].run_failures) == (0, 1)


# --- a machine whose engine fails


def test_start_failures_in_a_row_end_in_refusal_until_forgiven(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(0)])
    for _ in range(2):
        worker = faulty(server, tmp_path, "--burst", **{LOAD_RAISES: "no such chip", "INGEST_MAX_FAILURES": "2"})
        worker.start()
        assert worker.wait() == 1
    health = read_health(redis, QUEUE)["w"]
    assert (health.start_failures, health.reason) == (2, "the engine does not start: RuntimeError: no such chip")

    worker = faulty(server, tmp_path)
    worker.start()
    try:
        wait_until(lambda: "No work is taken here" in worker.output, "the third start is not even tried")
        assert statuses(redis, job_ids) == ["queued"]
        assert redis.hget(keys.job(job_ids[0]), "attempts") is None
        shown = " ".join(run("ingestq", "status", url=server.url).stdout.split())
        assert "machine w: takes no work: 2 failures in a row" in shown
        assert "no such chip" in shown

        assert run("ingestq", "forgive", "w", url=server.url).returncode == 0
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "once forgiven it goes to work")
        assert read_health(redis, QUEUE) == {}
    finally:
        worker.signal(signal.SIGKILL)
        worker.wait()


def test_an_engine_that_fails_its_first_prompt_takes_no_documents(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(0)])
    order(tmp_path, "step raise")
    worker = faulty(server, tmp_path)
    worker.start()

    assert worker.wait() == 1
    assert redis.hget(keys.job(job_ids[0]), "attempts") is None
    assert read_health(redis, QUEUE)["w"].start_failures == 1


def test_a_finished_document_ends_a_row_of_failures(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    for _ in range(4):  # eight seconds of back-off
        record_failure(redis, QUEUE, "w", "run", "it was killed", max_failures=5)
    job_ids = put(redis, [request(0)])
    with faulty(server, tmp_path) as worker:
        assert "next start in" in worker.output
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "it works")
        wait_until(lambda: read_health(redis, QUEUE) == {}, "and that is known")


# --- Redis


def test_the_end_of_a_worker_in_an_outage_is_quiet_and_its_guardian_hands_back(
    server_binary: str | None, tmp_path: Path
) -> None:
    with EmbeddedServer(server_binary) as server, Redis.from_url(server.url) as redis:
        job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(5)])
        first = put(redis, [request(1000, max_tokens=1)])
        with faulty(server, tmp_path) as worker:
            wait_until(lambda: statuses(redis, first) == ["finished"], "all are in the engine")
            server.kill()
            worker.signal(signal.SIGTERM)
            before = time.monotonic() + 1.5
            wait_until(lambda: time.monotonic() > before, "RQ counts a second signal after a second")
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert worker.output.count("results are kept in memory") < 40
            server.restart()
            wait_until(lambda: queued(redis) == job_ids, "its guardian hands back what it held")

        assert {redis.hget(keys.job(job_id), "crashes") for job_id in job_ids} == {None}


def test_a_take_over_that_a_stalled_server_runs_late_does_nothing(redis: Redis) -> None:
    put(redis, [request(0)])
    scripts.lease(
        redis, QUEUE, worker="x", model="sim", admission=Admission(documents=1), lease_ttl=-1, call_id="0" * 14
    )
    late = scripts.hand_back(redis, QUEUE, failure_ttl=60, max_crashes=3, not_after=redis.time()[0] - 1)
    assert late == scripts.HandedBack()
    assert scripts.hand_back(redis, QUEUE, failure_ttl=60, max_crashes=3, not_after=redis.time()[0] + 60).queued == 1


@pytest.mark.parametrize("key", [keys.queue(QUEUE), keys.failed(QUEUE)])
def test_a_key_of_the_queue_that_is_something_else_costs_no_document(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, key: str
) -> None:
    job_ids = put(redis, [request(i, max_tokens=10_000) for i in range(5)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: in_flight(redis) == 5 and not redis.exists(keys.queue(QUEUE)), "all are leased")
        redis.hset(key, "something", "else")
        worker.signal(signal.SIGKILL)
        wait_until(lambda: in_flight(redis) == 0, "its guardian hands back what it held")

    assert queued(redis) == job_ids
    assert redis.type(key) in (b"list", b"none")


def test_a_worker_signs_off_from_a_full_redis(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with faulty(server, tmp_path) as worker:
        redis.config_set("maxmemory", 1)
        try:
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert not Worker.all(connection=redis)
        finally:
            redis.config_set("maxmemory", 0)


# --- documents that take too long, keys that hold something else


def test_a_document_past_its_deadline_fails_alone(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    late = put(redis, [request(0, max_tokens=10_000)])
    with faulty(server, tmp_path, INGEST_DOCUMENT_TIMEOUT="3", INGEST_ENGINE_STEP_MS="20"):
        wait_until(lambda: statuses(redis, late) == ["failed"], "the long one is given up")
        more = put(redis, [request(1)])
        wait_until(lambda: statuses(redis, more) == ["finished"], "the worker goes on")

    assert row(redis, late[0]).error_class == "DocumentTimeout"
    assert in_flight(redis) == 0


def test_a_result_under_a_key_of_another_type_costs_no_neighbour_its_row(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, max_tokens=10) for i in range(5)])
    with faulty(server, tmp_path) as worker:
        wait_until(lambda: in_flight(redis) == 5, "all are leased")
        redis.set(keys.results(job_ids[1]), "not a stream")
        redis.delete(keys.job(job_ids[2]))
        redis.rpush(keys.job(job_ids[2]), "not a hash")
        wait_until(lambda: in_flight(redis) == 0, "nothing is held")
        assert worker.process.poll() is None

    assert statuses(redis, job_ids) == ["finished", "finished", "", "finished", "finished"]
