"""After a fail-over Redis may remember what its workers do not."""

from __future__ import annotations

from pathlib import Path

from redis import Redis

from ingestq.common import scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.scripts import Admission
from support.jobs import QUEUE, put, request, statuses
from support.processes import WorkerProcess, wait_until


def test_a_lease_whose_end_redis_forgot_is_given_up(server: EmbeddedServer, redis: Redis, tmp_path: Path) -> None:
    """Its worker renews it, and would for ever: the end came before the fail-over, and no connection broke since."""
    with WorkerProcess(server.url, tmp_path, name="a") as worker:
        # Of another model, so that the worker doesn't take it in earnest.
        job_ids = put(redis, [request(0, model="other")])
        scripts.lease(
            redis,
            QUEUE,
            worker="a",
            model="other",
            admission=Admission(documents=1),
            lease_ttl=3600.0,
            call_id="0" * 14,
        )
        assert statuses(redis, job_ids) == ["started"]

        wait_until(lambda: statuses(redis, job_ids) == ["queued"], "it is given up")
        assert worker.process.poll() is None
