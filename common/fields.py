"""What a field in Redis says, whoever wrote it: a number or a time, or None where it is missing or not one."""

from __future__ import annotations

import math
import re
from datetime import datetime

# Digits that a number may have: those of 64 bits. Python refuses to read thousands of them.
_WHOLE = re.compile(rb"-?[0-9]{1,18}")


def whole(raw: bytes | None) -> int | None:
    """A whole number."""
    return int(raw) if isinstance(raw, bytes) and _WHOLE.fullmatch(raw) else None


def count(raw: bytes | None) -> int:
    """A whole number that isn't negative; 0 for anything else."""
    return max(0, whole(raw) or 0)


def number(raw: bytes | None) -> float | None:
    """A finite number."""
    try:
        value = float(raw) if isinstance(raw, bytes) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def timestamp(iso: bytes | None) -> float | None:
    """Seconds since the epoch, of one of RQ's own time stamps."""
    try:
        return datetime.fromisoformat(iso.decode()).timestamp() if iso else None
    except (ValueError, OverflowError):
        return None
