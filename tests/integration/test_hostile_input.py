"""What somebody who may write to Redis can put there, and what a document can say, does no harm beyond itself."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import zlib
from pathlib import Path

import orjson
import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from ingestq.common import keys, payload, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import live_cards
from ingestq.common.errors import IngestqError
from ingestq.common.scripts import Admission
from ingestq.producer import IngestQueue, Settings, fetch_results, iter_results
from support.echoing import ENGINE_DIES, ENGINE_ERRS, TOKENIZER_PANICS
from support.jobs import QUEUE, fetched, put, request, row, statuses
from support.processes import SIMULATED, WorkerProcess, run, wait_until

TESTS = str(Path(__file__).parents[1])
FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
ECHOING = "support.echoing.EchoingWorker"
HUGE = "9" * 400

# A document that tries to write a log line of its own, to colour the terminal and to set its title.
FORGERY = "SECRET\r\n12:00:00 Worker w: all is well\n\x1b[31m\x1b]0;title\x07 \x9b31m \u202e\u2028 SECRET"


def work(
    server: EmbeddedServer, *options: str, worker: str = "ingestq.workers.BatchWorker", **settings: str
) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
    command = ("rq", "worker", "-w", worker, "--burst", *options, QUEUE)
    return run(*command, url=server.url, settings={**SIMULATED, **FAST, **path, **settings})


def ingestq(server: EmbeddedServer, *words: str) -> subprocess.CompletedProcess[str]:
    return run("ingestq", *words, url=server.url, settings={"INGEST_MODEL": "sim"})


def assert_clean(output: str) -> None:
    """Nothing in it drives a terminal, no line is forged, no document is quoted."""
    odd = [char for char in output if not char.isprintable() and char != "\n"]
    assert odd == []
    assert not any(line.startswith("12:00:00 Worker w: all is well") for line in output.splitlines())
    assert "SECRET" not in output


# --- what a document says


@pytest.mark.parametrize("trigger", [ENGINE_ERRS, TOKENIZER_PANICS])
def test_what_an_engine_says_of_a_document_can_not_forge_the_log(
    server: EmbeddedServer, redis: Redis, trigger: str
) -> None:
    bad, good = put(redis, [request(0, text=f"{trigger} {FORGERY}"), request(1)])
    done = work(server, "--verbose", worker=ECHOING)
    assert statuses(redis, [bad, good]) == ["failed", "finished"]
    assert done.returncode == 0
    assert bad in done.stdout + done.stderr  # which document failed is told
    assert_clean(done.stdout + done.stderr)


def test_what_an_engine_says_as_it_dies_can_not_forge_the_log(server: EmbeddedServer, redis: Redis) -> None:
    put(redis, [request(0, text=f"{ENGINE_DIES} {FORGERY}")])
    done = work(server, worker=ECHOING)
    assert done.returncode == 1
    odd = [char for char in done.stdout + done.stderr if not char.isprintable() and char != "\n"]
    assert odd == []
    assert not any(
        line.startswith("12:00:00 Worker w: all is well") for line in (done.stdout + done.stderr).splitlines()
    )


def test_no_document_is_in_the_log_however_it_ends(server: EmbeddedServer, redis: Redis) -> None:
    plain = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
    valid = {"document_id": "d", "text": FORGERY, "model": "sim"}
    put(redis, [request(0, text=FORGERY), request(1, text=FORGERY, max_tokens=900_000)])
    for changed in (
        {**valid, "chat": FORGERY},
        {**valid, "document_id": FORGERY},
        {**valid, FORGERY: FORGERY},
        {**valid, "sampling": {"stop": [FORGERY] * 17, "seed": FORGERY}},
        {**valid, "system": FORGERY * 10_000},
    ):
        plain.enqueue("ingestq.ingest", changed, description=FORGERY)
    plain.enqueue(f"os.{FORGERY}", FORGERY)
    done = work(server, "--verbose")
    assert redis.llen(keys.queue(QUEUE)) == 0
    assert_clean(done.stdout + done.stderr)


def test_results_and_status_show_an_error_in_one_line(server: EmbeddedServer, redis: Redis) -> None:
    queue = IngestQueue(QUEUE, connection=redis, settings=Settings(model="sim"))
    queue.enqueue_many([request(0, text=f"{ENGINE_ERRS} {FORGERY}"), request(1)], group_id="g")
    work(server, worker=ECHOING)
    done = ingestq(server, "results", "g")
    rows = [orjson.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert sorted(item["status"] for item in rows) == ["failed", "succeeded"]
    shown = ingestq(server, "status", "g")
    assert_clean(done.stderr + shown.stdout + shown.stderr)


# --- job hashes


BAD_FIELDS: list[dict[str, bytes | str]] = [
    {"enqueued_ms": f"-{HUGE}"},
    {"enqueued_ms": HUGE},
    {"enqueued_ms": "nan"},
    {"enqueued_ms": "", "enqueued_at": b"\xff"},
    {"enqueued_ms": "", "enqueued_at": "0001-01-01T00:00:00"},
    {"attempts": "1e400"},
    {"attempts": "-5"},
    {"crashes": "nan"},
    {"crashes": f"-{HUGE}"},
    {"result_ttl": HUGE, "failure_ttl": HUGE},
    {"result_ttl": "nan", "failure_ttl": "inf"},
    {"retries_left": HUGE},
    {"retries_left": "nan"},
    {"schema": "x"},
    {"started_at": b"\xff"},
    {"groups": "a b \xff \x1b[31m " + "x" * 10_000},
    {"description": b"\xff\n\x1b[31m"},
    {"timeout": "x"},
    {"meta": b"\x80\x04."},
    *(
        {"retries_left": "1", "retry_intervals": intervals}
        for intervals in ("[NaN]", "[1e999]", "[-1]", '["x"]', "{}", "[" * 5000, "7", "\xff")
    ),
]


def test_fields_that_are_not_what_they_should_be_harm_no_other_job(server: EmbeddedServer, redis: Redis) -> None:
    good = put(redis, [request(-1)])
    bad = {
        job_id: fields
        for number, fields in enumerate(BAD_FIELDS)
        for job_id in put(redis, [request(2 * number), request(2 * number + 1, text=f"{number} {ENGINE_ERRS}")])
    }
    for job_id, fields in bad.items():
        redis.hset(keys.job(job_id), mapping=fields)
    good += put(redis, [request(-2)])
    done = work(server, worker=ECHOING)
    ended = dict(zip(bad, statuses(redis, list(bad)), strict=True))
    unended = [(status, bad[job_id]) for job_id, status in ended.items() if status not in ("finished", "failed")]
    assert [(status, fields) for status, fields in unended if status != "scheduled"] == []  # a retry may be due later
    assert statuses(redis, good) == ["finished"] * 2
    assert redis.zcard(keys.started(QUEUE)) == 0
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr


def bomb(size: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def test_payloads_that_are_none_fail_alone(server: EmbeddedServer, redis: Redis) -> None:
    payloads = [
        bomb(payload.MAX_PAYLOAD_BYTES * 2),
        b"x" + b"\xff" * 100,
        b"[" * 100_000,
        b"9" * 1_000_000,
        b'["ingestq.ingest",null,[{"text":"\\ud800","model":"sim","document_id":"d"}],{}]',
        b'["ingestq.ingest",null,[{"text":1e999,"model":"sim","document_id":"d"}],{}]',
        pickle.dumps(("ingestq.ingest", None, ({},), {})),
        b"",
    ]
    *bad, good = put(redis, [request(number) for number in range(len(payloads) + 1)])
    for job_id, data in zip(bad, payloads, strict=True):
        redis.hset(keys.job(job_id), "data", data)
    done = work(server)
    assert done.returncode == 0, done.stderr
    assert statuses(redis, [good]) == ["finished"]
    assert [row(redis, job_id).error_class for job_id in bad] == ["InvalidJob"] * len(bad)


# --- leases


def test_leases_that_are_none_do_not_keep_the_worker_from_taking_others_over(
    server: EmbeddedServer, redis: Redis
) -> None:
    lost = put(redis, [request(0)])
    scripts.lease(
        redis, QUEUE, worker="x", model="sim", admission=Admission(documents=1), lease_ttl=60.0, call_id="0" * 14
    )
    [lease] = redis.zrange(keys.started(QUEUE), 0, -1)
    for member in (lease, "no-colon", b"\xff:\xff", ":", "a:", ":b", "a:b:c", ""):
        redis.zadd(keys.started(QUEUE), {member: 1})
        redis.sadd(keys.worker_executions("w"), member)
    done = work(server, "-n", "w")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert statuses(redis, lost) == ["finished"]
    assert redis.zcard(keys.started(QUEUE)) == 0


# --- commands


def test_no_command_however_large_stops_the_worker(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    with WorkerProcess(server.url, tmp_path, name="w", **FAST) as worker:
        for message in (
            b"[" * 1_000_000,
            b'{"command": ' + b"9" * 1_000_000 + b"}",
            json.dumps({"command": "x\n12:00:00 Worker w: all is well\x1b[31m"}).encode(),
            json.dumps({"command": "stop-job", "job_id": "x\n\x1b[31m" * 1000}).encode(),
            json.dumps({"command": "stop-execution", "job_id": "x", "execution_id": ["x"]}).encode(),
            json.dumps({"command": "kill-horse"}).encode(),
        ):
            assert redis.publish("rq:pubsub:w", message) == 1
        jobs = put(redis, [request(0)])
        wait_until(lambda: statuses(redis, jobs) == ["finished"], "it still works")
    assert_clean(worker.output)


# --- what readers meet


def a_failed_job(redis: Redis) -> str:
    [job_id] = put(redis, [request(0)], group_id="g")
    redis.hset(keys.job(job_id), "status", "failed")
    return job_id


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "1", "return_value": "x"},
        {"type": "x", "return_value": b"\xff"},
        {"type": "2", "return_value": base64.b64encode(b"\xff")},
        {"type": "2", "return_value": base64.b64encode(pickle.dumps("x"))},
        {"type": "2", "return_value": base64.b64encode(b'{"document_id":"d","job_id":"another","status":"failed"}')},
        {"type": "1", "return_value": base64.b64encode(b'{"document_id":"d","job_id":"another","status":"failed"}')},
        {"type": "2", "exc_string": "x"},
        {"type": "2", "exc_string": base64.b64encode(bomb(256 << 20))},
        {"type": "2", "exc_string": base64.b64encode(zlib.compress(FORGERY.encode()))},
        {"x": "y"},
    ],
)
@pytest.mark.parametrize("status", ["failed", "finished"])
def test_a_result_that_is_none_gives_a_row_that_says_so(redis: Redis, fields: dict, status: str) -> None:
    job_id = a_failed_job(redis)
    redis.hset(keys.job(job_id), "status", status)
    redis.xadd(keys.results(job_id), fields)
    redis.xadd(keys.group_done("g"), {"j": job_id})
    redis.hset(keys.group("g"), "sealed_ms", 1)
    [delivered] = iter_results("g", connection=redis, timeout=10)
    assert delivered.status in ("failed", "expired")
    assert delivered.job_id == job_id
    assert delivered.error_class
    assert len(delivered.error_message or "") < 70_000
    [asked] = fetch_results([job_id], connection=redis)
    assert asked is not None
    assert asked.status == delivered.status


@pytest.mark.parametrize(
    "entry", [{"j": b"\xff"}, {"j": ""}, {"j": "a:b\n"}, {"d": "x"}, {"x": "y"}, {"j": "gone", "d": b"\xff\x1b[31m"}]
)
def test_an_entry_of_the_stream_that_is_none_hides_no_row(redis: Redis, entry: dict) -> None:
    redis.xadd(keys.group_done("g"), entry)
    job_id = a_failed_job(redis)
    redis.xadd(keys.group_done("g"), {"j": job_id})
    redis.hset(keys.group("g"), "sealed_ms", 1)
    rows = list(iter_results("g", connection=redis, timeout=10))
    assert job_id in [item.job_id for item in rows]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seen_ms", "x"), ("seen_ms", HUGE), ("ttl", "x"), ("ttl", HUGE), ("queue", b"\xff"), ("sealed_ms", b"\xff")],
)
def test_a_group_that_is_none_ends_in_rows_or_one_clear_error(
    server: EmbeddedServer, redis: Redis, field: str, value: bytes | str
) -> None:
    job_id = a_failed_job(redis)
    redis.hset(keys.group("g"), mapping={"sealed_ms": 1, field: value})
    for words in (("results", "g"), ("status", "g")):
        done = ingestq(server, *words)
        assert "Traceback" not in done.stderr, (words, done.stderr)
    assert statuses(redis, [job_id]) == ["failed"]


@pytest.mark.parametrize("member", ["no-colon", b"\xff:\xff", ":", "", "x:\x1b[31m\n"])
def test_a_member_that_is_none_ends_in_rows_or_one_clear_error(
    server: EmbeddedServer, redis: Redis, member: bytes | str
) -> None:
    a_failed_job(redis)
    redis.zadd(keys.group_members("g"), {member: 1})
    redis.hset(keys.group("g"), "sealed_ms", 1)
    for words in (("results", "g"), ("status", "g")):
        done = ingestq(server, *words)
        assert "Traceback" not in done.stderr, (words, done.stderr)
        assert "user_script" not in done.stderr, (words, done.stderr)


@pytest.mark.parametrize("key", [keys.group("g"), keys.group_members("g"), keys.group_done("g"), "rq:job:x"])
def test_a_key_of_another_type_ends_in_one_clear_error(server: EmbeddedServer, redis: Redis, key: str) -> None:
    a_failed_job(redis)
    redis.zadd(keys.group_members("g"), {"x:d": 1})
    redis.hset(keys.group("g"), "sealed_ms", 1)
    redis.delete(key)
    redis.set(key, "x")
    for words in (("results", "g"), ("status", "g")):
        done = ingestq(server, *words)
        assert "Traceback" not in done.stderr, (words, done.stderr)


@pytest.mark.parametrize(
    "card", [b"\xff", b"[" * 100_000, b"{}", b'{"model": "m", "published_at": 1e999}', b"x" * (1 << 20)]
)
def test_an_engine_card_that_is_none_is_left_out(redis: Redis, card: bytes) -> None:
    redis.hset(keys.engines(QUEUE), "w", card)
    assert live_cards(redis, QUEUE) == {}
    IngestQueue(QUEUE, connection=redis, settings=Settings()).enqueue(request(0))


def test_the_commands_unpickle_nothing(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (trap,))

    job_id, bad = a_failed_job(redis), pickle.dumps(Bomb())
    redis.hset(keys.job(job_id), mapping={"data": bad, "meta": bad, "description": bad, "groups": b"g"})
    redis.xadd(keys.results(job_id), {"type": "2", "return_value": base64.b64encode(bad), "exc_string": bad})
    redis.zadd(keys.failed(QUEUE), {job_id: 1e12})
    redis.hset(keys.engines(QUEUE), "w", bad)
    redis.hset(keys.group("g"), "sealed_ms", 1)
    for words in (("results", "g"), ("status", "g"), ("status",), ("cancel", "g")):
        ingestq(server, *words)
    work(server)
    assert not trap.exists()


def test_our_own_errors_are_one_line_each(redis: Redis) -> None:
    with pytest.raises(IngestqError) as caught:
        IngestQueue(f"q{FORGERY}", connection=redis, settings=Settings())
    assert str(caught.value).isprintable()
    assert fetched(redis, ["x"])[0].status == ""
