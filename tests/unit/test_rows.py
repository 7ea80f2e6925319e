"""What a row says of how a document ended."""

from __future__ import annotations

import orjson

from ingestq.common.errors import DocumentTimeout, PromptTooLong
from ingestq.common.scripts import LeasedJob
from ingestq.common.settings import Settings
from ingestq.workers.engines.base import Completion
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.rows import RowWriter
from support.jobs import request

WRITER = RowWriter(
    worker="w",
    card=SimulatedEngine.from_settings(Settings(engine="simulated", model="sim")).card,
    result_ttl=60,
    failure_ttl=90,
)
JOB = LeasedJob(
    job_id="j",
    execution_id="e",
    data=b"",
    enqueued_ms=5,
    leased_ms=10,
    attempts=1,
    crashes=0,
    result_ttl=None,
    failure_ttl=None,
    refused="",
)


def completion(**fields: object) -> Completion:
    values = {
        "prompt_id": "e",
        "text": "out",
        "token_ids": (1, 2),
        "finish_reason": "stop",
        "num_prompt_tokens": 3,
        "num_cached_tokens": 0,
        "ttft_ms": 1.0,
        "run_ms": 2.0,
    }
    return Completion(**{**values, **fields})


def test_an_output_that_is_no_unicode_text_fails_its_document_alone() -> None:
    item = WRITER.ended(JOB, request(0), completion(text="half a pair: \ud83d"))

    row = orjson.loads(item.result_json)
    assert (item.kind, row["status"], row["error_class"]) == ("P", "failed", "ResultNotSerializable")
    assert item.exception.startswith("ResultNotSerializable: ")


def test_an_engines_error_that_is_no_unicode_text_is_written() -> None:
    item = WRITER.ended(JOB, request(0), completion(finish_reason="error", error="quoted: \ud83d"))

    assert orjson.loads(item.result_json)["error_message"] == "quoted: ?"


def test_only_what_may_go_better_next_time_is_retried() -> None:
    assert WRITER.ended(JOB, request(0), DocumentTimeout("late")).kind == "F"
    assert WRITER.ended(JOB, request(0), completion(finish_reason="error", error="broken")).kind == "F"
    assert WRITER.ended(JOB, request(0), PromptTooLong("long")).kind == "P"
    assert WRITER.ended(JOB, None, PromptTooLong("long")).ttl == 90
