"""Section "restart": whether a later start finds in the compile cache what an earlier one put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .report import Section, Table, Verdict

_TITLE = "Restart and compile cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the configured engine."""

    # What was started.
    label: str
    # Seconds until it was ready.
    seconds: float
    # Files in the compile cache before and after; None: there is no such cache.
    entries_before: int | None
    entries_after: int | None

    @property
    def num_new(self) -> int:
        return (self.entries_after or 0) - (self.entries_before or 0)


def cache_folder(environment: Mapping[str, str], device: str) -> Path | None:
    """Where a TPU's engine keeps what it has compiled, by vllm/envs.py; None on other devices."""
    if device != "tpu":
        return None
    default = Path(environment.get("XDG_CACHE_HOME", "~/.cache")) / "vllm" / "xla_cache"
    return Path(environment.get("VLLM_XLA_CACHE_PATH") or default).expanduser()


def num_entries(folder: Path | None) -> int | None:
    if folder is None:
        return None
    return sum(path.is_file() for path in folder.rglob("*")) if folder.exists() else 0


def restart_section(starts: Sequence[Start], folder: Path | None) -> Section:
    """Judges the last start, which comes after two of the same engine."""
    table = Table(
        header=("start", "ready after, s", "cache entries before", "new"),
        rows=[(s.label, s.seconds, s.entries_before, s.num_new if folder else None) for s in starts],
    )
    verdict, reason = _judged(starts, folder)
    return Section(
        name="restart",
        title=_TITLE,
        verdict=verdict,
        reason=reason,
        figures={"compile cache": str(folder) if folder else None},
        table=table,
    )


def _judged(starts: Sequence[Start], folder: Path | None) -> tuple[Verdict, str]:
    first, last = starts[0], starts[-1]
    if folder is None:
        return Verdict.NOT_POSSIBLE, "this engine compiles nothing at its start; only a TPU's has an XLA cache."
    if not last.entries_before:
        return Verdict.FAIL, f"nothing is in {folder} after {len(starts) - 1} starts; is VLLM_XLA_CACHE_PATH writable?"
    if last.num_new > 0:
        return Verdict.FAIL, f"the last start still compiled: {last.num_new} new entries in {folder}."
    if first.num_new == 0:
        return Verdict.PASS, (
            "no start compiled anything: the cache was warm beforehand. For a cold start's seconds, run again with "
            "an empty VLLM_XLA_CACHE_PATH."
        )
    return Verdict.PASS, f"cold {first.seconds:.0f} s with {first.num_new} new entries, warm {last.seconds:.0f} s."
