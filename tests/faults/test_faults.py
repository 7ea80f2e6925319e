"""Under faults of every sort, each accepted document ends as exactly one row. `make bench-faults` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.campaign import KINDS, Campaign

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Variants of others, or slow: left to the benchmark.
LEFT_OUT = {
    "clock an hour behind",
    "engine out of memory at a step",
    "machine lost",
    "SIGTERM",
    "step hangs",
    "worker killed after a lease",
    "worker killed while feeding",
}


def test_nothing_is_lost_or_doubled_under_faults(server_binary: str | None, tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind not in LEFT_OUT]

    report = Campaign(tmp_path, seed=7, rounds=1, binary=server_binary, kinds=kinds).run()

    assert report.by_kind() == dict.fromkeys(kinds, 1), report.surprises
    assert report.lost == []
    assert report.doubled == []
    assert report.unjustified == []
    assert report.surprises == []
    assert list(report.poisons.values()) == [True]
    assert report.accepted == report.succeeded + report.dead_letters > 500
