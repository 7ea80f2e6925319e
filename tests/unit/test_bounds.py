"""What `enqueue` refuses of a request's sampling."""

from __future__ import annotations

from typing import Any

import pytest

from ingestq.common.engine_card import EngineCard
from ingestq.common.errors import RequestRefused
from ingestq.common.schema import IngestRequest
from ingestq.producer.bounds import check_sampling


def card(device: str) -> EngineCard:
    return EngineCard(
        model="m",
        tokenizer_digest="t",
        max_token_bytes=4,
        max_model_len=100,
        max_num_seqs=8,
        device=device,
        engine="vllm 0.32.0",
        engine_digest="e",
        over_length="refuse",
    )


def request(**sampling: Any) -> IngestRequest:
    return IngestRequest.model_validate({"document_id": "a-17", "text": "x", "model": "m", "sampling": sampling})


def test_a_seed_is_refused_where_all_engines_are_on_tpu_with_value_and_way_out() -> None:
    with pytest.raises(RequestRefused) as refusal:
        check_sampling(request(seed=7_000_000_001, temperature=0.7), [card("tpu"), card("tpu")])

    message = str(refusal.value)
    assert message.startswith("document 'a-17': sampling: seed=7000000001")
    assert "every live worker that serves 'm' is on TPU" in message
    assert "leave it out, and set temperature to 0 for the same output every time" in message


@pytest.mark.parametrize("devices", [[], ["cpu"], ["cuda", "tpu"], ["simulated"]])
def test_a_seed_is_accepted_where_some_engine_takes_it_or_nobody_is_there(devices: list[str]) -> None:
    check_sampling(request(seed=7, temperature=0.7), [card(device) for device in devices])


def test_a_seed_means_nothing_at_temperature_0_and_is_accepted() -> None:
    check_sampling(request(seed=7), [card("tpu")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("min_p", 0.1),
        ("min_tokens", 3),
    ],
)
def test_what_the_tpu_runtime_ignores_without_a_word_is_refused(name: str, value: float) -> None:
    with pytest.raises(RequestRefused, match=f"sampling: {name}={value} not supported by the TPU runtime"):
        check_sampling(request(temperature=0.7, **{name: value}), [card("tpu")])
    check_sampling(request(temperature=0.7, **{name: value}), [card("cpu")])


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_tokens": 3, "stop": ["x"], "ignore_eos": True},
        {
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            "temperature": 1.0,
        },
        {"min_p": 0.1},  # greedy: the likeliest token is the likeliest with it, too
    ],
)
def test_what_the_tpu_runtime_does_is_accepted(sampling: dict[str, Any]) -> None:
    check_sampling(request(**sampling), [card("tpu")])
