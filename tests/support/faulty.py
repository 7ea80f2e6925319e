"""A worker whose engine fails where a document's text says so, and which fails itself where it is ordered to:
`rq worker -w support.faulty.FaultyWorker`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingestq.common import connections, scripts
from ingestq.workers import batch_worker, courier, housekeeper
from ingestq.workers.batch_worker import BatchWorker
from ingestq.workers.engines.base import Completion, Prompt
from ingestq.workers.engines.simulated_engine import SimulatedEngine

# In a document's text.
STEP_RAISES = "the engine raises"
DOCUMENT_ERRS = "the engine fails this document"
TOKENIZER_PANICS = "the tokenizer panics"
# Documents that end the process at the first step with them, each in its way, and how their guardian words it.
POISONS = {
    "poison: abort": "killed by signal 6 (SIGABRT)",
    "poison: bus error": "killed by signal 7 (SIGBUS)",
    "poison: exit": "exited with code 77",
}

# From the environment. Seconds that loading takes.
LOAD_SECONDS = "FAULTY_LOAD_SECONDS"
# What loading makes of the exception that ends it: "1" takes no notice, "" raises another.
LOAD_SWALLOWS = "FAULTY_LOAD_SWALLOWS"
# What loading raises.
LOAD_RAISES = "FAULTY_LOAD_RAISES"
# Loading starts a process of the engine's own.
CHILD = "FAULTY_CHILD"
# The file of orders: "POINT ACTION [SECONDS]", obeyed once, when that point is reached next.
ORDERS = "FAULTY_ORDERS"
# The host name: workers of one machine are otherwise of one health.
MACHINE = "FAULTY_MACHINE"
# Seconds to wait for Redis' answers, scaled down like the leases.
SOCKET_TIMEOUT = "FAULTY_SOCKET_TIMEOUT"

# Bytes that an engine takes before it is killed as the kernel kills what is out of memory.
_MUCH = 256 * 1024 * 1024


class Panic(BaseException):
    """As Rust's panics reach Python: no Exception."""


class FaultyEngine(SimulatedEngine):
    """The simulated engine with faults on demand."""

    _raises = False

    def encode(self, text: str) -> list[int]:
        if TOKENIZER_PANICS in text:
            raise Panic
        self._raises |= STEP_RAISES in text
        tokens = super().encode(text)
        if DOCUMENT_ERRS in text:
            self._erring.add(tuple(tokens))
        for poison in POISONS:
            if poison in text:
                self._poisonous[tuple(tokens)] = poison
        return tokens

    def step(self) -> list[Completion]:
        for prompt_id, poison in self._poison_ids.items():
            if any(seq.prompt.prompt_id == prompt_id for seq in [*self._running, *self._waiting]):
                _die_of(poison)
        order = obey("step")
        if self._raises:
            raise RuntimeError("injected: out of memory at a step")
        completions = [self._failed(completion) for completion in super().step()]
        if order == "err":
            while not completions and self.has_unfinished():
                completions = super().step()
            completions[:1] = [_error(completion) for completion in completions[:1]]
        return completions

    def add_request(self, prompt: Prompt) -> None:
        obey("feed")
        tokens = tuple(prompt.token_ids)
        if tokens in self._erring:
            self._erring_ids.add(prompt.prompt_id)
        if tokens in self._poisonous:
            self._poison_ids[prompt.prompt_id] = self._poisonous[tokens]
        super().add_request(prompt)

    def _failed(self, completion: Completion) -> Completion:
        return _error(completion) if completion.prompt_id in self._erring_ids else completion

    _erring: set[Sequence[int]]
    _erring_ids: set[str]
    _poisonous: dict[Sequence[int], str]
    _poison_ids: dict[str, str]


class FaultyWorker(BatchWorker):
    engine_class = FaultyEngine

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if seconds := os.environ.get(SOCKET_TIMEOUT):
            for module in (connections, batch_worker, courier, housekeeper):
                module.SOCKET_TIMEOUT = float(seconds)
        super().__init__(*args, **kwargs)
        self.hostname = os.environ.get(MACHINE, self.hostname)

    def load_engine(self) -> FaultyEngine:
        print("loading the engine", flush=True)
        try:
            time.sleep(float(os.environ.get(LOAD_SECONDS, "0")))
        except Exception as error:
            if os.environ.get(LOAD_SWALLOWS) == "":
                raise RuntimeError("the chip is busy") from error
            if LOAD_SWALLOWS not in os.environ:
                raise
        if reason := os.environ.get(LOAD_RAISES):
            raise RuntimeError(reason)
        if CHILD in os.environ:
            subprocess.Popen(["sleep", "3600"], start_new_session=True)
        if ORDERS in os.environ:
            scripts.lease = _between(scripts.lease, "lease")
            scripts.finish = _between(scripts.finish, "finish")
        engine = self.engine_class.from_settings(self._settings)
        engine._erring, engine._erring_ids = set(), set()
        engine._poisonous, engine._poison_ids = {}, {}
        return engine


# --- orders


def obey(point: str) -> str:
    """Does what is ordered for this point, if anything; returns the action where the caller is to do it."""
    path = os.environ.get(ORDERS)
    if not path or not os.path.exists(path):
        return ""
    wanted, action, *argument = Path(path).read_text().split()
    if wanted != point:
        return ""
    os.unlink(path)  # tells who ordered it that it happens now
    _ACTIONS.get(action, lambda _: None)(float(argument[0]) if argument else 0.0)
    return action


def _kill(_: float) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault(_: float) -> None:
    ctypes.string_at(0)


def _exhaust(_: float) -> None:
    """As the kernel's out of memory killer: in the middle of taking memory, by SIGKILL."""
    taken = bytearray(_MUCH)
    os.kill(os.getpid(), signal.SIGKILL)
    del taken


def _hold_gil(seconds: float) -> None:
    """A C call that doesn't let go of the GIL."""
    ctypes.PyDLL(None).usleep(int(min(seconds, 2000.0) * 1e6))


def _raise(_: float) -> None:
    raise RuntimeError("injected: the engine is dead")


def _run_out(_: float) -> None:
    raise MemoryError("injected: out of memory at a step")


_ACTIONS: dict[str, Callable[[float], None]] = {
    "kill": _kill,
    "segfault": _segfault,
    "exhaust": _exhaust,
    "hang": time.sleep,
    "hold-gil": _hold_gil,
    "raise": _raise,
    "run-out": _run_out,
}


def _between(script: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The script's function, with a point before and one after it that calls for something."""

    def called(*args: Any, **kwargs: Any) -> Any:
        obey(f"before-{name}")
        reply = script(*args, **kwargs)
        if name != "lease" or reply.jobs:
            obey(f"after-{name}")
        return reply

    return called


def _die_of(poison: str) -> None:
    if poison == "poison: abort":
        os.abort()
    if poison == "poison: bus error":
        os.kill(os.getpid(), signal.SIGBUS)
    os._exit(77)


def _error(completion: Completion) -> Completion:
    return replace(completion, finish_reason="error", error="injected: this document failed")
