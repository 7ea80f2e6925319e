"""Every Redis key that ingestq reads or writes. `{p}` is `RQ_KEY_PREFIX`, "rq" by default.

RQ's own keys, in RQ's own formats:

| key | type | members | TTL | writer |
|---|---|---|---|---|
| {p}:queues | set | queue keys, those of tenants' lists included | none | enqueue, finish (retry), hand_back, promote, retry |
| {p}:queue:Q, {p}:queue:Q@T | list | job ids, head first: of whoever names no tenant, and of tenant T | none | enqueue, lease, finish (retry), hand_back, promote, retry |
| {p}:job:ID | hash | RQ's fields, and ours, see below | result_ttl or failure_ttl once terminal | enqueue, adopt, lease, reserve, finish, hand_back, promote, cancel, retry |
| {p}:wip:Q | zset | "ID:EXECUTION", score: expiry + STOCK_GRACE (s) | none | lease, renew, finish, hand_back, cancel |
| {p}:execution:ID:EXECUTION | hash | RQ's execution record, and ours: kv_tokens (reserved), tenant (that they were charged to; missing: nobody) | 30 days, gone with the lease | lease, reserve, finish, hand_back, cancel |
| {p}:executions:ID | zset | execution ids of a job | 30 days, gone with the lease | lease, finish, hand_back, cancel |
| {p}:worker:W | hash | RQ's worker record, and ours: incarnation, process, alive_until (s) | RQ's | claim, renew, finish, sign_off, write_fields, RQ |
| {p}:workers, {p}:workers:Q | set | keys of worker records | none | claim, sign_off, RQ |
| {p}:worker:W:executions | set | "ID:EXECUTION" that W holds | 30 days, renewed | lease, renew, finish, hand_back, cancel |
| {p}:finished:Q, failed:Q, canceled:Q | zset | job ids, score: expiry (s) | none | enqueue, finish, hand_back, cancel, retry, housekeeper (removes expired) |
| {p}:scheduled:Q | zset | job ids, score: due (s) | none | finish (retry with an interval), promote, cancel |
| {p}:results:ID | stream | RQ results, newest last | result_ttl or failure_ttl | finish, hand_back |
| {p}:suspended | string | set by `rq suspend` | RQ's | RQ |

Ours:

| key | type | members | TTL | writer |
|---|---|---|---|---|
| {p}:ingest:limits:Q | hash | fields of AdmissionLimits | none | limits |
| {p}:ingest:kv_tokens | hash | "queue:Q" -> KV tokens that leases from Q reserve, "worker:W" -> those that W's leases reserve, from all its queues; no field: none | none | lease, reserve, recount, finish, hand_back, cancel |
| {p}:ingest:tenants:Q | zset | tenants ("": whoever names none), score: tokens served; of those with documents waiting, and of those that are ahead | none | enqueue, lease, reserve, finish (retry), hand_back, promote, retry |
| {p}:ingest:lengths:Q | hash | "TASK:BUCKET" -> finished documents whose output was that long | 30 days | learn |
| {p}:ingest:loads:Q | hash | worker name -> WorkerLoad (JSON), see worker_load.py | one day | write_fields (by worker_load), sign_off |
| {p}:ingest:machines:Q | hash | "FIELD:MACHINE", see machine_health.py | one day | machine_failed, machine_health |
| {p}:ingest:engines:Q | hash | worker name -> engine card (JSON) | one day | write_fields (by engine_card) |
| {p}:ingest:wake:Q:M | list | at most one token: work for model digest M waits | one hour | enqueue, adopt, lease, finish, hand_back, promote, retry |
| {p}:ingest:barrier | string | "1" | one minute | enqueue (INGEST_DURABILITY=aof or replica) |
| {p}:ingest:group:G | hash | queue, ttl, created_ms, seen_ms, sealed_ms, next_rank | group_ttl | enqueue, touch_group |
| {p}:ingest:group:G:members | zset | "ID:DOCUMENT_ID", score: order of submission | group_ttl | enqueue |
| {p}:ingest:group:G:done | stream | field j: id of a member that became terminal; d: its document, where a reader's sweep found it | group_ttl | enqueue, finish, hand_back, cancel, iter_results |

Our fields of a job:

| field | meaning | writer |
|---|---|---|
| model | the model that it is for; "*": any worker may take it, to refuse it | enqueue, adopt |
| schema | of its request, above 1 | adopt |
| tenant | in whose list it waits; missing: in the queue's own | enqueue |
| tokens, max_tokens | of its prompt, as the producer estimates, or a worker counted (then tokens_exact is "1"); of its output at most | enqueue, adopt, reserve |
| task | what it has in common with documents of its kind, 16 hexadecimal digits | enqueue, adopt |
| enqueued_ms | when, by Redis' clock | enqueue, retry |
| attempts, crashes | leases so far; of those, how many ended with their worker | lease, hand_back, retry |
| groups | who holds it: group ids, "(lone)": submitted alone | enqueue, cancel |
| blocked_ms, passed | since when it doesn't fit, at the head of its list; documents that passed it since. Gone with the next lease | lease |
| held_for, held_until | the worker that makes room for it; until when that holds (s) | lease |
"""

