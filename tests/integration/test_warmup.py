"""What a worker does before it leases its first document, and what becomes of it when that goes wrong."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import live_cards
from ingestq.common.machine_health import read_health, record_failure
from ingestq.common.settings import Settings
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.startup.prefixes import Task, queued_tasks, shared_prefix
from support.faulty import MACHINE, ORDERS, TOKENIZER_PANICS
from support.jobs import QUEUE, contents, put, request, statuses
from support.notice import NoticeServer
from support.processes import SIMULATED, WorkerProcess, run, wait_until
from support.warming import KV_CACHE, PROMPTS

TESTS = str(Path(__file__).parents[1])
INSTRUCTION = "Say in one sentence what this document is about, and in another one whom it is for."
POINTS = ["proof-step", "trial-step", "prefix-step"]


def settings(folder: Path, **settings: str) -> dict[str, str]:
    """Each test's worker on a machine of its own: the guardian of the test before may still report its death."""
    own = {MACHINE: folder.name, ORDERS: str(folder / "w.orders"), PROMPTS: str(folder / "prompts")}
    return {"PYTHONPATH": TESTS, "INGEST_ENGINE_TIME_SCALE": "0", **own, **settings}


def warming(server: EmbeddedServer, folder: Path, *options: str, **more: str) -> WorkerProcess:
    worker = "support.warming.WarmingWorker"
    return WorkerProcess(server.url, folder, *options, name="w", worker=worker, **settings(folder, **more))


def order(folder: Path, what: str) -> None:
    (folder / "w.orders").write_text(what)


def prompts(folder: Path, stem: str) -> list[str]:
    """Texts of the prompts of that kind that the engine was given."""
    lines = [json.loads(line) for line in (folder / "prompts").read_text().splitlines()]
    return [text for prompt_id, text in lines if prompt_id.partition("-")[0] == stem]


def untouched(redis: Redis, job_ids: list[str]) -> bool:
    records = {tuple(redis.hmget(keys.job(job_id), "status", "attempts", "crashes")) for job_id in job_ids}
    return records == {(b"queued", None, None)} and redis.lrange(keys.queue(QUEUE), 0, -1) == [
        job_id.encode() for job_id in job_ids
    ]


def put_tasks(redis: Redis) -> list[str]:
    """Ten documents of one task, three of another."""
    one = [request(i, instruction=INSTRUCTION) for i in range(10)]
    other = [request(i, instruction=INSTRUCTION.upper(), system="You are brief.") for i in range(100, 103)]
    return put(redis, [*one, *other])


# --- before the worker is ready


@pytest.mark.parametrize("point", [*POINTS, "prefix-encode"])
def test_nothing_is_leased_before_the_worker_is_ready_and_a_signal_ends_it_cleanly(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, point: str
) -> None:
    job_ids = put_tasks(redis)
    order(tmp_path, f"{point} hang 3600")
    worker = warming(server, tmp_path)
    worker.start()
    try:
        wait_until(lambda: not (tmp_path / "w.orders").exists(), "the warm-up has come that far")
        later = redis.time()[0] + 3
        wait_until(lambda: redis.time()[0] >= later, "the housekeeper has been around three times")
        assert untouched(redis, job_ids)
        assert live_cards(redis, QUEUE) == {}
        assert "ready on" not in worker.output
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    finally:
        worker.__exit__(None, None, None)
    assert untouched(redis, job_ids)
    assert tmp_path.name not in read_health(redis, QUEUE)
    assert not redis.exists(keys.workers())


