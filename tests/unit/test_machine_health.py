"""How long a machine whose engine failed waits before the next start."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestq.common.machine_health import RETRY_AFTER, MachineHealth


def test_a_sound_machine_starts_at_once() -> None:
    assert MachineHealth().wait(now=1e9) <= 0


def test_the_pause_doubles_up_to_a_minute() -> None:
    pauses = [MachineHealth(run_failures=n, failed_at=1000.0).wait(now=1000.0) for n in range(1, 9)]

    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_only_failures_to_start_make_a_machine_refuse_work() -> None:
    # A document may be to blame for the others, and is failed for them.
    assert not MachineHealth(run_failures=100).refuses
    broken = MachineHealth(start_failures=5, failed_at=1000.0)
    assert broken.refuses
    assert broken.wait(now=1000.0) == RETRY_AFTER


@given(st.dictionaries(st.sampled_from(["start", "run", "failed_at", "reason", "max", "x"]), st.text()))
def test_whatever_is_in_redis_is_read(fields: dict[str, str]) -> None:
    assert isinstance(MachineHealth.parse(fields).wait(now=0.0), float)
