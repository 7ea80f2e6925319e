"""Lengths as documents have them: many short ones, a long tail."""

from __future__ import annotations

import random


def long_tailed(rng: random.Random, least: int, most: int) -> int:
    """Lognormal around a quarter of the most; redrawn until it is within bounds."""
    while True:
        value = round(rng.lognormvariate(0, 0.9) * most / 4)
        if least <= value <= most:
            return value
