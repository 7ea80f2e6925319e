"""What makes documents of one task, and how long they are taken to be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ingestq.common.schema import IngestRequest, Sampling
from ingestq.common.task_id import estimated_tokens, task_id


def request(**fields: Any) -> IngestRequest:
    values: dict[str, Any] = {"document_id": "a", "text": "x", "model": "m", "instruction": "Summarize.", **fields}
    return IngestRequest.model_validate(values)


ONE = request()


def test_a_task_id_is_16_hexadecimal_digits() -> None:
    assert re.fullmatch("[0-9a-f]{16}", task_id(ONE))


@pytest.mark.parametrize(
    "fields", [{"document_id": "b"}, {"text": "another text"}, {"sampling": Sampling(seed=7)}], ids=repr
)
def test_documents_of_one_task_differ_in_themselves_and_their_seed_only(fields: dict[str, Any]) -> None:
    assert task_id(request(**fields)) == task_id(ONE)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "other"},
        {"system": "Be brief."},
        {"instruction": "Translate."},
        {"instruction": None, "system": "Summarize."},
        {"chat": False},
        {"sampling": Sampling(max_tokens=9)},
        {"sampling": Sampling(stop=("\n",))},
    ],
    ids=repr,
)
def test_what_makes_outputs_longer_or_shorter_makes_another_task(fields: dict[str, Any]) -> None:
    assert task_id(request(**fields)) != task_id(ONE)


def test_a_default_that_is_spelt_out_makes_no_other_task() -> None:
    assert task_id(request(sampling={"max_tokens": 256, "top_p": None}, system=None)) == task_id(ONE)


def test_tokens_are_estimated_from_the_bytes_of_all_parts() -> None:
    plain = request(text="x" * 4000, instruction=None, chat=False)

    assert estimated_tokens(plain) == 1000
    assert estimated_tokens(request(text="x" * 4000, instruction="y" * 400, system="z" * 40, chat=False)) == 1110
    assert estimated_tokens(request(text="语" * 4000, instruction=None, chat=False)) == 3000


def test_a_chat_template_adds_some() -> None:
    assert 10 <= estimated_tokens(request(chat=True)) - estimated_tokens(request(chat=False)) <= 40


def test_a_prompt_has_a_token_at_least() -> None:
    assert estimated_tokens(request(text="", instruction=None, chat=False)) == 1
