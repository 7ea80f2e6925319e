"""`connect`: the one way to Redis, with time-outs, retries with backoff, and a look at how safe the server is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from .errors import QueueUnavailable

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds to wait for one answer: longer than the longest blocking read (5 s) plus a server busy with a rewrite.
SOCKET_TIMEOUT = 20.0

# Seconds to wait for a connection.
CONNECT_TIMEOUT = 5.0


def connect(url: str) -> Redis:
    """A client for `url`. Dropped connections are retried three times with backoff by redis-py itself.

    Raises:
        QueueUnavailable: the URL is malformed, or the server doesn't answer or refuses the credentials.
    """
    from redis import ConnectionPool, Redis
    from redis.exceptions import RedisError

    shown = without_password(url)
    try:
        if not _is_regular(url):
            raise ValueError
        pool = ConnectionPool.from_url(url, **_options(network=not url.startswith("unix:")))
    except ValueError:  # its message may quote a part of the password
        raise QueueUnavailable(
            f"Redis at {shown}: not a URL like redis://user:password@host:6379/0, rediss://... or unix:///path?db=0; "
            f"characters like / ? # @ in a password are written as %2F %3F %23 %40. Set RQ_REDIS_URL or --url"
        ) from None
    client = Redis(connection_pool=pool)
    try:
        client.ping()
    except RedisError as error:
        raise QueueUnavailable(f"Redis at {shown}: {error}; set RQ_REDIS_URL or --url") from None
    return client


def sibling(client: Redis) -> Redis:
    """A client of the same server as `client`, with connections and time-outs of its own, that retries nothing.

    For callers that must know of every dropped connection: a lease call whose answer was lost has leased jobs.
    """
    from redis import ConnectionPool, Redis, UnixDomainSocketConnection
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    pool = client.connection_pool
    network = not issubclass(pool.connection_class, UnixDomainSocketConnection)
    options: dict[str, Any] = {**pool.connection_kwargs, **_options(network=network), "retry": Retry(NoBackoff(), 0)}
    for internal in ("maint_notifications_pool_handler", "maint_notifications_config", "event_dispatcher"):
        options.pop(internal, None)
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))


def _options(*, network: bool) -> dict[str, Any]:
    from redis.backoff import ExponentialWithJitterBackoff
    from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
    from redis.retry import Retry

    return {
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        **({"socket_keepalive": True} if network else {}),  # a Unix socket's connection refuses the argument
        "health_check_interval": 30,
        "retry": Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), retries=3),
        "retry_on_error": [ConnectionError, TimeoutError, BusyLoadingError],
    }


def persist(operation: Callable[[], T], *, patience: float | None) -> T:
    """What `operation` returns; while the connection drops, it is called again with growing pauses.

    Args:
        operation: talks to Redis and is safe to repeat.
        patience: seconds from now after which it isn't called again; None: never give up.

    Raises:
        QueueUnavailable: the connection stayed away that long, or Redis refused (credentials, memory, read-only).
    """
    from redis.exceptions import AuthenticationError, AuthorizationError, ConnectionError, RedisError, TimeoutError
    from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_before_delay, stop_never
    from tenacity.wait import wait_random_exponential

    def dropped(error: BaseException) -> bool:
        refused = isinstance(error, AuthenticationError | AuthorizationError)
        return isinstance(error, ConnectionError | TimeoutError) and not refused

    retrying = Retrying(
        retry=retry_if_exception(dropped),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        stop=stop_never if patience is None else stop_before_delay(patience),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    try:
        return retrying(operation)
    except RedisError as error:
        raise QueueUnavailable(f"Redis: {error}") from error


def without_password(url: str) -> str:
    """The URL as it may be shown: scheme, host, port and path; what can't be told from a password becomes "..."."""
    scheme, separator, rest = url.rpartition("://")
    shown = rest.partition("?")[0].rpartition("@")[2]
    if not _is_regular(url) or not _SHOWABLE.fullmatch(shown):
        shown = "..."
    return f"{scheme if _SHOWABLE.fullmatch(scheme) else '...'}{separator}{shown}"


# A host, if any, with its port and path; ":secret" is not among them.
_SHOWABLE = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])?(?:(?<=.):\d{1,5})?(?:/[^@?]*)?")


def _is_regular(url: str) -> bool:
    """Nothing that looks like the rest of a password stands where the path or query should."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    in_path = "@" in parts.path and parts.netloc != ""  # a Unix socket's path may have one
    return not in_path and "@" not in parts.query.partition("=")[0] and parts.fragment == ""


def durability_warnings(client: Redis) -> list[str]:
    """What about the server could lose documents, one sentence each; empty if all is well or it won't tell."""
    from redis.exceptions import RedisError

    warnings = []
    try:
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
        if policy != "noeviction":
            warnings.append(f"Redis may evict queued documents: maxmemory-policy is {policy!r}; set it to 'noeviction'")
        persistence = client.config_get("appendonly", "save")
        if persistence.get("appendonly", "yes") != "yes":
            snapshots = "only snapshots are on" if persistence.get("save") else "nothing is persisted"
            warnings.append(
                f"Redis loses documents when it restarts: appendonly is 'no' ({snapshots}); set appendonly yes"
            )
    except RedisError:  # CONFIG is often denied by ACL or renamed: no news is no warning
        pass
    return warnings
