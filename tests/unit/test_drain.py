"""How much to lease, and in which company what lost its workers runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestq.workers.drain import DrainController, companies

MAX_IN_FLIGHT = st.integers(1, 5000)
MAX_CRASHES = st.integers(2, 12)


def test_the_companies_are_those_that_were_measured() -> None:
    # notes of the project: one poison in 256 and three crashes took 256, 16, 1.
    assert companies(256, 3) == [16, 1]
    assert companies(1024, 3) == [32, 1]
    assert companies(1024, 4) == [94, 9, 1]
    assert companies(1024, 1) == []


@given(MAX_IN_FLIGHT, MAX_CRASHES)
def test_companies_shrink_until_the_last_is_alone(max_in_flight: int, max_crashes: int) -> None:
    steps = [max_in_flight, *companies(max_in_flight, max_crashes)]

    assert len(steps) == max_crashes
    assert steps[-1] == 1
    assert steps == sorted(steps, reverse=True)


@given(MAX_IN_FLIGHT, MAX_CRASHES, st.lists(st.integers(0, 20)))
def test_the_most_suspect_document_bounds_the_company(max_in_flight: int, max_crashes: int, crashes: list[int]) -> None:
    controller = DrainController(max_in_flight=max_in_flight, companies=companies(max_in_flight, max_crashes))

    bound = controller.company(crashes)

    if not any(crashes):
        assert bound == 0
    else:
        assert bound == companies(max_in_flight, max_crashes)[min(max(crashes), max_crashes - 1) - 1]


@given(MAX_IN_FLIGHT, st.integers(0, 5000), st.none() | st.integers(0, 5000))
def test_admission_never_overshoots(max_in_flight: int, in_flight: int, jobs_left: int | None) -> None:
    admitted = DrainController(max_in_flight=max_in_flight).admit(in_flight=in_flight, jobs_left=jobs_left)

    assert 0 <= admitted <= max(0, max_in_flight - in_flight)
    assert jobs_left is None or admitted <= jobs_left
