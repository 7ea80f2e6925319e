"""The engine's YAML with the real vLLM: its names, and a worker that runs on a file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_config import load_engine_config, read_engine_config
from ingestq.common.engine_names import RESERVED, gone
from ingestq.common.settings import Settings
from support.jobs import put, request, statuses
from support.models import tiny_gemma4
from support.processes import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "deploy" / "engines"
MODEL = "tiny/gemma-4"


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Names and types of `vllm.EngineArgs`."""
    from vllm import EngineArgs

    return {field.name: field.type for field in dataclasses.fields(EngineArgs)}


def worker(server: EmbeddedServer, config: str, **settings: str) -> Any:
    return run(
        "rq",
        "worker",
        "--burst",
        "-w",
        "ingestq.workers.BatchWorker",
        "ingest",
        url=server.url,
        settings={"INGEST_ENGINE_CONFIG": config, "VLLM_NO_USAGE_STATS": "1", **settings},
    )


def test_every_line_of_a_shipped_file_is_an_argument_of_vllm(known: dict[str, Any]) -> None:
    for path in sorted(ENGINES.glob("*.yaml")):
        load_engine_config(Settings(engine_config=str(path))).check_names(known)


def test_names_that_are_said_to_be_gone_are_gone_and_those_to_write_exist(known: dict[str, Any]) -> None:
    assert not set(gone()) & set(known)
    assert set(RESERVED) <= set(known)
    for name, what in gone().items():
        for argument in re.findall(r"\b(?:write|into|with(?= \w+:)) (\w+)", what):
            assert argument in known, (name, argument)


def test_kv_caches_and_methods_that_guard_rails_name_are_vllms() -> None:
    from typing import get_args

    from vllm.config.cache import CacheDType
    from vllm.config.speculative import EagleModelTypes, NgramGPUTypes, SpeculativeMethod

    from ingestq.common import guard_rails

    assert set(guard_rails._TPU_KV_DTYPES) <= set(get_args(CacheDType))
    assert "int8" not in get_args(CacheDType)
    asynchronous = {*_flat(EagleModelTypes), *_flat(NgramGPUTypes), "draft_model", "dspark"}
    assert set(guard_rails._SYNCHRONOUS_METHODS) - {"[ngram]"} == set(_flat(SpeculativeMethod)) - asynchronous


def _flat(literal: Any) -> list[str]:
    """The words of a Literal that may hold others."""
    from typing import get_args

    return [word for part in get_args(literal) for word in ([part] if isinstance(part, str) else _flat(part))]


def test_documents_run_on_a_shipped_file_with_a_variable_over_it(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    job_ids = put(redis, [request(i, model=MODEL, max_tokens=8) for i in range(5)])
    config = tmp_path / "engine.yaml"
    config.write_text(f"model: {tiny_gemma4()}\n{(ENGINES / 'cpu.yaml').read_text()}")

    done = worker(server, str(config), INGEST_MODEL_NAME=MODEL, INGEST_ENGINE_MAX_NUM_SEQS="3")

    assert done.returncode == 0, done.stderr
    assert statuses(redis, job_ids) == ["finished"] * 5
    assert "up to 4 documents in flight" in done.stdout + done.stderr  # 1.1 x max_num_seqs, of the variable


def test_a_wrong_file_ends_the_worker_with_one_line(server: EmbeddedServer, redis: Redis) -> None:
    done = worker(server, str(ROOT / "tests" / "data" / "article.yaml"), INGEST_MODEL=str(tiny_gemma4()))

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "is no engine argument" in line]
    assert re.findall(r"(\w+) is no engine argument of vLLM", line) == [
        "speculative_decoding_method",
        "num_speculative_tokens",
        "swap_space",
        "compile_cache_max_size",
    ]


def test_an_engine_that_can_not_fit_is_refused_before_it_is_loaded(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(json.dumps({**read_engine_config(ENGINES / "cpu.yaml"), "kv_cache_memory_bytes": 100_000}))

    done = worker(server, str(config), INGEST_MODEL=str(tiny_gemma4()))

    assert done.returncode == 2
    assert "it can't fit cpu: one sequence of max_model_len=2304 takes" in done.stderr
    assert "INGEST_MISFIT=warn" in done.stderr
    assert "Traceback" not in done.stderr
