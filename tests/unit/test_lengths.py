"""How much output is reserved for, and expected of, a task's documents."""

from __future__ import annotations

import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestq.workers.lengths import ExpectedOutput, bucket_of, upper_edge

LENGTHS = st.lists(st.integers(0, 100_000), min_size=16, max_size=300)


def learned(lengths: list[int], task: str = "t") -> ExpectedOutput:
    expected = ExpectedOutput()
    for length in lengths:
        expected.observe(task, length)
    return expected


@given(st.integers(1, 2**31))
def test_a_length_lies_within_its_bucket(length: int) -> None:
    bucket = bucket_of(length)

    assert 2 ** ((bucket - 1) / 4) < length <= 2 ** (bucket / 4)
    assert upper_edge(bucket) >= length
    assert bucket == 0 or upper_edge(bucket - 1) < length


def test_edges_are_exact_at_powers_of_two() -> None:
    assert [bucket_of(2**power) for power in range(31)] == [4 * power for power in range(31)]
    assert [upper_edge(4 * power) for power in range(31)] == [2**power for power in range(31)]
    assert (bucket_of(0), bucket_of(1)) == (0, 0)


@given(LENGTHS)
def test_what_is_reserved_suffices_for_95_in_100_and_not_for_far_more(lengths: list[int]) -> None:
    reserved = learned(lengths).reserve("t", 10**9)

    assert sum(length <= reserved for length in lengths) >= 0.95 * len(lengths)
    # The next shorter bucket would not have been enough.
    shorter = upper_edge(bucket_of(reserved) - 1) if reserved > 1 else 0
    assert sum(length <= shorter for length in lengths) < 0.95 * len(lengths) or reserved == 1


def test_the_mean_is_that_of_the_documents_but_for_the_width_of_the_buckets() -> None:
    chance = random.Random(0)
    lengths = [int(chance.lognormvariate(5.6, 1.0)) + 1 for _ in range(2000)]

    assert learned(lengths).mean("t", 10**9) == pytest.approx(mean(lengths), rel=0.05)


@given(LENGTHS, st.integers(1, 5000))
def test_nothing_beyond_max_tokens_is_expected(lengths: list[int], max_tokens: int) -> None:
    expected = learned(lengths)

    assert 1 <= expected.reserve("t", max_tokens) <= max_tokens
    assert expected.mean("t", max_tokens) <= max_tokens


def test_until_enough_documents_are_known_it_is_max_tokens() -> None:
    expected = learned([10] * 15)
    assert (expected.reserve("t", 500), expected.mean("t", 500), expected.reservations()) == (500, 500.0, {})

    expected.observe("t", 10)
    assert expected.reserve("t", 500) == 11
    assert expected.mean("t", 500) == pytest.approx(10, rel=0.2)
    assert expected.reservations() == {"t": 11}
    assert expected.reserve("another", 500) == 500


def test_news_is_that_a_task_is_known_and_each_doubling_since() -> None:
    known = ExpectedOutput()
    news = [number for number in range(1, 100) if known.observe("t", 10)]
    assert news == [16, 32, 64]


def test_what_was_observed_is_sent_once_and_counts_meanwhile() -> None:
    expected = learned([10] * 3 + [100])
    assert expected.take_observed() == {"t": {bucket_of(10): 3, bucket_of(100): 1}}
    assert expected.take_observed() == {}

    # Another one ends before the fleet's answer is there, which doesn't have it yet.
    expected.observe("t", 10)
    expected.replace({"t": {bucket_of(10): 15}})
    assert expected.reserve("t", 500) == 11
    assert expected.take_observed() == {"t": {bucket_of(10): 1}}


def test_what_is_no_count_of_lengths_is_left_out() -> None:
    expected = ExpectedOutput({"t": {bucket_of(10): 20, -3: 100, 10**9: 100, 5: -7, 40: 0}})

    assert expected.reservations() == {"t": 11}
    learned([2**40])  # an absurd length is the longest there is
