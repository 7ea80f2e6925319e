"""The engine's step loop: `feed_continuously` tops the engine up while it steps, `feed_waves` runs plain waves.

Both run on the worker's main thread until the engine has nothing left, and touch nothing but the engine and the
courier's queues: no Redis, no tokenizer, no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from ..common.errors import DocumentError
from .courier import Completed, Courier, NotStarted
from .engines.base import Engine, Prompt

T = TypeVar("T")

# Seconds that an idle engine waits for the next prompt before the loop ends, while the courier holds leases.
_IDLE_WAIT = 0.01


def feed_continuously(engine: Engine, courier: Courier, first: Prompt, stopping: Callable[[], bool]) -> None:
    """Steps the engine until it is idle and nothing is ready, adding prompts between steps.

    Outputs are the same as those of one `generate` call over the same prompts at temperature 0.

    Args:
        first: the prompt that ended the wait.
        stopping: whether a warm shutdown has begun; prompts that have not reached the engine then go back.
    """
    _add(engine, courier, first, stopping())
    while True:
        for prompt_id in _drained(courier.aborts):
            engine.abort([prompt_id])
        for prompt in _drained(courier.inbox):
            _add(engine, courier, prompt, stopping())
        if engine.has_unfinished():
            for completion in engine.step():
                courier.post(Completed(completion.prompt_id, completion))
        elif not courier.in_flight:
            return
        else:
            # The last results are being written, or the next prompts encoded.
            try:
                _add(engine, courier, courier.inbox.get(timeout=_IDLE_WAIT), stopping())
            except Empty:
                continue


def feed_waves(engine: Engine, courier: Courier, first: Prompt, stopping: Callable[[], bool]) -> None:
    """Runs one wave: what is admitted is gathered, then goes through one `generate` call.

    Documents that are cancelled meanwhile run to the end of their wave; their results are fenced.
    """
    wave = [first]
    while not (courier.full or stopping()):
        wave += _drained(courier.inbox)
        time.sleep(_IDLE_WAIT)
    wave += _drained(courier.inbox)
    if stopping():
        for prompt in wave:
            courier.post(NotStarted(prompt.prompt_id))
        return
    aborted = set(_drained(courier.aborts))
    for completion in engine.generate([prompt for prompt in wave if prompt.prompt_id not in aborted]):
        courier.post(Completed(completion.prompt_id, completion))


def _add(engine: Engine, courier: Courier, prompt: Prompt, stopping: bool) -> None:
    if stopping:
        courier.post(NotStarted(prompt.prompt_id))
        return
    try:
        engine.add_request(prompt)
    except DocumentError as error:
        courier.post(Completed(prompt.prompt_id, error))


def _drained(queue: SimpleQueue[T]) -> list[T]:
    """Everything in a queue, without waiting."""
    items: list[T] = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
