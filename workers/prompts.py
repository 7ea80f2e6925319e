"""From a leased job to the prompt that the engine runs: parse, encode, check against the model's context."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from ..common import payload
from ..common.errors import InvalidJob, PromptEmpty, PromptTooLong
from ..common.schema import SCHEMA_VERSION, IngestRequest, Sampling
from ..common.scripts import LeasedJob
from .engines.base import Engine, Prompt

# The model of a job that is not a valid request: any worker may lease it, in order to fail it with its reason.
ANY_MODEL = "*"

# No release will come to this one: a job that claims a higher version is a malformed one.
_MAX_SCHEMA = 1000


class NewerSchema(Exception):
    """A job waits for a worker of a newer release.

    Attributes:
        schema: the version that it is of.
    """

    def __init__(self, schema: int) -> None:
        super().__init__(f"schema version {schema}, this worker reads {SCHEMA_VERSION}")
        self.schema = schema


def parse_request(job: LeasedJob) -> IngestRequest:
    """The request in a job.

    Raises:
        NewerSchema: it is for a newer worker.
        InvalidJob: another function, other arguments, an unknown field, an RQ feature that isn't served, or too large.
    """
    if job.refused == "size":
        raise InvalidJob(f"job {job.job_id}: the payload is over {payload.MAX_PAYLOAD_BYTES} bytes; split the document")
    if job.refused:
        raise InvalidJob(f"job {job.job_id}: RQ's {job.refused!r} is not served by BatchWorker; enqueue without it")
    argument = payload.argument(job.data)
    if (schema := _schema_of(argument)) > SCHEMA_VERSION:
        raise NewerSchema(schema)
    try:
        return IngestRequest.model_validate(argument)
    except ValidationError as error:
        reasons = "; ".join(f"{_name(item['loc'])}: {item['msg']}" for item in error.errors()[:5])
        raise InvalidJob(f"job {job.job_id}: not a valid IngestRequest: {reasons}") from None


def _name(location: tuple[int | str, ...]) -> str:
    """A field as it may be logged: a job can name its fields whatever it likes."""
    return ascii(".".join(map(str, location)))[1:-1][:80]


def needs_of(data: bytes) -> tuple[str, int]:
    """The model and the schema version that a payload asks for; ANY_MODEL if they can't be told."""
    try:
        argument = payload.argument(data)
    except InvalidJob:
        return ANY_MODEL, SCHEMA_VERSION
    model = argument.get("model")
    return model if isinstance(model, str) and model else ANY_MODEL, _schema_of(argument)


def _schema_of(argument: dict[str, Any]) -> int:
    """A newer schema version, or ours: what isn't a version at all is for validation to refuse."""
    schema = argument.get("schema_version")
    return schema if type(schema) is int and SCHEMA_VERSION < schema < _MAX_SCHEMA else SCHEMA_VERSION


def build_prompt(
    request: IngestRequest, prompt_id: str, engine: Engine, over_length: Literal["refuse", "clamp"]
) -> Prompt:
    """The prompt of a request, sure to fit the model's context.

    Raises:
        PromptEmpty: it has no tokens.
        PromptTooLong: it doesn't fit, with the output that was asked for.
        PromptRefused: a chat prompt for a model without a chat template.
    """
    _refuse_far_too_long(request, engine)
    token_ids = encode(request, engine)
    sampling = fit(request.sampling, len(token_ids), engine.card.max_model_len, over_length)
    return Prompt(prompt_id=prompt_id, token_ids=token_ids, sampling=sampling)


# How many times its context a text must exceed before it is refused uncounted: normalization shrinks some texts.
_FAR = 4


def _refuse_far_too_long(request: IngestRequest, engine: Engine) -> None:
    """Spares the tokenizer, and the documents behind this one, the work of counting what can't fit."""
    card = engine.card
    at_least = len(request.text.strip().encode()) // card.max_token_bytes
    if at_least > _FAR * card.max_model_len:
        raise PromptTooLong(
            f"prompt is some {at_least} tokens or more, max_model_len is {card.max_model_len}; split the document"
        )


def encode(request: IngestRequest, engine: Engine) -> list[int]:
    """Token ids of a request's prompt; its text is the last part of it that is the document's own.

    Raises:
        PromptRefused: a chat prompt for a model without a chat template.
    """
    if request.chat:
        user = "\n\n".join(part for part in (request.instruction, request.text) if part)
        return engine.encode_chat(request.system, user)
    return engine.encode("\n\n".join(part for part in (request.system, request.instruction, request.text) if part))


def fit(
    sampling: Sampling, num_prompt_tokens: int, max_model_len: int, over_length: Literal["refuse", "clamp"]
) -> Sampling:
    """Sampling whose output fits behind the prompt; unchanged where it fits already. Never truncates silently.

    Raises:
        PromptEmpty, PromptTooLong: with the lengths and the bound.
    """
    room = max_model_len - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise PromptEmpty("the prompt has no tokens; send a text that isn't empty")
    if room < 1:
        raise PromptTooLong(
            f"prompt is {num_prompt_tokens} tokens, max_model_len is {max_model_len}, and at least one output token "
            f"must fit; split the document or raise INGEST_ENGINE_MAX_MODEL_LEN"
        )
    if sampling.max_tokens <= room:
        return sampling
    if over_length == "refuse":
        raise PromptTooLong(
            f"prompt is {num_prompt_tokens} tokens and max_tokens {sampling.max_tokens}, together "
            f"{num_prompt_tokens + sampling.max_tokens}, max_model_len is {max_model_len}; split the document, "
            f"lower max_tokens, or set INGEST_OVER_LENGTH=clamp to shorten the output to what fits"
        )
    min_tokens = None if sampling.min_tokens is None else min(sampling.min_tokens, room)
    return sampling.model_copy(update={"max_tokens": room, "min_tokens": min_tokens})
