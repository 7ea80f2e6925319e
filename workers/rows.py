"""`RowWriter`: what the engine said of a document -> the row that finish.lua writes. No Redis, no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.engine_card import EngineCard
from ..common.errors import DocumentError, DocumentTimeout, EngineError
from ..common.schema import IngestRequest, IngestResult, Status, Usage
from ..common.scripts import Finish, LeasedJob
from .engines.base import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWriter:
    """What all rows of one worker have in common."""

    worker: str
    card: EngineCard
    # Seconds that rows are kept whose job names no time itself.
    result_ttl: int
    failure_ttl: int

    def ended(self, job: LeasedJob, request: IngestRequest | None, outcome: Completion | DocumentError) -> Finish:
        """The end of a document that the engine finished or failed, or that can't be run.

        Args:
            request: None if the job has no valid one.
        """
        if isinstance(outcome, DocumentError):
            kind: Literal["F", "P"] = "F" if isinstance(outcome, DocumentTimeout) else "P"
            return self._failed(job, request, kind, type(outcome).__name__, str(outcome))
        if outcome.finish_reason == "error":
            return self._failed(job, request, "F", EngineError.__name__, outcome.error or "the engine gave no reason")
        result = self._row(
            job,
            request,
            Status.SUCCEEDED,
            text=outcome.text,
            finish_reason=outcome.finish_reason,
            usage=Usage(
                prompt_tokens=outcome.num_prompt_tokens,
                cached_tokens=outcome.num_cached_tokens,
                output_tokens=len(outcome.token_ids),
            ),
            ttft_ms=round(outcome.ttft_ms, 3),
            run_ms=round(outcome.run_ms, 3),
        )
        ttl = self.result_ttl if job.result_ttl is None else job.result_ttl
        try:
            return Finish(job=job, kind="S", ttl=ttl, result_json=result.to_json())
        except UnicodeError as error:
            return self._failed(job, request, "P", "ResultNotSerializable", f"the output is not Unicode text: {error}")

    def stopped(self, job: LeasedJob, request: IngestRequest | None) -> Finish:
        """The end of a document that was stopped on request."""
        message = "stopped by RQ's stop-job or stop-execution command"
        result = self._row(job, request, Status.STOPPED, error_class="Stopped", error_message=message)
        return self._dead(job, "X", result, message)

    def _failed(
        self, job: LeasedJob, request: IngestRequest | None, kind: Literal["F", "P"], error_class: str, message: str
    ) -> Finish:
        message = message.encode(errors="replace").decode()  # an engine may quote what is not Unicode
        result = self._row(job, request, Status.FAILED, error_class=error_class, error_message=message)
        return self._dead(job, kind, result, f"{error_class}: {message}")

    def _dead(self, job: LeasedJob, kind: Literal["F", "P", "X"], result: IngestResult, exception: str) -> Finish:
        ttl = self.failure_ttl if job.failure_ttl is None else job.failure_ttl
        return Finish(job=job, kind=kind, ttl=ttl, result_json=result.to_json(), exception=exception)

    def _row(self, job: LeasedJob, request: IngestRequest | None, status: Status, **fields: object) -> IngestResult:
        return IngestResult.model_validate(
            {
                "document_id": request.document_id if request else job.job_id,
                "job_id": job.job_id,
                "status": status,
                "queue_ms": None if job.enqueued_ms is None else max(0, job.leased_ms - job.enqueued_ms),
                "attempts": job.attempts,
                "worker": self.worker,
                "model": self.card.model,
                "engine_digest": self.card.engine_digest,
                **fields,
            }
        )
