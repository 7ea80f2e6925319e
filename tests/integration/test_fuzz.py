"""Random and mutated jobs, payloads, keys and commands against the real scripts and the real worker.

Every malformed job under whose key there is a hash ends with a row and a reason, its honest neighbours finish, the
worker lives. hypothesis makes the mutations; atheris would not pay: the parsers are orjson, pydantic and zlib, whose
native code it can't follow without instrumented builds, and what is ours around them is small and structured.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.errors import ResultTimeout
from ingestq.common.schema import IngestResult, Status
from ingestq.common.settings import Settings
from ingestq.producer import fetch_results, iter_results
from ingestq.workers.courier import Courier
from ingestq.workers.drain import EngineLoad
from ingestq.workers.drain_bounds import drain_controller
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.feed import feed_continuously
from ingestq.workers.rows import RowWriter
from ingestq.workers.vitals import Vitals
from support.jobs import QUEUE, put, request, statuses
from support.processes import SIMULATED, WorkerProcess, run, wait_until
from support.properties import ROUNDS, bounded

FAST = {"INGEST_ENGINE_TIME_SCALE": "0"}
SETTINGS = Settings(engine="simulated", model="sim", queue=QUEUE, engine_args={"time_scale": 0})

# fmt: off
# Every field of a job that RQ or we read.
FIELDS = [
    "status", "model", "data", "enqueued_ms", "enqueued_at", "created_at", "started_at", "ended_at",
    "last_heartbeat", "attempts", "crashes", "schema", "groups", "origin", "description", "timeout", "result_ttl",
    "failure_ttl", "ttl", "retries_left", "retry_intervals", "enqueue_at_front_on_retry", "success_callback_name",
    "failure_callback_name", "stopped_callback_name", "webhooks", "dependency_ids", "repeats_left",
    "repeat_intervals", "rate_limit_key", "worker_name", "meta", "group_id", "exc_info", "result",
]

ODD = [
    b"", b" ", b"nan", b"-nan", b"inf", b"-inf", b"1e999", b"-1", b"0", b"1", b"1.5", b"-0", b"0x10", b"7", b"true",
    b"9" * 5000, b"-" + b"9" * 400, str(2**31).encode(), str(2**63).encode(), str(-(2**63)).encode(),
    b"null", b"[]", b"{}", b"[" * 3000, b'"', b"started", b"queued", b"bogus", b"*", b"sim", b"other",
    b"\xff\xfe\x00", b"\x00", b"\r\n\x1b[31m", "\u2028\U0001f4a9".encode(), b"x" * 70_000, b"a b " * 5000,
]
# fmt: on

# What may be under a key that should hold something else.
KINDS = ("string", "list", "set", "zset", "hash", "stream")


def put_wrong(redis: Redis, key: str, kind: str) -> None:
    redis.delete(key)
    match kind:
        case "string":
            redis.set(key, b"\xff")
        case "list":
            redis.rpush(key, b"\xff")
        case "set":
            redis.sadd(key, b"\xff")
        case "zset":
            redis.zadd(key, {b"\xff": 1})
        case "hash":
            redis.hset(key, b"\xff", b"\xff")
        case "stream":
            redis.xadd(key, {b"\xff": b"\xff"})


def new_courier(redis: Redis) -> tuple[Courier, SimulatedEngine]:
    engine = SimulatedEngine.from_settings(SETTINGS)
    rows = RowWriter(worker="w", card=engine.card, result_ttl=600, failure_ttl=600)
    return Courier(redis, SETTINGS, engine, drain_controller(SETTINGS, engine, None), rows, Vitals.create()), engine


def work(redis: Redis) -> None:
    """A worker's courier and engine in this process, until the queue has nothing more for them."""
    courier, engine = new_courier(redis)
    courier.start()
    while not courier.exhausted.is_set() and courier.failure is None:
        if courier.pool.wait(0.002):
            feed_continuously(engine, courier, courier.start_ready(EngineLoad()), lambda: False, lambda: None)
    redis.delete(keys.wake(QUEUE, "sim"))
    redis.lpush(keys.wake(QUEUE, "sim"), "end the courier's wait")
    assert courier.close(30.0)
    assert courier.failure is None


def rows(redis: Redis, job_ids: Sequence[str]) -> list[IngestResult | None]:
    return fetch_results(list(job_ids), connection=redis)


def assert_ended(row: IngestResult | None) -> None:
    assert row is not None, "it never ends"
    assert row.status in (Status.SUCCEEDED, Status.FAILED, Status.EXPIRED)
    if row.status is Status.FAILED:
        assert row.error_class
        assert row.error_message


# --- job hashes


def waits(field: str, value: bytes) -> bool:
    """Whether the job is a good one, which other workers or other programs are to end."""
    if field == "status":
        return value == b"started"  # what somebody else runs
    if field == "model":
        return value not in (b"sim", b"*") and re.fullmatch(rb"[^\x00-\x1f\x7f]{1,2048}", value) is not None
    return field == "schema" and value in (b"7", b"0x10")


