"""The engine's step loop: `feed_continuously` tops the engine up while it steps, `feed_waves` runs plain waves.

Both run on the worker's main thread until the engine has nothing left, and touch nothing but the engine and the
courier's queues: no Redis, no tokenizer, no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from ..common.errors import DocumentError
from .courier import Completed, Courier
from .engines.base import Engine, Prompt

T = TypeVar("T")

# Seconds that an idle engine waits for the next prompt before the loop ends, while the courier holds leases.
_IDLE_WAIT = 0.01


def feed_continuously(
    engine: Engine, courier: Courier, first: Prompt, stopping: Callable[[], bool], alive: Callable[[], None]
) -> None:
    """Steps the engine until it is idle and nothing is ready, adding prompts between steps.

    Outputs are the same as those of one `generate` call over the same prompts at temperature 0.

    Args:
        first: the prompt that ended the wait.
        stopping: whether a warm shutdown has begun: what the engine has is finished, nothing is added.
        alive: called before each step.
    """
    _add(engine, courier, [first])
    while not courier.closing:
        alive()
        if not stopping():
            _add(engine, courier, _drained(courier.inbox))
        # After what it adds: a prompt that waited in the inbox may have been cancelled meanwhile.
        if aborted := _drained(courier.aborts):
            engine.abort(aborted)
        if engine.has_unfinished():
            for completion in engine.step():
                courier.post(Completed(completion.prompt_id, completion))
        elif stopping() or not courier.in_flight:
            return
        else:
            # The last results are being written, or the next prompts encoded.
            with suppress(Empty):
                _add(engine, courier, [courier.inbox.get(timeout=_IDLE_WAIT)])


def feed_waves(
    engine: Engine, courier: Courier, first: Prompt, stopping: Callable[[], bool], alive: Callable[[], None]
) -> None:
    """Runs one wave: what is admitted is gathered, then goes through one `generate` call.

    Documents that are cancelled meanwhile run to the end of their wave; their results are fenced.
    """
    wave = [first]
    while not courier.full and not stopping():
        wave += _drained(courier.inbox)
        time.sleep(_IDLE_WAIT)
    if stopping():
        return  # the worker ends, and hands back what it holds
    wave += _drained(courier.inbox)
    alive()
    aborted = set(_drained(courier.aborts))
    for completion in engine.generate([prompt for prompt in wave if prompt.prompt_id not in aborted]):
        courier.post(Completed(completion.prompt_id, completion))


def _add(engine: Engine, courier: Courier, prompts: Iterable[Prompt]) -> None:
    for prompt in prompts:
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
