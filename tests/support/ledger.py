"""`Ledger`: what was accepted, what was delivered, what is missing or too much."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ingestq.common.schema import IngestResult, Status

from .faulty import DOCUMENT_ERRS, POISONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A row as a reader got it."""

    row: IngestResult
    # How often the server had lost its last moments by then.
    epoch: int


@dataclass(slots=True)
class Ledger:
    """The books of all groups. Thread-safe."""

    # Job id -> the document's text, of every document that a producer wanted in.
    texts: dict[str, str] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    delivered: dict[str, Delivery] = field(default_factory=dict)
    # Job ids with a second row.
    doubled: list[str] = field(default_factory=list)
    # Of those, rows that came again only because the server had lost what it knew of the first.
    num_again_after_loss: int = 0
    num_refused_calls: int = 0
    # Times that the server was put back to where it had been.
    epoch: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, job_ids: Sequence[str]) -> None:
        with self.lock:
            self.accepted.update(job_ids)

    def deliver(self, row: IngestResult) -> None:
        with self.lock:
            earlier = self.delivered.get(row.job_id)
            if earlier is None:
                self.delivered[row.job_id] = Delivery(row=row, epoch=self.epoch)
            elif earlier.epoch < self.epoch:
                self.num_again_after_loss += 1
            else:
                self.doubled.append(row.job_id)

    @property
    def num_outstanding(self) -> int:
        with self.lock:
            return len(self.accepted) - len(self.accepted & self.delivered.keys())

    def lost(self) -> list[str]:
        return sorted(self.accepted - self.delivered.keys())

    def dead_letters(self) -> list[tuple[str, IngestResult]]:
        """Texts and rows of documents that did not succeed."""
        rows = [delivery.row for delivery in self.delivered.values()]
        return [(self.texts[row.job_id], row) for row in rows if row.status != Status.SUCCEEDED]

    def unjustified(self) -> list[str]:
        """Documents that failed though neither they nor a third lost worker were the reason, in words."""
        return [
            f"{row.document_id}: {row.status.value}, {row.error_class}: {row.error_message}"
            for text, row in self.dead_letters()
            if not (DOCUMENT_ERRS in text or _poison_in(text) or row.error_class == "WorkerLost")
        ]

    def exhausted(self) -> list[IngestResult]:
        """Innocent documents that lost as many workers as a document may."""
        return [row for text, row in self.dead_letters() if row.error_class == "WorkerLost" and not _poison_in(text)]

    def poisoned(self) -> dict[str, bool]:
        """Document id of each poison -> whether it was dead-lettered for what it did, and no other for the same."""
        blamed = Counter(
            word for row in self.exhausted() for word in POISONS.values() if word in (row.error_message or "")
        )
        verdicts = {}
        for text, row in self.dead_letters():
            if (poison := _poison_in(text)) is not None:
                said = POISONS[poison]
                verdicts[row.document_id] = said in (row.error_message or "") and not blamed[said]
        for delivery in self.delivered.values():
            if delivery.row.status == Status.SUCCEEDED and _poison_in(self.texts[delivery.row.job_id]):
                verdicts[delivery.row.document_id] = False
        return verdicts


def _poison_in(text: str) -> str | None:
    return next((poison for poison in POISONS if poison in text), None)
