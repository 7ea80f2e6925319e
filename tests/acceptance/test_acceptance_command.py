"""`ingestq-acceptance` on real vLLM, the way `make acceptance` runs it, with a shorter ramp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from redis import Redis

from ingestq.common.embedded_server import EmbeddedServer
from support.models import tiny_gemma4
from support.processes import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1600)]

CONFIG = Path(__file__).parents[2] / "deploy" / "engines" / "cpu.yaml"


def test_the_acceptance_run_passes_on_the_cpu_engine(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    ramp = ("--in-flight", "8,32", "--prompt-tokens", "64", "--output-tokens", "12")
    options = ("--model", str(tiny_gemma4()), "--engine-config", str(CONFIG), "--url", server.url, "-o", str(output))
    done = run(
        "ingestq-acceptance",
        *options,
        *ramp,
        url=server.url,
        settings={"INGEST_MODEL_NAME": "tiny/gemma-4"},
        timeout=1500,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(output.with_suffix(".json").read_text())
    sections = {section["name"]: section for section in report["sections"]}
    assert {name: section["verdict"] for name, section in sections.items()} == {
        "machine": "pass",
        "plan": "pass",
        "kv_cache": "not possible here",  # fp8 needs AVX-512 or AMX on a CPU
        "ramp": "pass",
        "restart": "not possible here",  # nothing is compiled
        "recovery": "pass",
    }
    assert sections["plan"]["figures"]["KV dtype in use"] == "float32"
    compared = sections["kv_cache"]["figures"]
    assert (compared["KV dtype in use, reference"], compared["KV dtype in use"]) == ("bfloat16", "float32")
    assert compared["KV tokens, reference"] == pytest.approx(2 * compared["KV tokens"], rel=0.01)
    assert compared["compared"] > 32  # more than the first token of each
    assert 0.0 < compared["mean logprob difference"] < 0.1
    recovery = sections["recovery"]["figures"]
    assert (recovery["documents lost"], recovery["documents doubled"], recovery["documents failed"]) == (0, 0, 0)
