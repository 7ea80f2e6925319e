"""How long property tests search: the same few examples every time, or more and others on demand.

`PROPERTY_ROUNDS=20 pytest tests/integration/test_script_invariants.py` tries 20 times as many, from random seeds.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

ROUNDS = int(os.environ.get("PROPERTY_ROUNDS", "0"))


def bounded(max_examples: int, *, steps: int = 50) -> settings:
    """Settings of a property test.

    Args:
        max_examples: in an ordinary run.
        steps: of a state machine, in one example.
    """
    return settings(
        max_examples=max_examples * max(ROUNDS, 1),
        stateful_step_count=steps,
        derandomize=ROUNDS == 0,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
