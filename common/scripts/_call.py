"""How a script is called, and what its arguments and answers are made of."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from .. import keys

if TYPE_CHECKING:
    from redis import Redis

# Jobs in one script call.
CHUNK = 128

# Payload bytes in one script call: one MULTI of 64 MB stalled another client for 69 ms (measured).
MAX_CALL_BYTES = 4 * 1024 * 1024


@cache
def script(name: str) -> tuple[str, str]:
    """Source and SHA-1 of a script: its shebang line, the prelude, its body."""
    folder = files(keys.__package__) / "lua"
    shebang, body = (folder / f"{name}.lua").read_text().split("\n", 1)
    source = f"{shebang}\n{(folder / 'prelude.lua').read_text()}\n{body}"
    return source, sha1(source.encode(), usedforsecurity=False).hexdigest()


def run(connection: Redis, name: str, keys_: Sequence[str], args: Sequence[Any]) -> Any:
    """Calls a script; the server is sent its source if it doesn't have it."""
    from redis.exceptions import NoScriptError

    source, digest = script(name)
    try:
        return connection.evalsha(digest, len(keys_), *keys_, *args)
    except NoScriptError:
        return connection.eval(source, len(keys_), *keys_, *args)


def start(connection: Redis, name: str, keys_: Sequence[str], args: Sequence[Any]) -> Callable[[], Any]:
    """Sends a script call; the function returned waits for its answer. Nothing is tried again."""
    source, _ = script(name)  # EVAL: a script that isn't loaded would be seen too late
    pool = connection.connection_pool
    link = pool.get_connection()

    def answer() -> Any:
        try:
            return link.read_response()
        finally:
            pool.release(link)

    try:
        link.send_command("EVAL", source, len(keys_), *keys_, *args)  # type: ignore[no-untyped-call]
    except BaseException:
        pool.release(link)
        raise
    return answer


def now_iso() -> str:
    """This host's time in RQ's format. For display only: leases are judged by Redis' clock."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def pack_exception(text: str) -> str:
    """An exception's text as RQ stores it in a result."""
    return b64encode(zlib.compress(text.encode())).decode()


# A stored exception is inflated to this many bytes at most: 512 MiB of zeros fit in 509 KiB of zlib.
_MAX_EXCEPTION_BYTES = 64 * 1024


def unpack_exception(packed: bytes) -> str:
    """An exception's text from an RQ result, cut at 64 KiB; says so where it can't be read."""
    try:
        return zlib.decompressobj().decompress(b64decode(packed), _MAX_EXCEPTION_BYTES).decode(errors="replace")
    except (ValueError, zlib.error):
        return "the stored exception can't be read"
