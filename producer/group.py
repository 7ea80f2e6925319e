"""`Group`: a handle of the documents that were submitted together."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..common import keys, scripts
from ..common.connections import persist
from ..common.errors import SettingsError
from ..common.schema import Status
from ..common.settings import Settings, is_name

if TYPE_CHECKING:
    from redis import Redis

# Seconds for which a dropped connection is tried again: Redis restarts within them, unless it has much to load.
PATIENCE = 15.0

# Members counted in one script call, which blocks the server for some 2 ms.
_TALLY_CHUNK = 1000

# RQ's words for a job's state, in ours. "" is a job that is no longer in Redis.
_STATES = {
    "queued": "queued",
    "deferred": "queued",
    "started": "running",
    "scheduled": "scheduled",
    "finished": Status.SUCCEEDED.value,
    "failed": Status.FAILED.value,
    "stopped": Status.STOPPED.value,
    "canceled": Status.CANCELLED.value,
    "": Status.EXPIRED.value,
}


def check_name(kind: str, name: str) -> str:
    """The name itself, if it may be one of a queue, a group or a tenant.

    Raises:
        SettingsError: it may not.
    """
    if not is_name(name):
        raise SettingsError(f"{kind} {name!r}: a name has 1 to 128 letters, digits and _ . : -")
    return name


def new_group_id(queue: str) -> str:
    """A group id that says which queue and when, such as "ingest-20261124-073000-4f2a91"."""
    now = datetime.now(UTC)
    return f"{queue[:100]}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelCounts:
    """What became of a group's members when it was cancelled."""

    # Cancelled; a running one is aborted in the engine.
    num_cancelled: int = 0
    # Go on, because another group holds them, or somebody submitted them outside of any.
    num_left: int = 0
    # Had ended before.
    num_terminal: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A handle of a group in Redis, with what the `enqueue_many` call that returned it did.

    Its methods raise QueueUnavailable when Redis can't be reached.
    """

    id: str
    queue: str
    connection: Redis = field(repr=False, compare=False)
    settings: Settings = field(repr=False, compare=False)
    # Documents of that call that are new, or run again after they failed, were cancelled or expired.
    num_enqueued: int = 0
    # Documents that were queued, scheduled or running already, repetitions within the call included. After a dropped
    # connection, up to one chunk of those that the call itself had enqueued counts here.
    num_joined: int = 0
    # Documents that had a row already; the group's readers get it.
    num_finished: int = 0
    # Ids of the first 1000 documents of the two counts above.
    joined: tuple[str, ...] = field(default=(), repr=False)

    @property
    def num_members(self) -> int:
        """Documents in the group, over all calls. One round trip."""
        return persist(lambda: self.connection.zcard(keys.group_members(self.id)), patience=PATIENCE)

    @property
    def is_sealed(self) -> bool:
        """No more documents will come. One round trip."""
        return persist(lambda: self.connection.hexists(keys.group(self.id), "sealed_ms"), patience=PATIENCE)

    def seal(self) -> None:
        """Says that no more documents will come, so that readers end after the last one."""
        self.touch(seal=True)

    def touch(self, *, seal: bool | None = None) -> None:
        """Says that the producer lives: readers give an open group up when it has been silent for a minute.

        Args:
            seal: True: no more documents will come; False: more will; None: leave that as it is.
        """
        persist(
            lambda: scripts.touch_group(
                self.connection, self.id, queue=self.queue, group_ttl=self.settings.group_ttl, seal=seal
            ),
            patience=PATIENCE,
        )

    def counts(self) -> dict[str, int]:
        """How many members are queued, running, scheduled, and how many have ended in each `Status`."""
        counts = dict.fromkeys(_STATES.values(), 0)
        first = 0
        while True:
            part = self._tally(first)
            for status, number in part.items():
                counts[_STATES.get(status, "queued")] += number
            if sum(part.values()) < _TALLY_CHUNK:
                return counts
            first += _TALLY_CHUNK

    def _tally(self, first: int) -> dict[str, int]:
        last = first + _TALLY_CHUNK - 1
        return persist(lambda: scripts.tally(self.connection, self.id, first=first, last=last), patience=PATIENCE)

    def cancel(self) -> CancelCounts:
        """Cancels what the group still has to do; a document that somebody else holds goes on for them.

        That is another group, or whoever submitted it in no group (`IngestQueue.enqueue`). Documents that are enqueued
        into the group meanwhile or later are not cancelled.
        """
        looked_at = cancelled = left = terminal = 0
        while True:
            part = self._cancel(looked_at)
            looked_at, cancelled, left, terminal = (
                looked_at + part[0],
                cancelled + part[1],
                left + part[2],
                terminal + part[3],
            )
            if part[0] < scripts.CHUNK:
                return CancelCounts(num_cancelled=cancelled, num_left=left, num_terminal=terminal)

    def _cancel(self, first: int) -> tuple[int, int, int, int]:
        ttl = self.settings.result_ttl
        return persist(lambda: scripts.cancel(self.connection, self.id, first=first, ttl=ttl), patience=PATIENCE)
