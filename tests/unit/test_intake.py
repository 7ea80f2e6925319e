"""What a leased document needs, and which never can have it."""

from __future__ import annotations

from typing import Any

import pytest

from ingestq.common import scripts
from ingestq.common.errors import InvalidJob, KvLimitExceeded
from ingestq.common.limits import AdmissionLimits
from ingestq.common.scripts import LeasedJob
from ingestq.common.settings import Settings
from ingestq.common.task_id import task_id
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.intake import Intake
from ingestq.workers.pool import Ready
from support.jobs import new_job, request

NONE = AdmissionLimits()


def intake_of(*, max_kv_tokens: int = 0, **settings: Any) -> Intake:
    chosen = Settings(engine="simulated", model="sim", **settings)
    engine = SimulatedEngine.from_settings(chosen)
    return Intake(None, chosen, engine, ["q"], max_kv_tokens=max_kv_tokens)


def job(text: str, *, max_tokens: int = 20, model: str = "sim") -> LeasedJob:
    item = request(0, text=text, max_tokens=max_tokens, model=model)
    return LeasedJob(
        job_id=new_job(item).job_id,
        execution_id="e",
        queue="q",
        data=new_job(item).data,
        task=task_id(item),
        enqueued_ms=None,
        leased_ms=0,
        attempts=1,
        crashes=0,
        result_ttl=None,
        failure_ttl=None,
        refused="",
    )


def ready(intake: Intake, leased: LeasedJob, limits: AdmissionLimits = NONE) -> Ready:
    return intake.ready(leased, intake.request(leased), limits)


def test_a_document_needs_its_prompt_and_its_output_in_whole_blocks() -> None:
    found = ready(intake_of(), job("x" * 400, max_tokens=20))
    assert (found.num_prompt_tokens, found.kv_tokens, found.num_blocks) == (100, 128, 8)
    assert found.expected_output == 20


def test_a_limit_is_kept_to_the_token() -> None:
    leased = job("x" * 400, max_tokens=28)
    assert ready(intake_of(max_kv_tokens=128), leased, AdmissionLimits(max_kv_tokens=128)).kv_tokens == 128


@pytest.mark.parametrize(
    ("intake", "limits", "name"),
    [
        (intake_of(max_kv_tokens=112), NONE, "INGEST_MAX_KV_TOKENS is 112"),
        (intake_of(max_kv_tokens_fleet=112), NONE, "INGEST_MAX_KV_TOKENS_FLEET is 112"),
        (intake_of(), AdmissionLimits(max_kv_tokens=112), "the queue's limit max_kv_tokens is 112"),
        (intake_of(), AdmissionLimits(max_kv_tokens_fleet=112), "the queue's limit max_kv_tokens_fleet is 112"),
    ],
)
def test_what_no_limit_leaves_it_is_refused_with_both_numbers(
    intake: Intake, limits: AdmissionLimits, name: str
) -> None:
    with pytest.raises(KvLimitExceeded, match=f"needs 128 KV tokens .100 of prompt, 28 of expected output.*{name}"):
        ready(intake, job("x" * 400, max_tokens=28), limits)


def test_a_closed_queue_refuses_nobody() -> None:
    """0 admits nothing: what is leased was leased before."""
    assert ready(intake_of(), job("text"), AdmissionLimits(max_kv_tokens=0, max_kv_tokens_fleet=0))


def test_a_task_that_is_known_reserves_what_its_documents_write(monkeypatch: pytest.MonkeyPatch) -> None:
    intake, leased = intake_of(), job("x" * 400, max_tokens=2000)
    assert ready(intake, leased).kv_tokens == 2112
    for _ in range(20):
        intake.observe(leased, 32)
    assert intake.reservations == {"q": {leased.task: 32}}
    found = ready(intake, leased)
    assert found.kv_tokens == 144
    assert found.expected_output < 32

    sent = []
    monkeypatch.setattr(scripts, "learn", lambda connection, queue, observed: sent.append((queue, observed)) or {})
    intake.learn()
    assert [(queue, sum(observed[leased.task].values())) for queue, observed in sent] == [("q", 20)]
    assert intake.reservations == {"q": {}}, "what the fleet knows is what counts"


def test_a_request_for_another_model_than_it_was_queued_for_is_refused() -> None:
    with pytest.raises(InvalidJob, match="queued for 'sim'"):
        intake_of().request(job("text", model="other"))
