"""What the first documents in the queue begin with: the prefixes that the engine should know before it takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple, cast

from redis import Redis

from ...common import keys, payload
from ...common.schema import IngestRequest
from ..engines.base import Engine
from ..prompts import encode

# Documents at the head of the queue that are looked at, and how many of them in one round trip.
_HEAD, _CHUNK = 128, 16

# Bytes of one payload that is read at all, and of all of them: a look, not a load.
_MAX_PAYLOAD, _MAX_PAYLOADS = 256 * 1024, 4 * 1024 * 1024


class Task(NamedTuple):
    """What documents of one task have in common, whatever their text."""

    system: str | None
    instruction: str | None
    chat: bool


def queued_tasks(connection: Redis, queue: str, model: str) -> list[Task]:
    """The tasks of the first queued documents of a model, the most frequent first. Reads only.

    Documents that were there when a worker was lost are left out: their prefix may have been what it died of.

    Raises:
        RedisError: Redis is away, or the queue's key holds something else.
    """
    tasks: Counter[Task] = Counter()
    for raw in _payloads(connection, queue, model):
        if (task := _task(raw, model)) is not None:
            tasks[task] += 1
    return [task for task, _ in tasks.most_common()]


def _payloads(connection: Redis, queue: str, model: str) -> Iterator[bytes]:
    job_ids = cast(list[bytes], connection.lrange(keys.queue(queue), 0, _HEAD - 1))
    bytes_left = _MAX_PAYLOADS
    with connection.pipeline(transaction=False) as pipeline:
        for start in range(0, len(job_ids), _CHUNK):
            names = [keys.job(job_id.decode(errors="replace")) for job_id in job_ids[start : start + _CHUNK]]
            for name in names:
                pipeline.hmget(name, "status", "model", "crashes")
                pipeline.hstrlen(name, "data")
            seen = pipeline.execute(raise_on_error=False)
            for name, fields, size in zip(names, seen[::2], seen[1::2], strict=True):
                if _is_worth_a_look(fields, size, model) and size <= bytes_left:
                    bytes_left -= size
                    pipeline.hget(name, "data")
            yield from (data for data in pipeline.execute(raise_on_error=False) if isinstance(data, bytes))


def _is_worth_a_look(fields: Any, size: Any, model: str) -> bool:
    """Whether a job, of which these are status, model and crashes, may tell a prefix."""
    if not isinstance(fields, list) or not isinstance(size, int):
        return False  # an error: something else is under its key
    status, job_model, crashes = fields
    return (
        status == b"queued" and job_model in (None, model.encode()) and crashes in (None, b"0") and size <= _MAX_PAYLOAD
    )


def _task(data: bytes, model: str) -> Task | None:
    """The task of a job's payload; None if it has none, or is none of ours to run."""
    request = payload.request(data)
    if request is None or request.model != model or not (request.chat or request.system or request.instruction):
        return None
    return Task(request.system, request.instruction, request.chat)


def shared_prefix(engine: Engine, task: Task, model: str) -> list[int]:
    """The token ids that every prompt of a task begins with.

    Found by encoding two texts that have nothing in common: what their prompts share comes before the text. The last
    token or two may still differ where a text's first letters join what is before them; only whole blocks of the KV
    cache are shared anyway.

    Raises:
        PromptRefused: the model has no chat template, or none with a system prompt.
    """
    fields = {"document_id": "-", "model": model, **task._asdict()}
    first, second = (encode(IngestRequest(text=text, **fields), engine) for text in ("a", "7"))
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
