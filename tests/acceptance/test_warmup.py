"""The warm-up on real vLLM: what a worker says of its engine is so, and the first document finds its prefix cached."""

from __future__ import annotations

import json

import pytest
from redis import Redis

from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import live_cards
from support.jobs import QUEUE, put, request, row, statuses
from support.models import tiny_gemma4
from support.processes import WorkerProcess, run, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

# About 400 tokens: three blocks of 128 on CPU.
INSTRUCTION = "Read the document, then say in two sentences what it is about and whom it is for. " * 20


def test_a_warm_worker_has_the_prefix_and_the_facts_of_its_engine(
    server: EmbeddedServer, redis: Redis, tmp_path: object
) -> None:
    job_ids = put(redis, [request(i, model="tiny", chat=True, instruction=INSTRUCTION) for i in range(3)])
    settings = {
        "INGEST_ENGINE": "vllm",
        "INGEST_MODEL": str(tiny_gemma4()),
        "INGEST_MODEL_NAME": "tiny",
        "INGEST_MAX_IN_FLIGHT": "1",
        "INGEST_ENGINE_DTYPE": "float32",
        "INGEST_ENGINE_ENFORCE_EAGER": "true",
        "INGEST_ENGINE_MAX_MODEL_LEN": "1024",
        "INGEST_ENGINE_MAX_NUM_SEQS": "16",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with WorkerProcess(server.url, tmp_path, name="v", **settings) as worker:
        wait_until(lambda: statuses(redis, job_ids) == ["finished"] * 3, "all are done")
        card = live_cards(redis, QUEUE)["v"]
        shown = " ".join(run("ingestq", "status", url=server.url).stdout.split())

    first = row(redis, job_ids[0]).usage
    assert first.cached_tokens >= 3 * 128
    assert first.cached_tokens <= first.prompt_tokens
    # 1 GiB over blocks of 128 tokens x 128 float32 values, keys and values of any of the four layers (64 KiB).
    assert (card.kv_cache_dtype, card.num_blocks, card.block_size) == ("float32", 16384, 128)
    # As vLLM's own log line says it for these settings.
    assert card.num_kv_tokens == 479_349
    assert card.prefill_tokens_per_s > card.decode_tokens_per_s > 0
    assert (card.recompiles, card.num_preemptions) == (0, 0)
    assert "KV cache float32, 479349 tokens in 16384 blocks; prefill " in worker.output
    assert "the plan says" not in worker.output, "it is as planned"
    assert "1 shared prefixes cached" in worker.output
    assert "KV cache float32, 479,349 tokens, 16,384 blocks of 128 tokens" in shown
    assert json.dumps(INSTRUCTION[:40]) not in worker.output
