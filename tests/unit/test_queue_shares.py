"""Which queue is leased from next: the first, but for the share that is the lower ones'."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestq.workers.queue_shares import QueueShares
from support.properties import bounded

QUEUES = ["high", "mid", "low"]


def lease(shares: QueueShares, backlog: dict[str, int], seen: set[str], tokens: int) -> str | None:
    """One look as the leaser's: the first queue that has something gives it."""
    for queue in shares.order(seen):
        given_tokens = min(tokens, backlog[queue])
        backlog[queue] -= given_tokens
        (seen.add if backlog[queue] else seen.discard)(queue)
        shares.leased(queue, given_tokens)
        if given_tokens:
            return queue
    return None


@given(st.lists(st.tuples(st.sets(st.sampled_from(QUEUES)), st.sampled_from(QUEUES), st.integers(0, 10**7))))
def test_every_queue_is_tried_once_and_the_lower_ones_in_their_order(
    looks: list[tuple[set[str], str, int]],
) -> None:
    shares = QueueShares(QUEUES, 0.3)
    for backlogged, queue, tokens in looks:
        order = shares.order(backlogged)
        assert sorted(order) == sorted(QUEUES)
        assert order.index("mid") < order.index("low")
        shares.leased(queue, tokens)


def test_without_a_share_priority_is_strict() -> None:
    shares, backlog, seen = QueueShares(QUEUES, 0.0), {"high": 10**6, "mid": 10**6, "low": 10**6}, set()

    leased = [lease(shares, backlog, seen, 10_000) for _ in range(300)]

    assert leased == ["high"] * 100 + ["mid"] * 100 + ["low"] * 100


def test_one_queue_is_a_matter_of_course() -> None:
    shares = QueueShares(["only"], 0.5)
    shares.leased("only", 10**6)
    assert shares.order(set()) == ["only"]


@given(st.floats(0.01, 0.9), st.integers(1, 100_000), st.integers(0, 100))
@bounded(60)
def test_the_lower_queues_get_their_share_while_all_have_documents(share: float, largest: int, seed: int) -> None:
    """Also though their backlog is not known before one looks."""
    chance = random.Random(seed)
    shares, backlog, seen = QueueShares(QUEUES, share), dict.fromkeys(QUEUES, 10**9), set()
    for _ in range(2000):
        lease(shares, backlog, seen, chance.randint(1, largest))

    total, lower = 3 * 10**9 - sum(backlog.values()), 10**9 - backlog["mid"]
    # At most what has to come together before one looks, and a lease.
    assert abs(lower - share * total) <= 2**14 + largest
    assert backlog["low"] == 10**9  # among themselves, priority is strict


def test_nothing_is_saved_up_while_there_is_nothing_to_claim_it_for() -> None:
    shares, backlog, seen = QueueShares(QUEUES, 0.5), {"high": 10**9, "mid": 0, "low": 0}, set()
    for _ in range(1000):
        lease(shares, backlog, seen, 10_000)

    backlog["low"] = 10**9
    leased = [lease(shares, backlog, seen, 10_000) for _ in range(100)]

    assert 45 <= leased.count("low") <= 55


def test_what_nobody_else_wanted_is_no_advance() -> None:
    shares, backlog, seen = QueueShares(QUEUES, 0.2), {"high": 0, "mid": 10**9, "low": 0}, set()
    for _ in range(1000):
        lease(shares, backlog, seen, 10_000)

    backlog["high"] = 10**9
    leased = [lease(shares, backlog, seen, 10_000) for _ in range(100)]

    assert leased[0] == "high"
    assert 17 <= leased.count("mid") <= 23


def test_an_empty_lower_queue_is_looked_at_seldom() -> None:
    shares = QueueShares(["high", "low"], 0.1)
    looked_first = 0
    for _ in range(1000):
        looked_first += shares.order({"high"})[0] == "low"
        shares.leased("high", 10_000)

    # Every 2**14 / 0.1 tokens or so.
    assert looked_first == pytest.approx(1000 * 10_000 * 0.1 / 2**14, rel=0.1)


def test_a_lower_queue_with_nothing_for_this_worker_claims_nothing() -> None:
    shares = QueueShares(["high", "low"], 0.25)
    asked_first = 0
    for _ in range(1000):
        asked_first += shares.order({"high", "low"})[0] == "low"
        shares.leased("low", 0)
        shares.leased("high", 2_000)
    assert asked_first < 50

    in_a_row = 0
    while shares.order({"high", "low"})[0] == "low":
        shares.leased("low", 2_000)
        in_a_row += 1
    assert in_a_row <= 12
