"""The producer's side: documents in (`IngestQueue`), rows out (`fetch_results`, `iter_results`). Imports no engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..common.errors import (
        IngestqError,
        NotDurable,
        ProducerLost,
        QueueRefused,
        QueueUnavailable,
        RequestRefused,
        ResultTimeout,
        SettingsError,
        UnknownGroup,
    )
    from ..common.schema import IngestRequest, IngestResult, Sampling, Status
    from ..common.settings import Settings
    from .failed import FailedDocument, FailedFilter, fetch_failed, list_failed, retry_failed
    from .group import Group
    from .queue import IngestQueue
    from .results import fetch_results, iter_results

__all__ = [
    "FailedDocument",
    "FailedFilter",
    "Group",
    "IngestQueue",
    "IngestRequest",
    "IngestResult",
    "IngestqError",
    "NotDurable",
    "ProducerLost",
    "QueueRefused",
    "QueueUnavailable",
    "RequestRefused",
    "ResultTimeout",
    "Sampling",
    "Settings",
    "SettingsError",
    "Status",
    "UnknownGroup",
    "fetch_failed",
    "fetch_results",
    "iter_results",
    "list_failed",
    "retry_failed",
]

_MODULES = {
    "..common.errors": (
        "IngestqError",
        "NotDurable",
        "ProducerLost",
        "QueueRefused",
        "QueueUnavailable",
        "RequestRefused",
        "ResultTimeout",
        "SettingsError",
        "UnknownGroup",
    ),
    "..common.schema": ("IngestRequest", "IngestResult", "Sampling", "Status"),
    "..common.settings": ("Settings",),
    ".failed": ("FailedDocument", "FailedFilter", "fetch_failed", "list_failed", "retry_failed"),
    ".group": ("Group",),
    ".queue": ("IngestQueue",),
    ".results": ("fetch_results", "iter_results"),
}


def __getattr__(name: str) -> Any:
    # pydantic and redis take half a second to import: only those who use them pay.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
