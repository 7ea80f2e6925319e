"""`Holdings`: the leases of one worker, from the moment they are taken until their results are written."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..common.schema import IngestRequest
from ..common.scripts import LeasedJob


@dataclass(slots=True)
class Held:
    """A lease of this worker. Its execution id names its prompt."""

    job: LeasedJob
    # KV tokens that are reserved for it.
    kv_tokens: int
    # None until the job is parsed, and for good if it isn't a valid request.
    request: IngestRequest | None = None
    # Seconds by time.monotonic().
    since: float = field(default_factory=time.monotonic)


class Holdings:
    """Changed by the courier's thread alone; others may look."""

    def __init__(self) -> None:
        # Prompt id -> lease, until its outcome is known; then, until its result is written.
        self.open: dict[str, Held] = {}
        self.settling: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self.open) + len(self.settling)

    def add(self, job: LeasedJob) -> None:
        self.open[job.execution_id] = Held(job, job.kv_tokens)

    def settle(self, prompt_id: str) -> None:
        """The document's outcome is known."""
        self.settling[prompt_id] = self.open[prompt_id]  # first: at no moment does it look as if nothing were held
        del self.open[prompt_id]

    @property
    def jobs(self) -> list[LeasedJob]:
        return [held.job for held in self._all]

    @property
    def kv_tokens(self) -> int:
        """KV tokens reserved for all of them."""
        return sum(held.kv_tokens for held in self._all)

    @property
    def _all(self) -> list[Held]:
        return [*list(self.open.values()), *list(self.settling.values())]
