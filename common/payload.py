"""A job's payload: RQ's `[function, instance, args, kwargs]` as JSON, with one request as its one argument."""

from __future__ import annotations

import zlib
from typing import Any

import orjson
from pydantic import ValidationError

from .errors import InvalidJob
from .schema import IngestRequest

# The name under which a job asks for this handler. It is a word on the worker's allow-list, never imported.
FUNCTION_NAME = "ingestq.ingest"

# What replaces the payload of a finished job: RQ can still read it, and it takes 30 bytes.
FINISHED_STUB = b'["ingestq.ingest",null,[],{}]'

# A payload is inflated to this many bytes at most: a zlib bomb holds 512 MiB in 509 KiB.
MAX_PAYLOAD_BYTES = 32 * 1024 * 1024

# The first byte of what RQ compressed; JSON can't start with it.
_ZLIB_MAGIC = b"\x78"

_HEAD, _TAIL = b'["%s",null,[' % FUNCTION_NAME.encode(), b"],{}]"


def encode(request_json: bytes) -> bytes:
    """The payload of a request: readable by RQ with any JSON serializer, and not compressed (RQ reads both)."""
    return _HEAD + request_json + _TAIL


def argument(data: bytes) -> dict[str, Any]:
    """The one argument of the one function that a payload may call, not validated further.

    Raises:
        InvalidJob: it is not JSON, inflates beyond MAX_PAYLOAD_BYTES, or calls anything else in any other way.
    """
    try:
        call = orjson.loads(_inflated(data))
    except (ValueError, zlib.error):
        raise InvalidJob("the payload is not JSON; enqueue with serializer=JSONSerializer") from None
    if not (isinstance(call, list) and len(call) == 4):
        raise InvalidJob("the payload is not RQ's [function, instance, args, kwargs]")
    function, instance, args, kwargs = call
    if function != FUNCTION_NAME or instance is not None:
        named = ascii(function[:100]) if isinstance(function, str) else "of that kind"
        raise InvalidJob(f"function {named} is not served here; this worker runs {FUNCTION_NAME!r} only")
    if not (isinstance(args, list) and len(args) == 1 and isinstance(args[0], dict) and not kwargs):
        raise InvalidJob(f"{FUNCTION_NAME!r} takes one argument, the request as a JSON object")
    return args[0]


def request(data: bytes) -> IngestRequest | None:
    """The request in a payload; None if there is no valid one."""
    try:
        return IngestRequest.model_validate(argument(data))
    except (InvalidJob, ValidationError):
        return None


def _inflated(data: bytes) -> bytes:
    if not data.startswith(_ZLIB_MAGIC):
        return data
    inflater = zlib.decompressobj()
    plain = inflater.decompress(data, MAX_PAYLOAD_BYTES)
    if inflater.unconsumed_tail:
        raise InvalidJob(f"the payload inflates to more than {MAX_PAYLOAD_BYTES} bytes")
    return plain
