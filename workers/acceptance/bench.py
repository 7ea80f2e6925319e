"""`Bench`: everything that the sections of one acceptance run share, and how they start processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import IngestqError

# The commands that were installed with this Python.
_BIN = Path(sys.executable).parent

# Seconds that an engine may take to start: a cold compile on a v6e takes 24 to 30 minutes (notes of upstream users).
START_TIMEOUT = 3600.0

# Seconds that any other condition may take.
PATIENCE = 120.0


class AcceptanceError(IngestqError):
    """A step of the acceptance run did not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One acceptance run."""

    # Where logs, documents and rows of the run go.
    folder: Path
    # Redis or Valkey; in no command line of ours, as it may have a password in it. "": one of our own is to be started.
    url: str
    # A queue that nobody else uses.
    queue: str
    # INGEST_* and the engine's own variables, on top of this process's environment.
    settings: Mapping[str, str]
    # Documents leased at once: the levels of the ramp, ascending.
    levels: tuple[int, ...]
    # Of the documents that are made up.
    prompt_tokens: int
    # Output tokens of every document, at most.
    output_tokens: int
    # Whether prompts go through the model's chat template.
    chat: bool
    # Seconds that one level of the ramp may take.
    timeout: float
    # The name that requests carry; until the engine has said it, one that no worker has.
    model: str = "acceptance"

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "RQ_REDIS_URL": self.url, **self.settings, **more}

    def run(self, *command: str, timeout: float = PATIENCE, allowed: tuple[int, ...] = (0,)) -> str:
        """Runs an installed command (`ingestq ...`) to its end; returns its stdout.

        Raises:
            AcceptanceError: it took longer than `timeout` seconds, or ended with a code that isn't allowed.
        """
        try:
            done = subprocess.run(
                [str(_BIN / command[0]), *command[1:]],
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise AcceptanceError(f"`{' '.join(command)}` did not end within {timeout:g} s") from None
        if done.returncode not in allowed:
            raise AcceptanceError(f"`{' '.join(command)}` ended with {done.returncode}: {tail(done.stderr)}")
        return done.stdout

    def script(self, name: str) -> str:
        """The path of an installed command."""
        return str(_BIN / name)


def wait_until(condition: Callable[[], object], what: str, timeout: float = PATIENCE, interval: float = 0.05) -> None:
    """Returns as soon as `condition` holds.

    Raises:
        AcceptanceError: it doesn't within `timeout` seconds; names `what`.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AcceptanceError(f"not within {timeout:g} s: {what}")
        time.sleep(interval)


def tail(text: str, characters: int = 1500) -> str:
    """The end of a log, in one line."""
    return " ".join(text.split())[-characters:]
