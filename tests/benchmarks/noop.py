"""The job of the stock worker, in a module of its own: RQ runs nothing out of `__main__`."""

from __future__ import annotations

from typing import Any


def noop(_: dict[str, Any]) -> None:
    """Does nothing."""