from __future__ import annotations

from hashlib import sha1

from .settings import key_prefix

# Seconds that an expired lease stays invisible to RQ's own cleanup, which races with itself (three readers of
# `rq info` made 278 duplicate entries out of 400 jobs, measured on RQ 3.0.0). Our reaper acts at expiry itself.
STOCK_GRACE = 120


def queue(name: str, tenant: str = "") -> str:
    """A queue's waiting list, or that of one of its tenants."""
    return f"{key_prefix()}:queue:{name}@{tenant}" if tenant else f"{key_prefix()}:queue:{name}"


def queues() -> str:
    return f"{key_prefix()}:queues"


def job_prefix() -> str:
    return f"{key_prefix()}:job:"


def job(job_id: str) -> str:
    return f"{job_prefix()}{job_id}"


def started(name: str) -> str:
    return f"{key_prefix()}:wip:{name}"


def finished(name: str) -> str:
    return f"{key_prefix()}:finished:{name}"


def failed(name: str) -> str:
    return f"{key_prefix()}:failed:{name}"


def canceled(name: str) -> str:
    return f"{key_prefix()}:canceled:{name}"


def scheduled(name: str) -> str:
    return f"{key_prefix()}:scheduled:{name}"


def suspended() -> str:
    return f"{key_prefix()}:suspended"


def results(job_id: str) -> str:
    return f"{key_prefix()}:results:{job_id}"


def worker(name: str) -> str:
    return f"{key_prefix()}:worker:{name}"


def workers() -> str:
    return f"{key_prefix()}:workers"


def workers_of(queue_name: str) -> str:
    return f"{key_prefix()}:workers:{queue_name}"


def worker_executions(name: str) -> str:
    return f"{key_prefix()}:worker:{name}:executions"


def machines(name: str) -> str:
    return f"{key_prefix()}:ingest:machines:{name}"


def limits(name: str) -> str:
    return f"{key_prefix()}:ingest:limits:{name}"


def engines(name: str) -> str:
    return f"{key_prefix()}:ingest:engines:{name}"


def loads(name: str) -> str:
    return f"{key_prefix()}:ingest:loads:{name}"


def tenants(name: str) -> str:
    return f"{key_prefix()}:ingest:tenants:{name}"


def kv_tokens() -> str:
    return f"{key_prefix()}:ingest:kv_tokens"


def lengths(name: str) -> str:
    return f"{key_prefix()}:ingest:lengths:{name}"


def wake(name: str, model: str) -> str:
    # As in prelude.lua, which has no other digest.
    return f"{wake_prefix(name)}{sha1(model.encode(), usedforsecurity=False).hexdigest()[:16]}"


def wake_prefix(name: str) -> str:
    return f"{key_prefix()}:ingest:wake:{name}:"


def barrier() -> str:
    return f"{key_prefix()}:ingest:barrier"


def group(group_id: str) -> str:
    return f"{key_prefix()}:ingest:group:{group_id}"


def group_members(group_id: str) -> str:
    return f"{group(group_id)}:members"


def group_done(group_id: str) -> str:
    return f"{group(group_id)}:done"
