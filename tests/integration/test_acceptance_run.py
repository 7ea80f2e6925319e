"""`ingestq-acceptance` end to end on the simulated engine: real workers, a real server, a real kill -9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from support.processes import SIMULATED, run

pytestmark = pytest.mark.slow

DOCUMENTS = Path(__file__).parents[2] / "deploy" / "demo" / "documents"


def accept(
    server: EmbeddedServer, folder: Path, *options: str, expect: int = 0, **settings: str
) -> tuple[dict[str, Any], str]:
    """Runs the command against the tests' server; its report as an object, and as a page."""
    output = folder / "report.md"
    fixed = ("--in-flight", "8,16", "--output-tokens", "16", "--url", server.url, "-o", str(output))
    done = run("ingestq-acceptance", *options, *fixed, url=server.url, settings={**SIMULATED, **settings})
    assert done.returncode == expect, done.stderr
    return json.loads(output.with_suffix(".json").read_text()), output.read_text()


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {section["name"]: section for section in report["sections"]}


def test_every_section_has_a_verdict_and_nothing_of_the_run_stays_in_force(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    report, page = accept(server, tmp_path, "--prompt-tokens", "64")

    sections = by_name(report)
    assert {name: section["verdict"] for name, section in sections.items()} == {
        "machine": "pass",
        "plan": "not possible here",
        "kv_cache": "not possible here",
        "ramp": "pass",
        "restart": "not possible here",
        "recovery": "pass",
    }
    assert report["passed"]
    assert [row[:2] for row in sections["ramp"]["table"]["rows"]] == [[8, 16], [16, 32]]
    recovery = sections["recovery"]["figures"]
    assert (recovery["documents lost"], recovery["documents doubled"], recovery["documents failed"]) == (0, 0, 0)
    assert recovery["in flight at the kill"] == 8
    assert recovery["documents run twice"] >= 8
    assert "| Kill and recovery | pass |" in page
    assert not [key for key in redis.scan_iter() if b":limits:" in key or b":queue:" in key]


def test_the_owners_documents_are_run_and_those_that_do_not_fit_are_named(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    settings = {"INGEST_ENGINE_MAX_MODEL_LEN": "512"}
    report, page = accept(server, tmp_path, "--documents", str(DOCUMENTS), **settings)

    assert report["passed"]
    assert "documents are left out, the first: " in page
    assert "max_model_len is 512" in page


def test_an_engine_that_does_not_start_is_a_failed_report(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    report, page = accept(server, tmp_path, expect=1, INGEST_ENGINE_MAX_NUM_SEQ="8")

    assert not report["passed"]
    assert "did you mean max_num_seqs?" in page
    assert redis.llen(keys.queue("ingest")) == 0