def test_every_odd_field_ends_in_a_row(server: EmbeddedServer, redis: Redis) -> None:
    """Each field with each odd value, a thousand jobs, in one real worker."""
    cases = [(field, value) for field in FIELDS for value in ODD]
    job_ids = put(redis, [request(number) for number in range(len(cases))], group_id="g")
    honest = put(redis, [request(-1 - number) for number in range(50)])
    with redis.pipeline() as pipeline:
        for job_id, (field, value) in zip(job_ids, cases, strict=True):
            pipeline.hset(keys.job(job_id), field, value)
        pipeline.execute()

    command = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", QUEUE)
    done = run(*command, url=server.url, settings={**SIMULATED, **FAST})

    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert set(statuses(redis, honest)) == {"finished"}
    ended = rows(redis, job_ids)
    for row, case in zip(ended, cases, strict=True):
        if not waits(*case):
            assert row is not None, case
            assert_ended(row)
    waiting = [case for row, case in zip(ended, cases, strict=True) if row is None]
    assert all(waits(*case) for case in waiting)
    assert_readable(server, redis, sum(row is not None for row in ended))


def assert_readable(server: EmbeddedServer, redis: Redis, num_rows: int) -> None:
    """Whatever was put there, the readers give rows, and the commands no traceback."""
    given: list[IngestResult] = []
    with suppress(ResultTimeout):
        for row in iter_results("g", connection=redis, timeout=0):
            given.append(row)
    assert len({row.job_id for row in given}) == len(given)
    for words in (["status"], ["status", "g"], ["status", "--json"], ["results", "g"], ["failed", "list"]):
        shown = run("ingestq", *words, url=server.url, settings={"INGEST_MODEL": "sim"})
        assert "Traceback" not in shown.stderr, (words, shown.stderr[-2000:])


