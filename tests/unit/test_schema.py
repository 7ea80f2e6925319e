from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ingestq.common.payload import FINISHED_STUB, FUNCTION_NAME
from ingestq.common.schema import IngestRequest, IngestResult, Sampling, Status, Usage, job_id

texts = st.text(st.characters(exclude_categories=["Cs"]))
names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=40)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 1_000_000),
    temperature=st.floats(0, 100),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    top_k=st.none() | st.integers(-1, 2**31 - 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), max_size=3),
)
requests = st.builds(
    IngestRequest,
    document_id=names,
    text=texts,
    model=names,
    system=st.none() | texts,
    instruction=st.none() | texts,
    chat=st.booleans(),
    sampling=samplings,
)


@given(requests)
def test_job_id_survives_a_json_round_trip(request: IngestRequest) -> None:
    there_and_back = IngestRequest.model_validate_json(request.to_json())

    assert there_and_back == request
    assert job_id(there_and_back.to_json()) == job_id(request.to_json())


@given(requests)
def test_job_id_survives_another_json_library_and_another_field_order(request: IngestRequest) -> None:
    fields = orjson.loads(orjson.dumps(orjson.loads(request.to_json())))
    reversed_fields = dict(reversed(fields.items()))

    assert job_id(IngestRequest.model_validate(reversed_fields).to_json()) == job_id(request.to_json())


@given(requests)
def test_a_default_spelled_out_is_the_same_job(request: IngestRequest) -> None:
    spelled_out = IngestRequest.model_validate(request.model_dump(exclude_none=False))

    assert job_id(spelled_out.to_json()) == job_id(request.to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"document_id": "b"},
        {"text": "other"},
        {"model": "n"},
        {"system": "be brief"},
        {"instruction": "summarise"},
        {"chat": False},
        {"sampling": Sampling(max_tokens=9)},
        {"sampling": Sampling(seed=1)},
    ],
)
def test_whatever_determines_the_result_is_in_the_job_id(change: dict[str, object]) -> None:
    request = IngestRequest(document_id="a", text="t", model="m")

    assert job_id(request.model_copy(update=change).to_json()) != job_id(request.to_json())


def test_job_id_is_one_that_rq_allows() -> None:
    request = IngestRequest(document_id="a", text="t", model="m")

    assert len(job_id(request.to_json())) == 32
    assert set(job_id(request.to_json())) <= set("0123456789abcdef")


def test_job_id_of_a_known_request_does_not_change_between_releases() -> None:
    request = IngestRequest(document_id="a", text="naïve “text”", model="m", sampling=Sampling(max_tokens=8))

    assert request.to_json().decode() == (
        '{"schema_version":1,"document_id":"a","text":"naïve “text”","model":"m","chat":true,'
        '"sampling":{"max_tokens":8,"temperature":0.0}}'
    )
    assert job_id(request.to_json()) == "99ed69f981678e5e4a1ef52d9ee0fc5a"


@pytest.mark.parametrize("record", [IngestRequest, IngestResult, Sampling])
def test_unknown_fields_are_refused(record: type[IngestRequest]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        record.model_validate(
            {"document_id": "a", "text": "t", "model": "m", "job_id": "j", "status": "failed", "colour": "red"}
        )


def test_records_are_frozen() -> None:
    request = IngestRequest(document_id="a", text="t", model="m")

    with pytest.raises(ValidationError, match="frozen"):
        request.text = "u"


def test_a_later_schema_version_is_refused() -> None:
    with pytest.raises(ValidationError, match="schema_version"):
        IngestRequest.model_validate({"schema_version": 2, "document_id": "a", "text": "t", "model": "m"})


@pytest.mark.parametrize("document_id", ["", "a\n", "a\x00b", "a\u2028b", "x" * 513])
def test_document_ids_are_one_bounded_line(document_id: str) -> None:
    with pytest.raises(ValidationError, match="document_id"):
        IngestRequest(document_id=document_id, text="t", model="m")


def test_sampling_is_vllms_and_bounded() -> None:
    with pytest.raises(ValidationError, match="max_tokens"):
        Sampling(max_tokens=0)
    with pytest.raises(ValidationError, match="temperature"):
        Sampling(temperature=float("nan"))


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (Sampling, {"top_k": 2**31}),
        (Sampling, {"seed": 2**63}),
        (Sampling, {"seed": -(2**63) - 1}),
        (Sampling, {"min_tokens": 2**63}),
        (Usage, {"prompt_tokens": 2**63}),
        (Usage, {"cached_tokens": 2**63}),
        (Usage, {"output_tokens": -(2**63) - 1}),
        (IngestResult, {"document_id": "a", "job_id": "j", "status": "failed", "attempts": 2**63}),
    ],
)
def test_a_number_that_json_libraries_disagree_on_is_refused(record: type[Sampling], fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=list(fields)[-1]):
        record.model_validate(fields)


@given(texts, st.sampled_from(Status))
def test_results_survive_a_json_round_trip(text: str, status: Status) -> None:
    result = IngestResult(document_id="a", job_id="j", status=status, text=text)

    assert IngestResult.model_validate_json(result.to_json()) == result


def test_the_stub_of_a_finished_job_is_a_payload_that_rq_reads() -> None:
    assert orjson.loads(FINISHED_STUB) == [FUNCTION_NAME, None, [], {}]
