"""A Redis that is full: workers go on and make room; only enqueueing is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import live_cards
from ingestq.common.scripts import Admission
from support.jobs import QUEUE, put, request, row, statuses
from support.processes import WorkerProcess, wait_until

SETTINGS = {"INGEST_LEASE_TTL": "1", "INGEST_ENGINE_STEP_MS": "50"}


@contextmanager
def full(redis: Redis) -> Iterator[None]:
    """No command that needs memory is obeyed any more."""
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            redis.set("one", "more")
        yield
    finally:
        redis.config_set("maxmemory", 0)


def test_a_worker_works_a_full_redis_off_and_is_known_meanwhile(
    server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    with WorkerProcess(server.url, tmp_path, name="w", **SETTINGS):
        job_ids = put(redis, [request(i, max_tokens=120) for i in range(40)], group_id="g")
        with full(redis):
            with pytest.raises(OutOfMemoryError):
                put(redis, [request(1000)])
            assert "finished" not in statuses(redis, job_ids)
            wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "six leases later all are done")
            assert list(live_cards(redis, QUEUE)) == ["w"]

    assert {row(redis, job_id).attempts for job_id in job_ids} == {1}
    assert redis.xlen(keys.group_done("g")) == 40


def test_expired_leases_are_taken_over_in_a_full_redis(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    job_ids = put(redis, [request(i) for i in range(20)])
    # They end when the worker is there and Redis is full; a full one refuses to let them end by hand.
    scripts.lease(
        redis, QUEUE, worker="x", model="sim", admission=Admission(documents=20), lease_ttl=10, call_id="0" * 14
    )
    with WorkerProcess(server.url, tmp_path, name="w", **SETTINGS), full(redis):
        wait_until(lambda: set(statuses(redis, job_ids)) == {"finished"}, "the other worker's are done")

    assert {row(redis, job_id).attempts for job_id in job_ids} == {2}
