"""How long the outputs of finished documents were, shared by the workers of a queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import keys
from ._call import run

if TYPE_CHECKING:
    from redis import Redis

# Seconds that they are kept after the last document.
_TTL = 30 * 86400


def learn(connection: Redis, queue: str, observed: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Adds to what is known of output lengths; returns all of it.

    Args:
        observed: task -> bucket of lengths -> documents. A bucket has at most three digits. Of a task
            with more than 2,048 all counts are halved, once a call, so that what it is like now outweighs what it was
            like.
    """
    args: list[Any] = [_TTL]
    for task, buckets in observed.items():
        for bucket, count in buckets.items():
            args += (task, bucket, count)
    flat = run(connection, "learn", [keys.lengths(queue)], args)
    known: dict[str, dict[int, int]] = {}
    for i in range(0, len(flat), 3):
        known.setdefault(flat[i].decode(), {})[int(flat[i + 1])] = flat[i + 2]
    return known
