"""The engine's step loop: `feed_continuously` tops the engine up while it steps, `feed_waves` runs plain waves.

Both run on the worker's main thread until the engine has nothing left, and touch nothing but the engine, the pool of
ready prompts and the courier's mailbox: no Redis, no tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from ..common.errors import DocumentError
from .courier import Courier
from .drain import EngineLoad
from .engines.base import Completion, Engine
from .messages import Completed
from .pool import Ready

T = TypeVar("T")

# Seconds that an idle engine waits for the next prompt before the loop ends, while the courier holds leases.
_IDLE_WAIT = 0.01


def feed_continuously(
    engine: Engine, courier: Courier, first: Sequence[Ready], stopping: Callable[[], bool], alive: Callable[[], None]
) -> None:
    """Steps the engine until it is idle and nothing is ready, starting prompts between steps as they are admitted.

    Outputs are the same as those of one `generate` call over the same prompts at temperature 0.

    Args:
        first: the prompts that ended the wait.
        stopping: whether a warm shutdown has begun: what the engine has is finished, nothing is added.
        alive: called before each step.
    """
    running = _Running(engine, courier)
    running.start(first)
    while not courier.closing:
        alive()
        if not stopping():
            running.start(courier.start_ready(running.load))
        # After what it starts: a prompt that waited in the pool may have been cancelled meanwhile.
        if aborted := _drained(courier.aborts):
            running.abort(aborted)
        if engine.has_unfinished():
            running.end(engine.step())
            if engine.last_step is not None:
                courier.observe(engine.last_step)
        elif stopping() or not courier.in_flight:
            return
        else:
            # The last results are being written, or the next prompts encoded.
            courier.pool.wait(_IDLE_WAIT)


def feed_waves(
    engine: Engine, courier: Courier, first: Sequence[Ready], stopping: Callable[[], bool], alive: Callable[[], None]
) -> None:
    """Runs one wave: what is admitted is gathered, then goes through one `generate` call.

    Documents that are cancelled meanwhile run to the end of their wave; their results are fenced. A wave is as large as
    the limits on leases admit; what the engine does within it, nobody controls.
    """
    wave = list(first)
    while not courier.full and not stopping():
        wave += courier.pool.drain()
        time.sleep(_IDLE_WAIT)
    if stopping():
        return  # the worker ends, and hands back what it holds
    wave += courier.pool.drain()
    alive()
    aborted = set(_drained(courier.aborts))
    prompts = [ready.prompt for ready in wave if ready.prompt.prompt_id not in aborted]
    for completion in engine.generate(prompts):
        courier.post(Completed(completion.prompt_id, completion))


class _Running:
    """What the engine has, and what becomes of it."""

    def __init__(self, engine: Engine, courier: Courier) -> None:
        self._engine = engine
        self._courier = courier
        # Prompt id -> KV blocks that it takes at most.
        self._num_blocks: dict[str, int] = {}
        self._sum_blocks = 0

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(
            num_seqs=len(self._num_blocks),
            num_blocks=self._sum_blocks,
            waiting_tokens=self._engine.num_waiting_tokens,
        )

    def start(self, started: Iterable[Ready]) -> None:
        for ready in started:
            try:
                self._engine.add_request(ready.prompt)
            except DocumentError as error:
                self._courier.post(Completed(ready.prompt.prompt_id, error))
            else:
                self._num_blocks[ready.prompt.prompt_id] = ready.num_blocks
                self._sum_blocks += ready.num_blocks

    def abort(self, prompt_ids: Iterable[str]) -> None:
        known = [prompt_id for prompt_id in prompt_ids if prompt_id in self._num_blocks]
        if known:
            self._engine.abort(known)
        for prompt_id in known:
            self._forget(prompt_id)

    def end(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            self._forget(completion.prompt_id)
            self._courier.post(Completed(completion.prompt_id, completion))

    def _forget(self, prompt_id: str) -> None:
        self._sum_blocks -= self._num_blocks.pop(prompt_id, 0)


def _drained(queue: SimpleQueue[T]) -> list[T]:
    """Everything in a queue, without waiting."""
    items: list[T] = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
