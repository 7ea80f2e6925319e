"""The release before this one: its Lua scripts (integration/compat/lua), called as its `scripts.py` called them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from redis import Redis

from ingestq.common import keys
from ingestq.common.payload import FINISHED_STUB
from ingestq.common.schema import IngestRequest
from ingestq.common.scripts import LeasedJob, now_iso, pack_exception
from support.jobs import QUEUE, new_job

_LUA = Path(__file__).parents[1] / "integration" / "compat" / "lua"


@cache
def _source(name: str) -> str:
    shebang, body = (_LUA / f"{name}.lua").read_text().split("\n", 1)
    return f"{shebang}\n{(_LUA / 'prelude.lua').read_text()}\n{body}"


def _run(redis: Redis, name: str, keys_: Sequence[str], *args: Any) -> Any:
    return redis.eval(_source(name), len(keys_), *keys_, *args)


def put(redis: Redis, requests: Sequence[IngestRequest], *, group_id: str, retries: str = "") -> list[str]:
    group_keys = [keys.group(group_id), keys.group_members(group_id), keys.group_done(group_id)]
    jobs = [new_job(item) for item in requests]
    fields = [field for job in jobs for field in job[:4]]  # it knew of no more
    options = (3600, now_iso(), 3600, 3600, retries, "[]", 0)
    _run(redis, "enqueue", [keys.queue(QUEUE), keys.queues(), *group_keys], "rq", QUEUE, group_id, *options, *fields)
    return [job.job_id for job in jobs]


def lease(redis: Redis, *, worker: str, want: int, call_id: str) -> list[LeasedJob]:
    names = [keys.queue(QUEUE), keys.started(QUEUE), keys.worker_executions(worker), keys.limits(QUEUE)]
    bounds = (want, 4 * 1024 * 1024, 60.0, keys.STOCK_GRACE, 0, call_id, now_iso(), 0, 128)
    leased, _, _, _, now_ms, _ = _run(redis, "lease", [*names, keys.suspended()], "rq", QUEUE, worker, "sim", *bounds)
    return [
        LeasedJob(
            job_id=job_id.decode(),
            execution_id=execution_id.decode(),
            data=data,
            enqueued_ms=int(enqueued_ms),
            leased_ms=now_ms,
            attempts=attempts,
            crashes=0,
            result_ttl=3600,
            failure_ttl=3600,
            refused=refused.decode(),
        )
        for job_id, execution_id, data, enqueued_ms, _, attempts, _, _, refused in leased
    ]


def finish(redis: Redis, worker: str, jobs: Sequence[LeasedJob], kind: str, row: bytes) -> list[str]:
    registries = [keys.finished(QUEUE), keys.failed(QUEUE), keys.scheduled(QUEUE), keys.worker(worker)]
    names = [keys.queue(QUEUE), keys.started(QUEUE), *registries]
    exception = "" if kind == "S" else pack_exception("EngineError: no")
    ends = [
        part
        for job in jobs
        for part in (job.job_id, job.execution_id, kind, 3600, b64encode(row), exception, job.leased_ms)
    ]
    words = _run(redis, "finish", names, "rq", QUEUE, worker, "sim", now_iso(), FINISHED_STUB, *ends)
    return [word.decode() for word in words]


def hand_back(redis: Redis, members: Sequence[str] = (), *, max_attempts: int = 0) -> tuple[int, int, int]:
    """Returns how many were queued, dead-lettered, and lost; without `members`, of those that have expired."""
    names = [keys.queue(QUEUE), keys.started(QUEUE), keys.failed(QUEUE)]
    reason = pack_exception(f"WorkerLost: {max_attempts} workers failed, died or lost their lease")
    bounds = (now_iso(), keys.STOCK_GRACE, max_attempts, reason, 3600, 128)
    queued, dead_lettered, lost = _run(redis, "hand_back", names, "rq", QUEUE, *bounds, *members)
    return queued, dead_lettered, lost


def renew(redis: Redis, worker: str, members: Sequence[str]) -> list[str]:
    """Returns the leases that are gone."""
    names = [keys.started(QUEUE), keys.worker_executions(worker), keys.worker(worker)]
    _, positions = _run(redis, "renew", names, 60.0 + keys.STOCK_GRACE, 480, now_iso(), *members)
    return [members[position - 1] for position in positions]
