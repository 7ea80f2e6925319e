"""What goes into a job and what comes out of it: `IngestRequest` and `IngestResult`, versioned.

Both are frozen pydantic models that refuse unknown fields. A job is named by the digest of its request
(`job_id`), so the same document with the same prompt, sampling and model is the same job wherever it is submitted.
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Of IngestRequest. A worker leaves jobs of a newer one to newer workers.
SCHEMA_VERSION = 1

# 128 bits: 2**64 documents before a collision is likely. RQ allows [A-Za-z0-9_-] in a job id.
_JOB_ID_LENGTH = 32

# A document id goes into log lines, error messages and RQ's job description: one line, bounded.
DocumentId = Annotated[
    str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")
]
ModelName = Annotated[
    str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")
]
# What JSON libraries agree on; orjson refuses to write more.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        """The record as UTF-8 JSON, fields in schema order, without those that are None.

        Raises:
            UnicodeError: a text has surrogates that are no characters.
        """
        # A quarter of the time of pydantic's own model_dump_json on 64 KB.
        try:
            return orjson.dumps(self.model_dump(exclude_none=True))
        except orjson.JSONEncodeError as error:
            raise UnicodeError(str(error)) from None


class Sampling(_Record):
    """How to sample; names and meaning are those of `vllm.SamplingParams`, `None` is its default."""

    # Output tokens at most.
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)
    # 0 is greedy: the default here, because ingestion wants the same rows from the same documents.
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    min_tokens: int | None = Field(default=None, ge=0, le=1_000_000)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    # -1 and 0 are "all tokens".
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=100.0)
    seed: Int64 | None = None
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...] | None = Field(
        default=None, max_length=16
    )
    ignore_eos: bool | None = None


class IngestRequest(_Record):
    """One document to run through one model: the single argument of a job."""

    schema_version: Literal[1] = 1
    # The caller's own name of the document; comes back in the result. Part of what determines the job.
    document_id: DocumentId
    # The document. The queue bounds it in bytes (INGEST_MAX_TEXT_BYTES), the worker in tokens.
    text: str
    # The model's name as a worker serves it (INGEST_MODEL_NAME); a worker of another never leases the job.
    model: ModelName
    # System prompt; with chat=False it comes first.
    system: str | None = Field(default=None, max_length=65536)
    # What to do with the text; goes before it, so that documents of one task share a prefix.
    instruction: str | None = Field(default=None, max_length=65536)
    # Wrap in the model's chat template. False: the parts are joined by blank lines as they are.
    chat: bool = True
    sampling: Sampling = Sampling()


def job_id(request_json: bytes) -> str:
    """The job id of a request: 32 hexadecimal characters, SHA-256 of its `to_json` cut to 128 bits.

    Processors have instructions for it: a third of blake2b's time on 64 KB (x86 with SHA-NI).
    """
    return sha256(request_json).hexdigest()[:_JOB_ID_LENGTH]


class Status(StrEnum):
    """How a document ended."""

    # The engine finished it; `text` is its output (finish_reason "length": cut at max_tokens).
    SUCCEEDED = "succeeded"
    # No attempts left, or it can't be run: see error_class and error_message.
    FAILED = "failed"
    # Cancelled before it was done.
    CANCELLED = "cancelled"
    # Stopped by RQ's stop-job command.
    STOPPED = "stopped"
    # It ended, but its row is no longer in Redis (result_ttl), or the job was deleted.
    EXPIRED = "expired"


class Usage(_Record):
    """Tokens of one document."""

    prompt_tokens: Int64 = 0
    # Prompt tokens taken from the prefix cache.
    cached_tokens: Int64 = 0
    output_tokens: Int64 = 0


class IngestResult(_Record):
    """The one terminal row of a document."""

    schema_version: Literal[1] = 1
    document_id: str
    job_id: str
    status: Status
    text: str | None = None
    # vLLM's: "stop" or "length".
    finish_reason: str | None = None
    usage: Usage = Usage()
    # Milliseconds from enqueue to lease, by Redis' clock.
    queue_ms: float | None = None
    # Milliseconds from the engine's add_request to the first output token.
    ttft_ms: float | None = None
    # Milliseconds from the engine's add_request to the last output token.
    run_ms: float | None = None
    # How often a worker leased it, hand-backs not counted.
    attempts: Int64 = 0
    worker: str | None = None
    model: str | None = None
    # Digest of the engine's settings and version: rows with the same one are comparable.
    engine_digest: str | None = None
    error_class: str | None = None
    error_message: str | None = None
