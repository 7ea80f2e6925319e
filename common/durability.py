"""`Barrier`: what Redis has accepted outlives it, as far as INGEST_DURABILITY asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from . import scripts
from .connections import persist
from .errors import NotDurable

if TYPE_CHECKING:
    from redis import Redis

Durability = Literal["memory", "aof", "replica"]

# Seconds that the server may take to get a write to its disk or to a replica. With appendfsync everysec it takes one,
# unless its disk is slow; less than half of the time-out of a socket (20 s).
_WAIT = 9.0

_OR_LESS = "or INGEST_DURABILITY=memory"


class Barrier:
    """Waits until everything that the server accepted is on its disk (`aof`) or on a replica (`replica`).

    The append-only file and the replication stream are sequential, so one small write of our own, followed by WAITAOF
    or WAIT, stands for all that was accepted before it, on any connection. (Without a write of the connection's own
    both return at once.) A server that was restarted or replaced meanwhile may have lost some of it and would confirm
    what it has left: its identity is compared, too.
    """

    def __init__(self, connection: Redis, durability: Durability) -> None:
        socket_timeout = connection.connection_pool.connection_kwargs.get("socket_timeout")
        self.durability = durability
        self._connection = connection
        self._wait = min(_WAIT, socket_timeout / 2) if socket_timeout else _WAIT
        self._server: tuple[Any, ...] = ()

    def start(self, patience: float) -> None:
        """To be called before anything is written: remembers the server, and that it can do what is asked.

        Raises:
            NotDurable: it can't.
            QueueUnavailable: Redis can't be reached for `patience` seconds, or refuses.
        """
        if self.durability == "memory":
            return
        _, info = persist(lambda: self._ask(write=False), patience=patience)
        self._server = _identity(info)
        # The disk may be busy with the writes of others, and a replica late: then `confirm` waits for it.
        if self.durability == "replica" and info["role"] == "master" and not _has_replica(info):
            raise self._not_durable(f"no replica is online; bring one back, {_OR_LESS}")

    def confirm(self, patience: float) -> None:
        """Returns when all that the server accepted since `start` is safe; at once if the durability is `memory`.

        Raises:
            NotDurable: not in time, or the server was restarted or replaced meanwhile.
            QueueUnavailable: Redis can't be reached for `patience` seconds, or refuses.
        """
        if self.durability == "memory":
            return
        num_safe, info = persist(lambda: self._ask(write=True), patience=patience)
        if _identity(info) != self._server:
            raise self._not_durable("Redis restarted or failed over meanwhile and may have lost documents")
        if num_safe < 1:
            where = "on Redis' disk" if self.durability == "aof" else "on a replica"
            look_at = "its disk and appendfsync" if self.durability == "aof" else "the replicas and their links"
            raise self._not_durable(
                f"after {self._wait:g} s the documents were not {where}; look at {look_at}, {_OR_LESS}"
            )

    def _ask(self, *, write: bool) -> tuple[int, dict[str, Any]]:
        """On how many disks or replicas all is, and what INFO says. One round trip on one connection."""
        from redis.exceptions import ResponseError

        timeout_ms = int(self._wait * 1000) if write else 1
        wait = ("WAITAOF", 1, 0, timeout_ms) if self.durability == "aof" else ("WAIT", 1, timeout_ms)
        try:
            with self._connection.pipeline(transaction=False) as pipeline:  # in a MULTI nothing waits
                if write:
                    scripts.write_barrier(pipeline)
                pipeline.execute_command(*wait)  # type: ignore[no-untyped-call]
                pipeline.info("server", "replication")
                *_, reply, info = pipeline.execute()
        except ResponseError as error:
            if "unknown command" in str(error):
                raise self._not_durable(
                    f"this server has no WAITAOF; use Redis 7.2 or later, or Valkey, {_OR_LESS}"
                ) from error
            if "appendonly is disabled" in str(error):
                raise self._not_durable(
                    f"the server's append-only file is off; set appendonly yes there, {_OR_LESS}"
                ) from error
            raise
        return int(reply[0] if self.durability == "aof" else reply), info

    def _not_durable(self, problem: str) -> NotDurable:
        return NotDurable(f"INGEST_DURABILITY={self.durability}: {problem}")


def _identity(info: dict[str, Any]) -> tuple[Any, ...]:
    # The second changes when a replica is promoted, the first when a server starts.
    return info["run_id"], info["master_replid"]


def _has_replica(info: dict[str, Any]) -> bool:
    return any(info[f"slave{i}"]["state"] == "online" for i in range(info["connected_slaves"]) if f"slave{i}" in info)
