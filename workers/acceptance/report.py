"""`Report`: what the acceptance run found, as a Markdown page for people and one JSON object for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a section ended."""

    PASS = "pass"
    # Not as promised; the reason says what was expected and what was found.
    FAIL = "fail"
    # The machine, the engine or the configuration lacks what is to be tested; no fault of anybody's.
    NOT_POSSIBLE = "not possible here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Figures that come in rows."""

    header: Sequence[str]
    # Each as long as the header.
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One thing that was tried."""

    # Stable, for programs.
    name: str
    title: str
    verdict: Verdict
    # One sentence or two: why this verdict.
    reason: str
    # Name, with its unit, -> value.
    figures: Mapping[str, Any]
    table: Table | None = None
    # Sentences that help to read the figures.
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All sections of a run, in order."""

    # When it began, UTC, ISO 8601.
    started: str
    # Seconds that it took.
    seconds: float
    # As it was typed.
    command: str
    sections: Sequence[Section]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what is not possible here doesn't count."""
        return all(section.verdict is not Verdict.FAIL for section in self.sections)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def to_markdown(self) -> str:
        head = [
            "# Acceptance report",
            f"`{self.command}`\n{self.started}, {self.seconds:.0f} s: **{'passed' if self.passed else 'FAILED'}**",
            _table(("section", "verdict", "why"), [(s.title, s.verdict.value, s.reason) for s in self.sections]),
        ]
        return "\n\n".join([*head, *map(_section, self.sections)]) + "\n"


def _section(section: Section) -> str:
    parts = [f"## {section.title}: {section.verdict.value}", section.reason]
    if section.figures:
        parts.append(_table(("figure", "value"), list(section.figures.items())))
    if section.table:
        parts.append(_table(section.table.header, section.table.rows))
    return "\n\n".join([*parts, *section.notes])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """A value to three digits at most behind the point, such that it can't break the table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