def test_further_signals_do_not_keep_the_engine_from_being_closed(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    """Its processes would hold the accelerator."""
    order(tmp_path, "proof-step hang 3600")
    worker = warming(server, tmp_path)
    worker.start()
    wait_until(lambda: not (tmp_path / "w.orders").exists(), "the warm-up has come that far")
    order(tmp_path, "close hang 2")
    worker.signal(signal.SIGTERM)
    wait_until(lambda: not (tmp_path / "w.orders").exists(), "the engine is being closed")
    second = time.monotonic() + 1.1
    wait_until(lambda: time.monotonic() > second, "RQ counts a second signal after a second")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert "the engine is closed" in worker.output


@pytest.mark.parametrize("point", POINTS)
def test_an_engine_that_fails_its_warm_up_is_a_machine_that_failed_to_start(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, point: str
) -> None:
    job_ids = put_tasks(redis)
    order(tmp_path, f"{point} raise")
    worker = warming(server, tmp_path)
    worker.start()
    assert worker.wait() == 1
    assert read_health(redis, QUEUE)[tmp_path.name].start_failures == 1
    assert untouched(redis, job_ids)


@pytest.mark.parametrize("point", ["trial-step", "prefix-encode", "prefix-step"])
def test_a_warm_up_that_hangs_is_killed_and_is_no_documents_fault(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, point: str
) -> None:
    job_ids = put_tasks(redis)
    order(tmp_path, f"{point} hang 3600")
    worker = warming(server, tmp_path, INGEST_STEP_TIMEOUT="2")
    worker.start()
    assert worker.wait() == -signal.SIGKILL
    wait_until(lambda: tmp_path.name in read_health(redis, QUEUE), "its guardian takes note")
    assert read_health(redis, QUEUE)[tmp_path.name].start_failures == 1
    assert untouched(redis, job_ids)


@pytest.mark.parametrize("action", ["hang", "hold-gil"])
def test_a_preemption_ends_a_warm_up_and_is_no_failure_of_the_machine(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, action: str
) -> None:
    job_ids = put_tasks(redis)
    order(tmp_path, f"proof-step {action} 600")
    with NoticeServer() as notice:
        worker = warming(server, tmp_path, INGEST_PREEMPTION_URL=notice.url_of("w"))
        worker.start()
        wait_until(lambda: not (tmp_path / "w.orders").exists(), "the warm-up has come that far")
        notice.announce("w")
        assert worker.wait() == (0 if action == "hang" else -signal.SIGKILL)
        killed = "0 documents queued again"
        wait_until(lambda: action == "hang" or killed in worker.output, "its guardian has done what there is to do")
    assert not redis.exists(keys.workers())
    assert untouched(redis, job_ids)
    assert tmp_path.name not in read_health(redis, QUEUE)


def test_a_proof_may_take_longer_than_a_step(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    order(tmp_path, "proof-step hang 5")  # it compiles
    with warming(server, tmp_path, INGEST_STEP_TIMEOUT="1") as worker:
        assert worker.process.poll() is None


# --- shared prefixes


def test_the_prefixes_of_queued_documents_are_computed_before_them(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put_tasks(redis)
    with warming(server, tmp_path) as worker:
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "all are done")
        assert "2 shared prefixes cached" in worker.output
    first, second = prompts(tmp_path, "prefix")
    assert first.startswith(INSTRUCTION[:80])
    assert second.startswith(f"You are brief.\n\n{INSTRUCTION.upper()[:60]}")
    texts = [json.loads(line)[1] for line in (tmp_path / "prompts").read_text().splitlines()]
    documents = [text for text in texts if "This is document number" in text]
    assert len(documents) == 13
    assert all(text.startswith((first, second)) for text in documents)
    assert texts.index(second) < texts.index(documents[0])


@pytest.mark.parametrize("phase", ["start", "run"])
def test_after_a_failure_no_prefix_is_computed(
    server: EmbeddedServer, redis: Redis, tmp_path: Path, phase: Any
) -> None:
    """It may have been what the engine died of; leased with a document, it is found out."""
    job_ids = put_tasks(redis)
    record_failure(redis, QUEUE, tmp_path.name, phase, "killed", max_failures=5)
    with warming(server, tmp_path):
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "all are done")
    assert prompts(tmp_path, "prefix") == []


def test_a_prefix_that_nobody_can_encode_fails_its_own_documents_only(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    bad = put(redis, [request(0, instruction=f"{INSTRUCTION} {TOKENIZER_PANICS}")])
    good = put(redis, [request(i, instruction=INSTRUCTION) for i in range(1, 4)])
    with warming(server, tmp_path) as worker:
        wait_until(lambda: statuses(redis, bad + good) == ["failed"] + ["finished"] * 3, "all have ended")
        assert INSTRUCTION not in worker.output
    assert len(prompts(tmp_path, "prefix")) == 1


def test_the_look_at_the_queue_finds_tasks_and_changes_nothing(redis: Redis) -> None:
    put_tasks(redis)
    put(redis, [request(200, instruction="of another model", model="other")])
    [suspect, cancelled, huge, wrong, gone, garbage] = put(
        redis, [request(300 + i, instruction=f"none of these {i}") for i in range(6)]
    )
    redis.hset(keys.job(suspect), "crashes", 1)
    redis.hset(keys.job(cancelled), "status", "canceled")
    redis.hset(keys.job(huge), "data", b" " * 300_000 + redis.hget(keys.job(huge), "data"))
    redis.delete(keys.job(wrong), keys.job(gone))
    redis.set(keys.job(wrong), "not a hash")
    redis.hset(keys.job(garbage), "data", b"\x80")
    put(redis, [request(400)])  # no instruction, no chat: it shares nothing
    before = contents(redis)

    found = queued_tasks(redis, QUEUE, "sim")

    assert found == [Task(None, INSTRUCTION, False), Task("You are brief.", INSTRUCTION.upper(), False)]
    assert contents(redis) == before


def test_the_look_at_the_queue_is_bounded(redis: Redis) -> None:
    put(redis, [request(i, instruction=f"task {i}", text="x" * 100_000) for i in range(200)])
    calls = redis.info("commandstats")
    found = queued_tasks(redis, QUEUE, "sim")
    assert 0 < len(found) < 45, "four megabytes"
    after = redis.info("commandstats")
    assert after["cmdstat_hmget"]["calls"] - calls.get("cmdstat_hmget", {"calls": 0})["calls"] == 128


@pytest.mark.parametrize("chat", [False, True])
def test_a_shared_prefix_is_what_all_prompts_of_a_task_begin_with(chat: bool) -> None:
    engine = SimulatedEngine.from_settings(Settings(engine="simulated", model="sim"))
    prefix = shared_prefix(engine, Task("You are brief.", INSTRUCTION, chat), "sim")
    text = b"".join(token.to_bytes(4, "little") for token in prefix).decode()
    assert INSTRUCTION[:-4] in text
    assert "You are brief." in text


# --- what the engine really has


def test_a_kv_cache_of_another_type_than_asked_for_is_refused(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(0)])
    cache = json.dumps({"asked": "fp8_e5m2", "dtype": "bfloat16", "is_read": True})
    worker = warming(server, tmp_path, **{KV_CACHE: cache})
    worker.start()
    assert worker.wait() == 2
    assert "kv_cache_dtype='fp8_e5m2' was asked for, the engine's KV cache is bfloat16" in worker.output
    assert "INGEST_MISFIT=warn" in worker.output
    assert "Traceback" not in worker.output
    assert untouched(redis, job_ids)
    assert tmp_path.name not in read_health(redis, QUEUE), "settings are no failure of the machine"

    with warming(server, tmp_path, INGEST_MISFIT="warn", **{KV_CACHE: cache}) as warned:
        wait_until(lambda: statuses(redis, job_ids) == ["finished"], "it works all the same")
        assert "the engine's KV cache is bfloat16" in warned.output


def test_a_ready_worker_says_what_its_warm_up_found(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    cache = json.dumps({"dtype": "fp8_e5m2", "asked": "fp8_e5m2", "is_read": True})
    with warming(server, tmp_path, INGEST_ENGINE_BLOCK_SIZE="32", **{KV_CACHE: cache}) as worker:
        assert "KV cache fp8_e5m2, 1800000 tokens in 56250 blocks; prefill " in worker.output
        card = live_cards(redis, QUEUE)["w"]
        shown = run("ingestq", "status", url=server.url, settings=SIMULATED).stdout
        state = json.loads(run("ingestq", "status", "--json", url=server.url, settings=SIMULATED).stdout)
    assert (card.kv_cache_dtype, card.num_kv_tokens, card.num_blocks, card.block_size) == (
        "fp8_e5m2",
        1_800_000,
        56_250,
        32,
    )
    assert (card.recompiles, card.num_preemptions, card.max_num_batched_tokens) == (0, 0, 8192)
    assert card.prefill_tokens_per_s > 0
    assert card.decode_tokens_per_s > 0
    assert card.warmup_ms > 0
    told = " ".join(shown.split())
    assert "KV cache fp8_e5m2, 1,800,000 tokens, 56,250 blocks of 32 tokens, prefill " in told
    assert "since then 0 recompiles" in told
    assert state["workers"][0]["num_kv_tokens"] == 1_800_000