# --- payloads

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["sim", "x" * 9999])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(list(request(0).model_dump())), st.text(max_size=9)), inner, max_size=5
        ),
    ),
    max_leaves=12,
)


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Mostly near a good one: what is far off is refused at the first look."""
    good = {**json.loads(request(0).to_json()), "document_id": "odd"}
    fields = {
        **good,
        **draw(st.dictionaries(st.sampled_from([*good, "schema_version", "system", "x"]), JSON, max_size=3)),
    }
    for name in draw(st.sets(st.sampled_from(sorted(good)), max_size=1)):
        fields.pop(name, None)
    call: Any = ["ingestq.ingest", None, [fields], {}]
    for position in draw(st.sets(st.integers(0, 3), max_size=2)) if draw(st.booleans()) else ():
        call[position] = draw(JSON)
    data = json.dumps(call, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 4)) :]
    match draw(st.sampled_from(["plain", "plain", "zlib", "cut", "bomb", "nested", "random"])):
        case "zlib":
            return zlib.compress(data)
        case "cut":
            return zlib.compress(data)[: draw(st.integers(1, 60))]
        case "bomb":
            return zlib.compress(b"[" * draw(st.sampled_from([10**6, 40 * 2**20])), 1)
        case "nested":
            depth = draw(st.sampled_from([500, 1023, 1025, 100_000]))
            return b'["ingestq.ingest",null,[{"text":' + b"[" * depth + b"]" * depth + b"}],{}]"
        case "random":
            return draw(st.binary(max_size=200))
    return data


@given(odd=st.lists(payloads(), min_size=1, max_size=8), plain=st.booleans())
@bounded(60)
def test_every_odd_payload_ends_in_a_row(redis_for_fuzz: Redis, odd: list[bytes], plain: bool) -> None:
    redis = redis_for_fuzz
    redis.flushall()
    job_ids = put(redis, [request(number) for number in range(len(odd) + 2)])
    for job_id, data in zip(job_ids[1:], odd, strict=False):
        redis.hset(keys.job(job_id), "data", data)
        if plain:
            redis.hdel(keys.job(job_id), "model")

    work(redis)

    given = rows(redis, job_ids)
    assert [given[0].status, given[-1].status] == [Status.SUCCEEDED] * 2
    for job_id, row in zip(job_ids, given, strict=True):
        if row is None:  # it asks for another model, or for a newer worker
            model, schema = redis.hmget(keys.job(job_id), "model", "schema")
            assert (model or b"").decode(errors="replace") not in ("sim", "*", "") or int(schema or 1) > 1
        else:
            assert_ended(row)


# --- everything else that is in Redis

VALUE = st.one_of(st.sampled_from(ODD), st.binary(max_size=40), st.integers().map(lambda number: str(number).encode()))
AROUND = {
    "limits": (keys.limits(QUEUE), ["max_in_flight", "max_in_flight_fleet", "x"]),
    "group": (keys.group("g"), ["queue", "ttl", "created_ms", "seen_ms", "sealed_ms", "next_rank"]),
    "engines": (keys.engines(QUEUE), ["w", "v", "\x1b[31m"]),
    "machines": (keys.machines(QUEUE), ["start:m", "run:m", "failed_at:m", "reason:m", "m", ":", "start:\x1b[31m"]),
    "worker": (keys.worker("v"), ["birth", "death", "incarnation", "alive_until", "process", "queues", "state"]),
    "own record": (
        keys.worker("w"),
        ["birth", "incarnation", "alive_until", "successful_job_count", "total_working_time"],
    ),
}
# fmt: off
WRONG = [
    "members", "done", "results", "wake", "suspended", "executions", "canceled", "scheduled", "finished", "failed",
    "limits", "group", "engines", "machines", "worker",
]
# fmt: on


def key_of(name: str, job_id: str) -> str:
    return {
        "members": keys.group_members("g"),
        "done": keys.group_done("g"),
        "results": keys.results(job_id),
        "wake": keys.wake(QUEUE, "sim"),
        "executions": f"rq:executions:{job_id}",
        "canceled": keys.canceled(QUEUE),
        "scheduled": keys.scheduled(QUEUE),
        "finished": keys.finished(QUEUE),
        "failed": keys.failed(QUEUE),
        "suspended": "rq:other",
        **{name: key for name, (key, _) in AROUND.items()},
    }[name]


@given(
    values=st.lists(st.tuples(st.sampled_from(sorted(AROUND)), st.integers(0, 6), VALUE), max_size=5),
    wrong=st.lists(st.tuples(st.sampled_from(WRONG), st.sampled_from(KINDS)), max_size=2),
    stream=st.lists(
        st.dictionaries(
            st.sampled_from([b"j", b"d", b"x", b"type", b"return_value", b"exc_string"]), VALUE, min_size=1
        ),
        max_size=3,
    ),
)
@bounded(80)
def test_odd_keys_around_the_jobs_lose_none(redis_for_fuzz: Redis, values: list, wrong: list, stream: list) -> None:
    redis = redis_for_fuzz
    redis.flushall()
    job_ids = put(redis, [request(number) for number in range(3)], group_id="g")
    for name, kind in wrong:
        put_wrong(redis, key_of(name, job_ids[0]), kind)
    for name, number, value in values:
        key, names = AROUND[name]
        if redis.type(key) in (b"none", b"hash"):
            redis.hset(key, names[number % len(names)], value)
    for fields in stream:
        for key in (keys.group_done("g"), keys.results(job_ids[1])):
            if redis.type(key) in (b"none", b"stream"):
                redis.xadd(key, fields)
    closed = (
        redis.hmget(keys.limits(QUEUE), "max_in_flight", "max_in_flight_fleet")
        if redis.type(keys.limits(QUEUE)) == b"hash"
        else []
    )

    if not any(closes(limit) for limit in closed):
        work(redis)
    redis.delete(
        keys.limits(QUEUE), *(key_of(name, job_ids[0]) for name in ("finished", "failed", "scheduled", "wake"))
    )
    work(redis)

    for row in rows(redis, job_ids):
        assert row is not None
        assert row.status is Status.SUCCEEDED, row.error_message


def closes(limit: bytes | None) -> bool:
    """Whether a limit, as Lua reads numbers, lets nothing through."""
    try:
        text = (limit or b"").decode().strip()
        return (float(int(text, 16)) if text.lower().startswith(("0x", "-0x")) else float(text)) <= 0
    except (ValueError, OverflowError):
        return False


@pytest.fixture(scope="module")
def redis_for_fuzz(server: EmbeddedServer) -> Any:
    with Redis.from_url(server.url) as client:
        yield client


# --- commands


def test_no_command_ends_the_worker(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    chance = random.Random(None if ROUNDS else 3)
    words: list[Any] = ["stop-job", "stop-execution", "kill-horse", "x", None, 7, [], {}, "9" * 5000, "\ud800", True]
    messages = [chance.randbytes(chance.randrange(60)) for _ in range(200)]
    messages += [
        json.dumps({name: chance.choice(words) for name in ("command", "job_id", "execution_id", "pid")}).encode()
        for _ in range(200)
    ]
    messages += [b"[" * 100_000, b'{"command":' * 5000, b"{}" + b"\x00" * 10**6, b'"shutdown"', b"1e999", b"NaN"]
    with WorkerProcess(server.url, tmp_path, name="a", **FAST) as worker:
        for message in messages:
            redis.publish("rq:pubsub:a", message)
        job_ids = put(redis, [request(0)])
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "it still works")
        shutdown = json.dumps({"command": "shutdown"})
        wait_until(lambda: redis.publish("rq:pubsub:a", shutdown), "it listens, if not at once")
        assert worker.wait() == 0
        assert "Traceback" not in worker.output
