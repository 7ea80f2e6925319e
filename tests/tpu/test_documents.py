"""Documents go from enqueue to row through `BatchWorker` on the real TPU runtime, with an fp8 KV cache, on a CPU.

The model is a tiny Qwen3 of random weights, in float32: roundings that depend on a document's company don't show.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import EngineCard, live_cards
from ingestq.common.errors import RequestRefused
from ingestq.common.planner import capacity
from ingestq.common.planner.hardware import MACHINES
from ingestq.common.planner.model_layout import load_layout
from ingestq.common.schema import IngestRequest, IngestResult, Sampling
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue, iter_results
from ingestq.producer.documents import read_documents
from support.jobs import QUEUE, put, row, statuses
from support.processes import WorkerProcess, environment, wait_until
from support.tiny_qwen3 import TINY_QWEN3, tiny_qwen3
from support.tpu_worker import FINDINGS, HBM_BYTES

pytestmark = pytest.mark.timeout(900)

TESTS = Path(__file__).parents[1]
DOCUMENTS = TESTS.parent / "deploy" / "demo" / "documents"
PYTHONPATH = f"{TESTS}:{TESTS.parent / 'deploy'}"
MODEL = "tiny/qwen3"
INSTRUCTION = "Say this again."

# Of the device, for the KV cache: little, as JAX on a CPU copies all of it in each step.
HBM = 8 * 2**20

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "fp8_e5m2",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}

# At temperature 0, a seed means nothing and is let through.
SEEDED = Sampling(max_tokens=4, temperature=1.0, seed=1)

# Of JAX in one CPU; an engine takes as many as it needs.
TWO_DEVICES = "--xla_force_host_platform_device_count=2"

# More than are in flight at once, so that the engine is topped up while it steps.
NUM_DOCUMENTS = 32


@dataclass(frozen=True, kw_only=True)
class Served:
    """A worker that serves the queue."""

    server: EmbeddedServer
    redis: Redis
    worker: WorkerProcess
    findings_file: Path

    @property
    def findings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.findings_file.read_text())
        return found

    @property
    def card(self) -> EngineCard:
        return live_cards(self.redis, QUEUE)[self.worker.name]

    def queue(self) -> IngestQueue:
        return IngestQueue(QUEUE, connection=self.redis, settings=Settings(model=MODEL))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("worker")
    settings = {
        "INGEST_ENGINE": "vllm",
        "INGEST_MODEL": str(tiny_qwen3()),
        "INGEST_MODEL_NAME": MODEL,
        **{f"INGEST_ENGINE_{name.upper()}": str(value) for name, value in ENGINE_ARGS.items()},
        HBM_BYTES: str(HBM),
        FINDINGS: str(folder / "findings.json"),
        "PYTHONPATH": PYTHONPATH,
    }
    with EmbeddedServer() as server, Redis.from_url(server.url) as redis:
        worker = WorkerProcess(server.url, folder, name="tpu", worker="support.tpu_worker.TpuOnCpuWorker", **settings)
        worker.start_patience = 600.0  # vllm-tpu alone takes a minute to import
        with worker:
            yield Served(server=server, redis=redis, worker=worker, findings_file=folder / "findings.json")


@pytest.fixture(scope="module")
def requests() -> list[IngestRequest]:
    """Passages of the demo's documents, with outputs of different lengths."""
    texts = [item.text for item in read_documents([str(DOCUMENTS)], model=MODEL)]
    passages = (text[start : start + 240] for start in range(0, 4800, 240) for text in texts if len(text) > start + 240)
    return [
        IngestRequest(
            document_id=f"passage-{i}",
            text=passage,
            model=MODEL,
            instruction=INSTRUCTION,
            chat=False,
            sampling=Sampling(max_tokens=4 + i * 5 % 13, ignore_eos=True),
        )
        for i, passage in enumerate(islice(passages, NUM_DOCUMENTS))
    ]


@pytest.fixture(scope="module")
def rows(served: Served, requests: list[IngestRequest]) -> dict[str, IngestResult]:
    group = served.queue().enqueue_many(requests)
    return {result.document_id: result for result in iter_results(group, connection=served.redis, timeout=600)}


