"""The worker's side: `rq worker -w ingestq.workers.BatchWorker ingest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch_worker import BatchWorker as BatchWorker

__all__ = ["BatchWorker"]


def __getattr__(name: str) -> Any:
    # `ingestq.workers.engines` is of use without RQ's worker, which takes half a second to import.
    if name == "BatchWorker":
        from .batch_worker import BatchWorker

        return BatchWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
