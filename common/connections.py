"""`connect`: the one way to Redis, with time-outs, retries with backoff, and what to do when it refuses."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from .errors import QueueRefused, QueueUnavailable

if TYPE_CHECKING:
    from redis import Redis
    from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds to wait for one answer: longer than the longest blocking read (5 s) plus a server busy with a rewrite.
SOCKET_TIMEOUT = 20.0

# Seconds to wait for a connection.
CONNECT_TIMEOUT = 5.0

# By error code: what a server says that can't serve now, whatever it is asked, and what to do about it.
_OUTAGES = {
    "OOM": "Redis is full: workers go on and make room; enqueue again when there is some, or raise maxmemory",
    "MISCONF": "Redis can't write to its disk: make room there (its log says what failed), then do the same again",
    "READONLY": "this is a replica: set RQ_REDIS_URL or --url to the master, or do the same again after the fail-over",
    "MASTERDOWN": "this is a replica without its master: set RQ_REDIS_URL or --url to the master, or wait for it",
    "NOREPLICAS": "Redis wants replicas before it writes: bring them back, or lower min-replicas-to-write",
    "NOAUTH": "set user and password in RQ_REDIS_URL or --url (redis://user:password@host:6379/0)",
    "WRONGPASS": "set user and password in RQ_REDIS_URL or --url (redis://user:password@host:6379/0)",
    "NOPERM": "the Redis user lacks a permission: give it those of its role in deploy/users.acl",
    "LOADING": "Redis is loading its data: do the same again when it has",
    "BUSY": "a script holds Redis up: wait, or end it with SCRIPT KILL",
    "CLUSTERDOWN": "the cluster lacks nodes: bring them back",
}

# What a script says whose user may not run one of its commands (Valkey, Redis), and one that an operator ended.
_CODE_OF_TEXT = {
    "ACL failure in script": "NOPERM",
    "The user executing the script can't": "NOPERM",
    "Script killed by user": "BUSY",
}


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
        way_out = _OUTAGES.get(_code(error), "is it running? Set RQ_REDIS_URL or --url")
        if url.startswith("rediss:") and _code(error) not in _OUTAGES:
            way_out = "is it running, with TLS, and does it want a client certificate (ssl_certfile, ssl_keyfile)? " + (
                "Set RQ_REDIS_URL or --url"
            )
        raise QueueUnavailable(f"Redis at {shown}: {error}; {way_out}") from None
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


def outage(error: RedisError) -> bool:
    """The server can't serve now: it is away, loading, full, read-only, locked out of its disk, or refuses the user.

    False means that this one call is wrong, or the data that it met: it would fail again.
    """
    from redis.exceptions import ConnectionError, InvalidResponse, TimeoutError

    return isinstance(error, ConnectionError | TimeoutError | InvalidResponse) or _code(error) in _OUTAGES


def explained(error: RedisError) -> str:
    """What the server said, in one line, and what to do about it."""
    text = shorten(str(error).rstrip("."), 250, placeholder="...")
    way_out = _OUTAGES.get(_code(error))
    if way_out is None and outage(error):
        way_out = "is Redis running, and can it be reached from here?"
    return f"{text}; {way_out}" if way_out else text


def _code(error: RedisError) -> str:
    """Redis' word for the error, such as "OOM": redis-py makes classes of some and leaves the others in the text."""
    from redis import exceptions as redis

    # A pipeline puts the command, which is of our making, before it.
    text = str(error).rpartition("of pipeline caused error: ")[2]
    for start, code in _CODE_OF_TEXT.items():
        if text.startswith(start):
            return code
    for kind, code in (
        (redis.OutOfMemoryError, "OOM"),
        (redis.ReadOnlyError, "READONLY"),
        (redis.NoPermissionError, "NOPERM"),
        (redis.AuthorizationError, "NOPERM"),
        (redis.AuthenticationError, "WRONGPASS"),
        (redis.BusyLoadingError, "LOADING"),
        (redis.MasterDownError, "MASTERDOWN"),
        (redis.ClusterDownError, "CLUSTERDOWN"),
    ):
        if isinstance(error, kind):
            return code
    return text.partition(" ")[0]


def persist(operation: Callable[[], T], *, patience: float | None) -> T:
    """What `operation` returns; while the connection drops, it is called again with growing pauses.

    Args:
        operation: talks to Redis and is safe to repeat.
        patience: seconds from now after which it isn't called again; None: never give up.

    Raises:
        QueueUnavailable: the connection stayed away that long.
        QueueRefused: Redis refused (credentials, permissions, memory, disk, read-only).
    """
    from redis.exceptions import RedisError
    from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_before_delay, stop_never
    from tenacity.wait import wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(_passes),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        stop=stop_never if patience is None else stop_before_delay(patience),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    try:
        return retrying(operation)
    except RedisError as error:
        kind = QueueUnavailable if _passes(error) else QueueRefused
        raise kind(f"Redis: {explained(error)}") from error


def _passes(error: BaseException) -> bool:
    """The connection dropped, or the server is busy for a moment: worth trying again."""
    from redis.exceptions import AuthenticationError, AuthorizationError, ConnectionError, RedisError, TimeoutError

    if isinstance(error, AuthenticationError | AuthorizationError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or (
        isinstance(error, RedisError) and _code(error) == "BUSY"
    )


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
        about = client.info("memory", "persistence")  # CONFIG shows passwords: users lack it
        policy = about.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            warnings.append(f"Redis may evict queued documents: maxmemory-policy is {policy!r}; set it to 'noeviction'")
        if not about.get("aof_enabled", 1):
            warnings.append("Redis loses documents when it restarts: appendonly is 'no'; set appendonly yes")
    except RedisError:  # INFO may be denied by ACL or renamed: no news is no warning
        pass
    return warnings
