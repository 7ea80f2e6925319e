"""What fits behind a prompt, and what a payload may be."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestq.common import payload
from ingestq.common.errors import InvalidJob, PromptEmpty, PromptTooLong
from ingestq.common.schema import IngestRequest, Sampling
from ingestq.workers.prompts import ANY_MODEL, fit, needs_of

COUNTS = st.integers(0, 5000)


@given(COUNTS, st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(["refuse", "clamp"]))
def test_what_fits_is_never_over_the_context_nor_cut_unasked(
    num_tokens: int, max_tokens: int, max_model_len: int, over_length: str
) -> None:
    sampling = Sampling(max_tokens=max_tokens, min_tokens=min(max_tokens, 3))
    too_long = num_tokens >= max_model_len or (over_length == "refuse" and num_tokens + max_tokens > max_model_len)
    if num_tokens == 0 or too_long:
        with pytest.raises((PromptEmpty, PromptTooLong)) as refusal:
            fit(sampling, num_tokens, max_model_len, over_length)
        assert num_tokens == 0 or (str(num_tokens) in str(refusal.value) and str(max_model_len) in str(refusal.value))
        return
    fitted = fit(sampling, num_tokens, max_model_len, over_length)
    assert num_tokens + fitted.max_tokens <= max_model_len
    assert fitted.max_tokens == max_tokens or over_length == "clamp"
    assert fitted.min_tokens is not None
    assert fitted.min_tokens <= fitted.max_tokens


def test_the_exact_boundary_fits() -> None:
    assert fit(Sampling(max_tokens=24), 1000, 1024, "refuse").max_tokens == 24


@given(st.text(max_size=200), st.booleans())
def test_a_payload_is_read_as_it_was_written_compressed_or_not(text: str, compressed: bool) -> None:
    request = IngestRequest(document_id="d", text=text, model="m")
    data = payload.encode(request.to_json())

    read = payload.argument(zlib.compress(data) if compressed else data)

    assert IngestRequest.model_validate(read) == request
    assert needs_of(data) == ("m", 1)


@given(st.binary(max_size=300))
def test_any_other_payload_is_refused_and_never_raises_anything_else(data: bytes) -> None:
    assert needs_of(data) == (ANY_MODEL, 1)
    with pytest.raises(InvalidJob):
        payload.argument(data)


@pytest.mark.parametrize(
    "call",
    [
        b'["os.system",null,[{"model":"m"}],{}]',
        b'["ingestq.ingest",{},[{"model":"m"}],{}]',
        b'["ingestq.ingest",null,[{"model":"m"}],{"a":1}]',
        b'["ingestq.ingest",null,[{"model":"m"},1],{}]',
        b'["ingestq.ingest",null,["m"],{}]',
        b'{"model":"m"}',
        b"[" * 1005 + b"]" * 1005,
    ],
)
def test_only_our_function_with_one_request_is_served(call: bytes) -> None:
    with pytest.raises(InvalidJob):
        payload.argument(call)
    assert needs_of(call) == (ANY_MODEL, 1)


def test_a_zlib_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(b" " * (payload.MAX_PAYLOAD_BYTES + 1))

    with pytest.raises(InvalidJob, match="inflates to more than"):
        payload.argument(bomb)
