"""Groups and what their readers fetch."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .. import keys
from ..fields import whole
from ..settings import key_prefix
from ._call import CHUNK, now_iso, run, script, unpack_exception

if TYPE_CHECKING:
    from redis import Redis


def touch_group(connection: Redis, group_id: str, *, queue: str, group_ttl: int, seal: bool | None = None) -> None:
    """Says that the producer of a group is alive; `seal` that it is done (True) or has more to come (False)."""
    run(
        connection,
        "touch_group",
        [keys.group(group_id), keys.group_members(group_id), keys.group_done(group_id)],
        [queue, group_ttl, "" if seal is None else int(seal)],
    )


def cancel(connection: Redis, group_id: str, *, first: int, ttl: int) -> tuple[int, int, int, int]:
    """Cancels CHUNK members of a group, from rank `first`; a cancelled job is kept `ttl` seconds.

    Returns:
        How many members it looked at, cancelled, left to another holder, and found terminal.
    """
    counts = run(
        connection,
        "cancel",
        [keys.group_members(group_id), keys.group_done(group_id)],
        [key_prefix(), group_id, first, first + CHUNK - 1, now_iso(), ttl],
    )
    return counts[0], counts[1], counts[2], counts[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedJob:
    """Where a job stands, with its newest result."""

    job_id: str
    # RQ's status; "" for a job that isn't in Redis.
    status: str
    # The group still holds it.
    in_group: bool
    description: str
    # RQ's Result.Type: 1 successful, 2 failed; None without a result.
    result_type: int | None
    return_value: bytes | None
    exception: str | None
    worker: str | None
    attempts: int
    # Payload of a job that ended without a return value.
    data: bytes


def fetch(connection: Redis, job_ids: Sequence[str], *, group_id: str = "") -> list[FetchedJob]:
    """Where jobs stand, with the newest result of each, in the order given. One round trip."""
    source, _ = script("fetch")
    with connection.pipeline(transaction=False) as pipeline:
        for start in range(0, len(job_ids), CHUNK):  # EVAL: as in `_start`; _RO: a reader need not be allowed more
            pipeline.eval_ro(source, 0, key_prefix(), group_id, *job_ids[start : start + CHUNK])
        flat = [value for reply in pipeline.execute() for value in reply]
    return [_fetched(job_id, flat[9 * i : 9 * i + 9]) for i, job_id in enumerate(job_ids)]


def _fetched(job_id: str, fields: Sequence[bytes]) -> FetchedJob:
    status, in_group, description, result_type, value, exception, worker, attempts, data = fields
    return FetchedJob(
        job_id=job_id,
        status=status.decode(errors="replace"),
        in_group=in_group == b"1",
        description=description.decode(errors="replace"),
        result_type=whole(result_type),
        return_value=_unpacked(value) if value else None,
        exception=unpack_exception(exception) if exception else None,
        worker=worker.decode(errors="replace") or None,
        attempts=max(0, min(whole(attempts) or 0, 2**63 - 1)),
        data=data,
    )


def _unpacked(value: bytes) -> bytes:
    """A stored return value; empty, which is no row, where it can't be read."""
    try:
        return b64decode(value)
    except ValueError:
        return b""


def tally(connection: Redis, group_id: str, *, first: int, last: int) -> dict[str, int]:
    """Members of a group from rank `first` to `last`, counted by RQ status ("" for a job that is gone)."""
    source, _ = script("tally")
    members = keys.group_members(group_id)
    # Redis 7.0 lets EVAL and EVALSHA have only keys that its user may write.
    flat = cast(list[Any], connection.eval_ro(source, 1, members, key_prefix(), group_id, str(first), str(last)))
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}
