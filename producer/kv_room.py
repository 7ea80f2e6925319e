"""Whether a document finds room for its KV tokens: what it may need, against what is reserved under which limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..common.sizes import whole_blocks
from .fleet import Held
from .waiting import Snapshot


def need_of(snapshot: Snapshot) -> int:
    """KV tokens to reserve, whole blocks, if its output gets as long as it may; a task's own outputs may be shorter."""
    return whole_blocks(snapshot.job.tokens + snapshot.job.max_tokens, _block(snapshot))


def _block(snapshot: Snapshot) -> int:
    return max((card.block_size or 1 for card in snapshot.candidates.values()), default=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """A limit on KV tokens, and what is reserved against it."""

    # Worker; "": the whole fleet.
    worker: str
    limit: str
    value: int
    reserved: int

    @property
    def where(self) -> str:
        return self.worker or "the fleet"


def _bounds(snapshot: Snapshot) -> Iterator[_Bound]:
    """Those that a document has to fit into: the fleet's, and one of each candidate."""
    fleet = snapshot.fleet
    if (value := fleet.limits.max_kv_tokens_fleet) is not None:
        yield _Bound(worker="", limit="max_kv_tokens_fleet", value=value, reserved=fleet.held.kv_tokens)
    for name in snapshot.candidates:
        load, reserved = fleet.loads.get(name), fleet.workers.get(name, Held()).kv_tokens
        own = load.max_kv_tokens if load and load.max_kv_tokens else None
        values = [value for value in (fleet.limits.max_kv_tokens, own) if value is not None]
        if values:
            yield _Bound(worker=name, limit="max_kv_tokens", value=min(values), reserved=reserved)


def shortages(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Worker, or "" for the whole fleet, and why a document has no room there."""
    need, block = need_of(snapshot), _block(snapshot)
    for bound in _bounds(snapshot):
        # Of one that may be too large for a whole limit, a worker is to count the tokens: it is leased into any room.
        if bound.reserved + (need if need <= bound.value else block) > bound.value:
            yield (
                bound.worker,
                f"{bound.where}: {bound.reserved:,} of {bound.value:,} KV tokens are reserved ({bound.limit})",
            )


def too_large(snapshot: Snapshot) -> Iterator[str]:
    need = need_of(snapshot)
    for bound in _bounds(snapshot):
        if need > bound.value > 0:
            yield (
                f"{bound.where}: {bound.limit} is {bound.value:,}, and it may need {need:,} by itself: "
                f"the worker that counts its tokens fails it if it does"
            )
