"""KV tokens reserved by leases: the exact need instead of the estimate, and the check that the totals are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from .. import keys
from ..settings import key_prefix
from ._call import run
from .leasing import Admission

if TYPE_CHECKING:
    from redis import Redis

# lost: the lease isn't held any more.
Reservation = Literal["granted", "denied", "lost"]


class Need(NamedTuple):
    """What a leased job needs, counted."""

    # The lease, "id:execution".
    member: str
    # Of the prompt, and of the output at most.
    prompt_tokens: int
    max_tokens: int
    # To reserve: prompt and expected output, in whole blocks.
    kv_tokens: int


def reserve(
    connection: Redis, queue: str, *, worker: str, admission: Admission, needs: Sequence[Need]
) -> list[Reservation]:
    """Reserves what jobs need instead of what was estimated; one answer each.

    A job that is denied keeps what it had until it is handed back. Either way its prompt's tokens are written down, so
    that the next lease knows them.
    """
    args: list[Any] = [key_prefix(), queue, worker, admission.max_kv_tokens, admission.max_kv_tokens_fleet]
    for need in needs:
        args += need
    words = run(connection, "reserve", [keys.started(queue), keys.limits(queue), keys.kv_tokens()], args)
    return [cast(Reservation, word.decode()) for word in words]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recount:
    """What `recount` found of a queue."""

    # What its leases reserve, counted now.
    kv_tokens_counted: int
    # What the total said before.
    kv_tokens_held: int
    num_leases: int


def recount(connection: Redis, queue: str) -> Recount:
    """Counts reservations anew from the leases, and corrects the totals of the queue and of every worker.

    Stock tools end leases without knowing of reservations; so does a worker of the release before.
    """
    counted, held, leases = run(connection, "recount", [keys.started(queue), keys.kv_tokens()], [key_prefix(), queue])
    return Recount(kv_tokens_counted=counted, kv_tokens_held=held, num_leases=leases)
