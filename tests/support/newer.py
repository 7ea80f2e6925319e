"""A worker of a release to come, whose requests are of schema version 2: `rq worker -w support.newer.NewerWorker`."""

from __future__ import annotations

from typing import Literal

from ingestq.common.schema import IngestRequest
from ingestq.common.scripts import leasing
from ingestq.workers import prompts
from ingestq.workers.batch_worker import BatchWorker

SCHEMA_VERSION = 2


class NewerRequest(IngestRequest):
    """With a field that this release doesn't know."""

    schema_version: Literal[1, 2] = 2
    tone: str = ""


class NewerWorker(BatchWorker):
    def bootstrap(self, *args: object, **kwargs: object) -> None:
        leasing.SCHEMA_VERSION = prompts.SCHEMA_VERSION = SCHEMA_VERSION
        prompts.IngestRequest = NewerRequest
        super().bootstrap(*args, **kwargs)