def generate(
    folder: Path, requests: list[IngestRequest], *, look_at: Sequence[Mapping[str, Any]] = (), **engine_args: Any
) -> dict[str, Any]:
    """One `LLM.generate` call over the same documents, in a process without ingestq.

    Args:
        look_at: arguments of further engines, whose KV cache alone is looked at.
    """
    task, found = folder / "task.json", folder / "found.json"
    ours = {**ENGINE_ARGS, **engine_args, "model": str(tiny_qwen3())}
    content = {
        "hbm_bytes": HBM,
        "engine_args": ours,
        "prompts": [f"{item.instruction}\n\n{item.text}" for item in requests],
        "max_tokens": [item.sampling.max_tokens for item in requests],
        "look_at": [{**ours, **args} for args in look_at],
    }
    task.write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, "-m", "support.tpu_generate", str(task), str(found)],
        env=environment("", {"PYTHONPATH": PYTHONPATH, "XLA_FLAGS": TWO_DEVICES}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(found.read_text())
    return result


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory, requests: list[IngestRequest]) -> dict[str, Any]:
    return generate(tmp_path_factory.mktemp("fp8"), requests)


# Each of them has one of the model's KV heads. (With more devices than heads, its weights don't load in 0.32.)
OVER_TWO = [{"tensor_parallel_size": 2, "kv_cache_dtype": dtype} for dtype in ("fp8_e5m2", "bfloat16")]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, requests: list[IngestRequest]) -> dict[str, Any]:
    return generate(tmp_path_factory.mktemp("bf16"), requests, kv_cache_dtype="bfloat16", look_at=OVER_TWO)


def planned_blocks(kv_cache_dtype: str, tensor_parallel_size: int) -> tuple[int, int]:
    """By the planner: blocks, and tokens of each."""
    machine = replace(MACHINES["v6e-4"], hbm_bytes=HBM)
    limits = {name: ENGINE_ARGS[name] for name in ("max_model_len", "max_num_seqs")}
    block_size = capacity.block_size(machine, **limits)
    kv_cache = capacity.kv_cache_shape(
        load_layout(str(tiny_qwen3())),
        machine,
        tensor_parallel_size=tensor_parallel_size,
        value_bytes=capacity.kv_dtype_bytes(kv_cache_dtype, "float32"),
        block_size=block_size,
        max_num_batched_tokens=ENGINE_ARGS["max_num_batched_tokens"],
    )
    return kv_cache.num_blocks(int(HBM * tensor_parallel_size * 0.92)), block_size  # vLLM's gpu_memory_utilization


def test_documents_become_what_llm_generate_makes_of_them(
    served: Served,
    rows: dict[str, IngestResult],
    fp8: dict[str, Any],
    requests: list[IngestRequest],
    facts: dict[str, Any],
) -> None:
    texts = [rows[item.document_id].text for item in requests]
    facts["documents"] = len(requests)
    facts["succeeded"] = sum(row.status == "succeeded" for row in rows.values())
    facts["identical"] = sum(text == expected for text, expected in zip(texts, fp8["texts"], strict=True))

    assert facts["succeeded"] == facts["identical"] == NUM_DOCUMENTS
    assert len(set(texts)) == NUM_DOCUMENTS, "a model that says the same of everything would prove nothing"
    for item in requests:
        usage = rows[item.document_id].usage
        assert usage is not None
        assert usage.output_tokens == item.sampling.max_tokens


def test_the_engine_is_topped_up_while_it_steps(
    served: Served, rows: dict[str, IngestResult], fp8: dict[str, Any], facts: dict[str, Any]
) -> None:
    max_num_seqs = ENGINE_ARGS["max_num_seqs"]
    prompts_by_step = max(served.findings["runs"], key=len)
    facts["steps"], facts["steps_of_generate"] = len(prompts_by_step), fp8["num_steps"]

    full = [step for step, num_prompts in enumerate(prompts_by_step) if num_prompts >= max_num_seqs]

    # In waves the engine would run empty three times between the first full step and the last.
    assert min(prompts_by_step[full[0] : full[-1]]) >= max_num_seqs // 2


