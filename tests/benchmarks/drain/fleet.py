"""Real worker processes with simulated engines, each started again when it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from ingestq.workers.engines.simulated_engine import Profile
from support.fleet import TESTS, Fleet, SupervisedWorker
from support.processes import wait_until

from .worker import FOLDER
from .workload import MODEL

BENCHMARKS = TESTS / "benchmarks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How workers decide what to take."""

    name: str
    # Of worker.py.
    worker: str = "PacedWorker"
    settings: Mapping[str, str] = field(default_factory=dict)


class SimulatedFleet:
    """Engines of one profile, ready when the context is entered.

    Args:
        time_scale: real seconds in a simulated one.
    """

    def __init__(
        self, url: str, folder: Path, names: Sequence[str], profile: Profile, policy: Policy, time_scale: float
    ) -> None:
        self.folder = folder
        self.names = names
        # Worker -> when it had which profile: the time of its start, by time.monotonic().
        self.profiles: dict[str, list[tuple[float, Profile]]] = {}
        # Worker -> when it was killed.
        self.kills: dict[str, list[float]] = {name: [] for name in self.names}
        self._workers = {
            name: SupervisedWorker(
                url,
                folder,
                name,
                fixed=True,
                worker=f"drain.worker.{policy.worker}",
                settings={
                    "INGEST_MODEL": MODEL,
                    "INGEST_SIMULATED_PROFILE": str(self._profile_path(name)),
                    "INGEST_ENGINE_TIME_SCALE": repr(time_scale),
                    "PYTHONPATH": f"{BENCHMARKS}:{TESTS}",
                    FOLDER: str(folder),
                    **policy.settings,
                },
            )
            for name in self.names
        }
        for name in self.names:
            self._give(name, profile)
        self._fleet = Fleet(list(self._workers.values()))

    def _profile_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _give(self, name: str, profile: Profile) -> None:
        self._profile_path(name).write_text(profile.model_dump_json())
        self.profiles.setdefault(name, []).append((time.monotonic(), profile))

    def __enter__(self) -> Self:
        self._fleet.__enter__()
        for name in self.names:
            self.await_ready(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fleet.__exit__(kind, error, trace)

    def await_ready(self, name: str) -> None:
        """Returns when the worker's latest process leases."""
        worker = self._workers[name]
        wait_until(lambda: worker.output.count(" ready on ") > len(self.kills[name]), f"{name} is ready", patience=300)

    def kill(self, name: str, profile: Profile | None = None) -> None:
        """SIGKILLs the process; the next one has the profile, if one is given."""
        if profile:
            self._give(name, profile)
        self.kills[name].append(time.monotonic())
        self._workers[name].signal(signal.SIGKILL)
