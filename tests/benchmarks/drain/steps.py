"""What an engine did, step by step, as the worker's process writes it down: binary records, one write each.

A process that is killed loses none. Times are time.monotonic(), which all processes of a machine share.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """One engine step."""

    # Seconds, before the step and after it.
    start: float
    end: float
    # Simulated seconds that it took.
    seconds: float
    # Share of the KV blocks in use after it.
    kv_usage: float
    # Tokens of the prompts that got their first output token in it, and output tokens: what was got done for good. A
    # prompt that is computed again after a preemption doesn't count again.
    num_prefilled_tokens: int
    num_output_tokens: int
    # Prompt tokens in the engine without a first token, before the step.
    num_waiting_tokens: int
    # Prompts in the engine, before the step.
    num_seqs: int
    # Sequences that lost their KV blocks in it.
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output, each once."""
        return self.num_prefilled_tokens + self.num_output_tokens


class First(NamedTuple):
    """One first token."""

    # Seconds, after the step.
    at: float
    # Simulated milliseconds since add_request, by the engine.
    ttft_ms: float
    num_prompt_tokens: int
    # Prompt tokens before it in the engine, when it was added.
    num_tokens_ahead: int


_STEP, _FIRST = struct.Struct("<dddd5Q"), struct.Struct("<dd2Q")


class StepWriter:
    """Appends to `NAME.steps` and `NAME.first` in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._steps = (folder / f"{name}.steps").open("ab", buffering=0)
        self._firsts = (folder / f"{name}.first").open("ab", buffering=0)

    def write(self, step: Step, firsts: list[First]) -> None:
        self._steps.write(_STEP.pack(*step))
        if firsts:
            self._firsts.write(b"".join(_FIRST.pack(*first) for first in firsts))


def read_steps(folder: Path, name: str) -> list[Step]:
    """The steps of a worker's processes, one after the other."""
    return [Step(*values) for values in _records(folder / f"{name}.steps", _STEP)]


def read_firsts(folder: Path, name: str) -> list[First]:
    """The first tokens of a worker's processes, one after the other."""
    return [First(*values) for values in _records(folder / f"{name}.first", _FIRST)]


def _records(path: Path, record: struct.Struct) -> Iterator[tuple]:
    if path.exists():
        raw = path.read_bytes()
        yield from record.iter_unpack(raw[: len(raw) // record.size * record.size])
