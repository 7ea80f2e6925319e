"""`ingestq status` of a queue, live: what waits, what is in flight against which limit, what each worker does."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import publish
from ingestq.common.limits import AdmissionLimits, write_limits
from ingestq.common.machine_health import record_failure
from ingestq.common.worker_load import LOAD_TTL, Closed, WorkerLoad, publish_load
from ingestq.producer import IngestQueue
from ingestq.producer.cli_status import speculation_advice
from support import processes
from support.hand_worker import lease, request
from support.jobs import put
from support.jobs import request as simulated_request
from support.live_workers import card, load
from support.processes import BIN, WorkerProcess, environment, wait_until

Status = Callable[..., str]


@pytest.fixture
def status(server: EmbeddedServer, redis: Redis) -> Status:
    def run(*arguments: str, columns: int = 100) -> str:
        settings = {"COLUMNS": str(columns)}
        done = processes.run("ingestq", "status", *arguments, url=server.url, settings=settings, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


@pytest.fixture
def state(status: Status) -> Callable[[], dict[str, Any]]:
    return lambda: orjson.loads(status("--json"))


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis)


def join(redis: Redis, worker: str, worker_load: WorkerLoad | None) -> None:
    publish(redis, "ingest", worker, card())
    if worker_load is not None:
        publish_load(redis, ["ingest"], worker, worker_load)


# --- what waits


def test_the_oldest_and_the_eta_are_told(status: Status, queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many([request(name) for name in "abc"])
    [_, job_id, _] = redis.lrange(keys.queue("ingest"), 0, -1)
    redis.hset(keys.job(job_id.decode()), "enqueued_ms", int(redis.time()[0] - 10 * 86400) * 1000)
    join(redis, "w1", load(documents_per_s=0.5))

    assert "queued: 3, the oldest for 10 days, ETA 6 s at 0.5 documents/s" in status().splitlines()


def test_without_a_rate_the_eta_is_unknown(
    status: Status, state: Callable[[], dict[str, Any]], queue: IngestQueue
) -> None:
    queue.enqueue(request("a"))

    assert "ETA unknown: nothing was finished in the last minute" in status()
    assert (state()["queued"], state()["eta_s"]) == (1, None)


def test_tenants_are_listed_with_their_queues(
    status: Status, state: Callable[[], dict[str, Any]], queue: IngestQueue
) -> None:
    queue.enqueue_many([request(name) for name in "abc"], tenant="acme")
    queue.enqueue(request("d"), tenant="beta")
    queue.enqueue(request("e"))

    lines = status().splitlines()
    tenants = state()["tenants"]

    assert lines[1].startswith("queued: 5, the oldest for ")
    assert [line.partition(",")[0] for line in lines[2:5]] == ["  tenant acme: 3", "  no tenant: 1", "  tenant beta: 1"]
    assert {name: tenant["queued"] for name, tenant in tenants.items()} == {"": 1, "acme": 3, "beta": 1}


def test_without_tenants_none_are_listed(status: Status, queue: IngestQueue) -> None:
    queue.enqueue(request("a"))

    assert "tenant" not in status()


def test_what_strangers_write_in_place_of_a_list_keeps_nobody_from_looking(
    state: Callable[[], dict[str, Any]], queue: IngestQueue, redis: Redis
) -> None:
    queue.enqueue(request("a"))
    redis.zadd(keys.tenants("ingest"), {"": 0, "evil": 0, "\x1b[2J": 0})
    redis.hset(keys.queue("ingest", "evil"), "no", "list")

    assert {name: tenant["queued"] for name, tenant in state()["tenants"].items()} == {"": 1, "evil": 0, "\x1b[2J": 0}


def test_absurd_numbers_of_a_worker_are_shown_as_they_are(
    status: Status, state: Callable[[], dict[str, Any]], redis: Redis
) -> None:
    join(redis, "w1", load(kv_tokens=10**30))

    assert state()["workers"][0]["load"]["kv_tokens"] == 1e30  # as orjson reads it
    assert "1,000,000," in status()


# --- what is in flight


def test_the_fleet_stands_against_its_limits(
    status: Status, state: Callable[[], dict[str, Any]], queue: IngestQueue, redis: Redis
) -> None:
    write_limits(redis, "ingest", AdmissionLimits(max_in_flight_fleet=2, max_kv_tokens_fleet=1_000_000))
    queue.enqueue_many([request(name) for name in "abc"])
    tokens = sum(job.kv_tokens for job in lease(redis))
    join(redis, "w1", load())
    join(redis, "w2", load(ttft_p95_ms=1_900.0, decode_tokens_per_s=None))

    lines = status().splitlines()
    fleet = state()["fleet"]

    assert f"in flight: 2 of 2 documents, {tokens} of 1,000,000 KV tokens" in lines
    assert "closed: fleet: 2 documents are in flight, max_in_flight_fleet is 2" in lines
    assert "TTFT: p50 812 ms, p95 1,900 ms, p99 1,996 ms (of the slowest worker each)" in lines
    assert fleet["limits"]["max_in_flight_fleet"] == 2
    assert (fleet["in_flight"], fleet["kv_tokens"], fleet["num_live"]) == (2, tokens, 2)
    assert (fleet["prefill_tokens_per_s"], fleet["decode_tokens_per_s"]) == (782_468.0, 4_211.0)
    assert fleet["documents_per_s"] == 12.5


@pytest.mark.parametrize("columns", [80, 100])
def test_a_worker_is_shown_live_and_fits_a_terminal(status: Status, redis: Redis, columns: int) -> None:
    gates = (Closed(gate="kv", why="ingest: 1040000 KV tokens are reserved here, 2000000 may be"),)
    join(redis, "w1", load(closed=gates, draft_acceptance=0.7, num_preemptions=2))

    shown = status(columns=columns)

    assert max(map(len, shown.splitlines())) <= columns
    told = " ".join(shown.split())
    for part in (
        "w1: m on cpu, vllm 0.32.0, max_model_len 2048, max_num_seqs 16",
        "in flight 104 of 128 documents (96 in the engine, 8 ready), 1,040,000 of 2,000,000 KV tokens",
        "closed kv: ingest: 1040000 KV tokens are reserved here, 2000000 may be",
        "rates prefill 391k tokens/s, decode 4,210 tokens/s; 6.25 documents/s, 81,200 tokens/s over a minute",
        "TTFT p50 812 ms, p95 1,804 ms, p99 1,996 ms; SLA 2,000 ms for 95%",
        "in Redis p50 12 s, p95 82 s from enqueue to lease",
        "KV cache 81% of its blocks in use, 2 preemptions, 34% of prompt tokens cached",
        "speculation 70% of speculative tokens accepted",
    ):
        assert part in told
    assert "advice" not in told


def test_all_that_a_worker_says_is_in_the_json(state: Callable[[], dict[str, Any]], redis: Redis) -> None:
    join(redis, "w1", load())

    [worker] = state()["workers"]
    assert worker["model"] == "m"
    assert WorkerLoad.model_validate(worker["load"]).model_copy(update={"published_at": 0.0}) == load()


def test_what_is_not_known_yet_is_left_out(status: Status, redis: Redis) -> None:
    none = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_p50_ms", "queue_p50_ms", "prefix_hit_rate")
    join(redis, "w1", load(max_kv_tokens=0, **dict.fromkeys(none)))

    shown = status()
    assert "None" not in shown
    assert "1,040,000 KV tokens (no limit)" in shown
    assert "TTFT        p50" not in shown
    assert "rates       6.25 documents/s, 81,200 tokens/s over a minute" in shown


def test_a_worker_that_has_gone_silent_is_not_shown_as_live(
    status: Status, state: Callable[[], dict[str, Any]], redis: Redis
) -> None:
    join(redis, "w1", load())
    stored = orjson.loads(redis.hget(keys.loads("ingest"), "w1"))
    redis.hset(keys.loads("ingest"), "w1", orjson.dumps({**stored, "published_at": redis.time()[0] - LOAD_TTL - 1}))

    assert "no live figures in the last 15 s" in status()
    found = state()
    assert found["workers"][0]["load"] is None
    assert (found["fleet"]["num_live"], found["fleet"]["documents_per_s"]) == (0, 0)


def test_a_machine_that_takes_no_work_is_named(status: Status, redis: Redis) -> None:
    for _ in range(5):
        record_failure(redis, "ingest", "vm-1", "start", "out of HBM", max_failures=5)

    assert "machine vm-1: takes no work: 5 failures in a row, the last: out of HBM" in status()


# --- speculation


@pytest.mark.parametrize("acceptance", [None, 0.6, 0.9])
def test_speculation_that_pays_needs_no_advice(acceptance: float | None) -> None:
    assert speculation_advice(acceptance) == []


@pytest.mark.parametrize(
    ("acceptance", "advice"),
    [
        (
            0.59,
            ["59% of the speculative tokens were accepted: below 60% speculation gains little; try fewer num_specul"],
        ),
        (
            0.40,
            ["40% of the speculative tokens were accepted: below 60% speculation gains little; try fewer num_specul"],
        ),
        (
            0.39,
            [
                "39% of the speculative tokens were accepted: below 40% speculation costs more than it gains.",
                "Turn it off: take speculative_config out of the engine's configuration.",
            ],
        ),
    ],
)
def test_speculation_that_does_not_pay_is_advised_against(acceptance: float, advice: list[str]) -> None:
    given = speculation_advice(acceptance)

    assert len(given) == len(advice)
    assert all(sentence.startswith(start) for sentence, start in zip(given, advice, strict=True))


def test_the_advice_stands_with_the_worker(status: Status, redis: Redis) -> None:
    join(redis, "w1", load(draft_acceptance=0.31))

    assert "advice      Turn it off: take speculative_config out of the engine's configuration." in status()


# --- watch


def test_watch_looks_again_until_it_is_interrupted(server: EmbeddedServer, queue: IngestQueue) -> None:
    command = [str(BIN / "ingestq"), "status", "--json", "--watch", "0.1"]
    with subprocess.Popen(
        command, env=environment(server.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        assert orjson.loads(process.stdout.readline())["queued"] == 0
        queue.enqueue(request("a"))
        wait_until(lambda: orjson.loads(process.stdout.readline())["queued"] == 1, "the next look sees the document")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert b"Traceback" not in process.stderr.read()


def test_watch_needs_no_number(server: EmbeddedServer, redis: Redis) -> None:
    command = [str(BIN / "ingestq"), "status", "--watch"]
    with subprocess.Popen(command, env=environment(server.url), stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"queue: ingest\n"
        wait_until(lambda: process.stdout.readline() == b"queue: ingest\n", "the second look")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


# --- a real worker


def test_a_running_worker_shows_what_it_does(
    server: EmbeddedServer, state: Callable[[], dict[str, Any]], redis: Redis, tmp_path: Path
) -> None:
    put(redis, [simulated_request(number, max_tokens=64) for number in range(50)])
    with WorkerProcess(server.url, tmp_path, name="w1"):
        wait_until(lambda: state()["finished"] == 50, "all documents are done")
        wait_until(lambda: state()["workers"][0]["load"]["documents_per_s"] > 0, "the load says so")
        [worker] = state()["workers"]

    assert worker["name"] == "w1"
    assert worker["load"]["ttft_p50_ms"] > 0
    assert worker["load"]["prefill_tokens_per_s"] > 0
    assert worker["load"]["queue_p50_ms"] > 0
