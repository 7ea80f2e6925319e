"""The main job on real parts: the command lines, a real server, real vLLM on a tiny Gemma 4 of random weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.workers.processes import identity, is_dead
from support.jobs import put, request, statuses
from support.models import tiny_gemma4
from support.processes import WorkerProcess, children, run, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "tiny/gemma-4"
DOCUMENTS = Path(__file__).parents[2] / "deploy" / "demo" / "documents"


@pytest.fixture(scope="module")
def vllm() -> dict[str, str]:
    """Settings of a worker on the tiny model."""
    return {
        "INGEST_MODEL": str(tiny_gemma4()),
        "INGEST_MODEL_NAME": MODEL,
        "INGEST_ENGINE_DTYPE": "float32",
        "INGEST_ENGINE_ENFORCE_EAGER": "true",
        "INGEST_ENGINE_MAX_MODEL_LEN": "1024",
        "INGEST_ENGINE_MAX_NUM_SEQS": "16",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def drain(server: EmbeddedServer, settings: dict[str, str]) -> str:
    """Runs a worker until the queue is empty; returns its log."""
    command = ("rq", "worker", "--burst", "-w", "ingestq.workers.BatchWorker", "ingest")
    worker = run(*command, url=server.url, settings=settings, timeout=600)
    assert worker.returncode == 0, worker.stderr
    return worker.stdout + worker.stderr


def enqueue(server: EmbeddedServer, *arguments: str, expect: int = 0) -> str:
    """Enqueues through the command line; returns the group id."""
    options = ("--model", MODEL, "--instruction", "Repeat this.", "--max-tokens", "12")
    done = run("ingestq", "enqueue", *arguments, *options, url=server.url)
    assert done.returncode == expect, done.stderr
    return done.stdout.strip()


def rows(server: EmbeddedServer, group_id: str) -> dict[str, dict]:
    done = run("ingestq", "results", group_id, "--follow", "--timeout", "60", url=server.url)
    assert done.returncode in (0, 1), done.stderr  # 1: some of them failed
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({line["document_id"] for line in lines}) == len(lines)
    return {line["document_id"]: line for line in lines}


def test_documents_go_from_files_to_rows_through_real_vllm(
    server: EmbeddedServer, redis: Redis, vllm: dict[str, str], tmp_path: Path
) -> None:
    pages = sorted(DOCUMENTS.glob("*.html"))[:6]
    (tmp_path / "long.txt").write_text("word " * 3000)
    group_id = enqueue(server, *map(str, pages), str(tmp_path / "long.txt"), "--retry", "2")

    log = drain(server, vllm)

    found = rows(server, group_id)
    assert set(found) == {*map(str, pages), str(tmp_path / "long.txt")}
    failed = found.pop(str(tmp_path / "long.txt"))
    assert (failed["status"], failed["error_class"], failed["attempts"]) == ("failed", "PromptTooLong", 1)
    assert "max_model_len is 1024" in failed["error_message"]
    for row in found.values():
        assert row["status"] == "succeeded", row
        assert row["text"]
        assert 0 < row["usage"]["output_tokens"] <= 12
        assert row["usage"]["prompt_tokens"] > 20
        assert 0 < row["ttft_ms"] <= row["run_ms"]
        assert row["model"] == MODEL
    assert "Repeat this" not in log, "prompts are never logged"

    # The same again costs nothing: nothing is queued, and the new group has its rows at once.
    again = enqueue(server, *map(str, pages))
    assert redis.llen(keys.queue("ingest")) == 0
    assert {name: row["text"] for name, row in rows(server, again).items()} == {
        name: row["text"] for name, row in found.items()
    }


@pytest.mark.timeout(1200)  # five processes import vLLM, one after the other
def test_waves_and_vllms_own_process_give_the_same_rows(
    server: EmbeddedServer, redis: Redis, vllm: dict[str, str]
) -> None:
    pages = [str(page) for page in sorted(DOCUMENTS.glob("*.html"))[:4]]
    texts = []
    for settings in ({}, {"INGEST_FEED": "generate"}, {"INGEST_CORE": "own-process"}):
        redis.flushall()
        group_id = enqueue(server, *pages)
        drain(server, {**vllm, **settings})
        texts.append({name: row["text"] for name, row in rows(server, group_id).items()})

    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 4


def test_an_unknown_engine_argument_is_one_line(server: EmbeddedServer, redis: Redis, vllm: dict[str, str]) -> None:
    settings = {**vllm, "INGEST_ENGINE_MAX_NUM_SEQ": "8"}
    worker = run(
        "rq", "worker", "--burst", "-w", "ingestq.workers.BatchWorker", "ingest", url=server.url, settings=settings
    )

    assert worker.returncode == 2
    assert "did you mean max_num_seqs?" in worker.stderr
    assert "Traceback" not in worker.stderr


def test_a_cancelled_group_is_aborted_in_real_vllm(
    server: EmbeddedServer, redis: Redis, vllm: dict[str, str], tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, model=MODEL, max_tokens=900) for i in range(8)], group_id="doomed")
    with WorkerProcess(server.url, tmp_path, name="v", **{**vllm, "INGEST_ENGINE": "vllm"}) as worker:
        wait_until(lambda: statuses(redis, job_ids) == ["started"] * 8, "all run")
        assert run("ingestq", "cancel", "doomed", url=server.url).returncode == 0
        wait_until(lambda: worker.output.count("the lease is gone") == 8, "the worker aborted them")
        late = put(redis, [request(99, model=MODEL)])
        wait_until(lambda: statuses(redis, late) == ["finished"], "the engine is free for others")
    assert statuses(redis, job_ids) == ["canceled"] * 8
    assert {row["status"] for row in rows(server, "doomed").values()} == {"cancelled"}


@pytest.mark.parametrize("core", ["in-process", "own-process"])
def test_a_killed_worker_leaves_neither_leases_nor_an_engine(
    server: EmbeddedServer, redis: Redis, vllm: dict[str, str], tmp_path: Path, core: str
) -> None:
    job_ids = put(redis, [request(i, model=MODEL, max_tokens=900) for i in range(8)])
    settings = {**vllm, "INGEST_ENGINE": "vllm", "INGEST_CORE": core, "INGEST_LEASE_TTL": "600"}
    with WorkerProcess(server.url, tmp_path, name="v", **settings) as worker:
        wait_until(lambda: statuses(redis, job_ids) == ["started"] * 8, "all run")
        cores = [identity(pid) for pid, command in children(worker.process.pid) if "guardian" not in command]
        worker.signal(signal.SIGKILL)
        wait_until(lambda: statuses(redis, job_ids) == ["queued"] * 8, "its guardian hands them back")
        wait_until(lambda: all(map(is_dead, cores)), "vLLM's processes are gone")

    assert bool(cores) == (core == "own-process")