def test_the_kv_cache_is_fp8_by_its_arrays_and_the_card_says_so(
    served: Served, rows: dict[str, IngestResult], facts: dict[str, Any]
) -> None:
    found = served.findings
    facts["kv_dtype"] = found["kv_dtype"]

    assert found["kv_dtype"] == "float8_e5m2"
    assert found["num_layers"] == TINY_QWEN3["num_hidden_layers"]
    # One byte for each of 2 (K and V) x 2 heads x 128 values.
    assert found["kv_bytes"] == found["num_layers"] * math.prod(found["kv_shapes"][0])
    assert served.card.device == "tpu"
    assert served.card.kv_cache_dtype == "fp8_e5m2"
    assert served.card.num_blocks == found["kv_shapes"][0][0]
    assert served.card.block_size == found["block_size"]


def test_fp8_holds_twice_the_tokens_of_bfloat16_and_changes_what_a_random_model_says(
    fp8: dict[str, Any], bf16: dict[str, Any], facts: dict[str, Any]
) -> None:
    pairs = list(zip(fp8["token_ids"], bf16["token_ids"], strict=True))
    tokens = [a == b for of_fp8, of_bf16 in pairs for a, b in zip(of_fp8, of_bf16, strict=True)]
    facts["kv_dtype_compared"] = bf16["kv_dtype"]
    facts["first_token_agreement"] = round(sum(a[0] == b[0] for a, b in pairs) / len(pairs), 3)
    facts["token_agreement"] = round(sum(tokens) / len(tokens), 3)

    assert bf16["kv_dtype"] == "bfloat16"
    assert fp8["kv_shapes"][0][0] // 2 == bf16["kv_shapes"][0][0]
    assert 0 < facts["token_agreement"] < 1, "the type of the KV cache is of consequence"


def test_the_engine_has_the_blocks_that_the_planner_counts(fp8: dict[str, Any], bf16: dict[str, Any]) -> None:
    for dtype, found in (("fp8_e5m2", fp8), ("bfloat16", bf16)):
        assert (found["kv_shapes"][0][0], found["block_size"]) == planned_blocks(dtype, 1), dtype


def test_so_it_has_where_a_device_has_one_kv_head_and_fp8_gains_nothing(bf16: dict[str, Any]) -> None:
    """Its keys and values are two, and fp8 is packed by four."""
    for args, found in zip(OVER_TWO, bf16["looked_at"], strict=True):
        assert (found["kv_shapes"][0][0], found["block_size"]) == planned_blocks(args["kv_cache_dtype"], 2)

    assert [found["kv_dtype"] for found in bf16["looked_at"]] == ["float8_e5m2", "bfloat16"]
    assert bf16["looked_at"][0]["kv_shapes"][0][0] == bf16["looked_at"][1]["kv_shapes"][0][0]


def test_what_is_compiled_after_the_start_is_counted_and_shown(
    served: Served, rows: dict[str, IngestResult], facts: dict[str, Any]
) -> None:
    """SKIP_JAX_PRECOMPILE: shapes that the warm-up has not met are compiled while documents wait."""
    found = served.findings
    expected = found["num_compilations"] - found["num_compilations_at_start"]
    facts["recompiles"] = expected

    assert expected > 0
    wait_until(lambda: served.card.recompiles == expected, f"the card says {expected} recompiles")


def test_a_seed_is_a_clear_dead_letter(served: Served, requests: list[IngestRequest]) -> None:
    seeded = requests[0].model_copy(update={"document_id": "seeded", "sampling": SEEDED})
    (job_id,) = put(served.redis, [seeded])
    wait_until(lambda: statuses(served.redis, [job_id]) == ["failed"], "the seeded document failed")

    result = row(served.redis, job_id)
    assert (result.status, result.error_class, result.attempts) == ("failed", "PromptRefused", 1)
    assert "seed" in str(result.error_message)


def test_a_seed_is_refused_at_enqueue_once_the_card_says_tpu(served: Served, requests: list[IngestRequest]) -> None:
    seeded = requests[1].model_copy(update={"document_id": "seeded-2", "sampling": SEEDED})
    with pytest.raises(RequestRefused, match="seed"):
        served.queue().enqueue(seeded)


def test_a_stopped_worker_ends_in_order(served: Served) -> None:
    """The last of this file: nothing is served from here on."""
    served.worker.signal(signal.SIGTERM)

    assert served.worker.wait() == 0
    assert not live_cards(served.redis, QUEUE)
