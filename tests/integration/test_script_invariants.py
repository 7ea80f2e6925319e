"""The Lua scripts against a model of them: whatever happens in whatever order, no document is lost or in two places,
no limit is overshot, and no reservation outlives its lease.

`PROPERTY_ROUNDS=n` searches n times as long, from random seeds: see support/properties.py.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry

from ingestq.common import keys, payload, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.limits import AdmissionLimits, write_limits
from ingestq.common.scripts import Admission, EnqueueOptions, Finish, JobNeeds, LeasedJob, Need, NewJob
from ingestq.common.serializer import OrjsonSerializer
from ingestq.workers.drain import DrainBounds, DrainController, companies
from ingestq.workers.prompts import needs_of
from support.jobs import QUEUE, put, request, statuses
from support.properties import ROUNDS, bounded

# What `drain.companies` makes of them: a document with one crash runs among two, with two alone.
IN_FLIGHT, MAX_CRASHES = 4, 3
CONTROLLER = DrainController(
    DrainBounds(max_in_flight=IN_FLIGHT, max_num_seqs=IN_FLIGHT), companies=companies(IN_FLIGHT, MAX_CRASHES)
)

# Tokens: of a KV block, of an output at most, and what the outputs of every other document's task are expected to have.
BLOCK, MAX_TOKENS, EXPECTED = 4, 10, {"short": 3}

WORKERS = ("w1", "w2", "w3")
MODELS = ("m1", "m2")
GROUPS = ("g1", "g2")
TENANTS = ("t1", "t2")
LIVE = ("queued", "started", "scheduled")
# Statuses under which RQ, and so `failed`, keeps a document in its FailedJobRegistry.
DEAD = ("failed", "stopped")
LONE = "(lone)"


@pytest.fixture(scope="module")
def own(server_binary: str | None) -> Iterator[Redis]:
    """A server that writes nothing to its disk."""
    with EmbeddedServer(server_binary, appendonly="no") as server, Redis.from_url(server.url) as client:
        yield client


@dataclass
class Document:
    """What should stand in Redis of one document."""

    status: str = "deleted"
    attempts: int = 0
    crashes: int = 0
    holders: list[str] = field(default_factory=list)
    retries_left: int = 0
    intervals: list[int] = field(default_factory=list)
    failure_ttl: int = 3600
    # Seconds that it may live on, -1: for ever; None: whatever stock RQ left it.
    ttl: int | None = -1
    # The execution of its lease.
    execution: str = ""
    # The execution of its newest result, if a worker wrote it.
    written: str = ""
    has_result: bool = False
    # The next lease starts counting anew.
    fresh: bool = False
    # Its model is not in its hash yet: a plain RQ client's.
    plain: bool = False
    # Its hash says who holds it; a plain RQ client's doesn't.
    grouped: bool = True
    # Its id may be in the queue's lists more than once, or without being queued.
    strays: bool = False
    tenant: str = ""
    # The list that it waits in: its tenant's, unless RQ put it back.
    place: str = ""
    # Of its prompt, as far as is known.
    tokens: int = 0
    exact: bool = False
    # That its lease has.
    kv_tokens: int = 0


def document_id(number: int) -> str:
    return f"d{number}"


def model_of(job_id: str) -> str:
    return MODELS[int(job_id[1:]) % 3 == 0]


def task_of(job_id: str) -> str:
    return "short" if int(job_id[1:]) % 2 else ""


def tokens_of(job_id: str) -> int:
    """As the producer estimates them."""
    return 1 + 5 * int(job_id[1:])


def need_of(job_id: str, tokens: int) -> int:
    """KV tokens of a document, in whole blocks."""
    return math.ceil((tokens + EXPECTED.get(task_of(job_id), MAX_TOKENS)) / BLOCK) * BLOCK


def request_of(job_id: str) -> dict[str, Any]:
    return {"document_id": job_id, "text": "t", "model": model_of(job_id)}


DOCUMENT = st.integers(0, 8).map(document_id)
TTL = st.sampled_from([-1, 0, 600])
INDEX = st.integers(0, 20)
INDICES = st.lists(INDEX, min_size=1, max_size=4)
MODEL = st.sampled_from(MODELS)
WANT = st.sampled_from([4, 3, 2, 1])
KIND = st.sampled_from("FSFPX")
WORKER = st.sampled_from(WORKERS)
LIMIT = st.sampled_from([None, None, 0, 1, 2, 3])
KV_LIMIT = st.sampled_from([None, None, None, 0, 20, 44, 90])
TENANT = st.sampled_from(["", "", *TENANTS])


class Scripts(RuleBasedStateMachine):
    """Each rule is one call that a producer, worker, guardian, housekeeper or stock RQ makes."""

    redis: Redis

    @initialize()
    def empty_server(self) -> None:
        self.redis.flushall()
        self.documents = {document_id(number): Document() for number in range(9)}
        self.groups: dict[str, list[str]] = {}
        # Every lease there ever was, with its worker; the current ones are those that a document names.
        self.leases: list[tuple[LeasedJob, str]] = []
        # What a worker's set may hold of leases that stock tools ended, until its next renewal.
        self.leftovers: dict[str, set[str]] = {worker: set() for worker in WORKERS}
        self.incarnations: dict[str, str] = {}
        self.dead: set[str] = set()
        self.limits = AdmissionLimits()
        # Field of the totals -> what stock tools left there, until they are counted anew.
        self.leaked: Counter[str] = Counter()
        self.calls = 0
        self.enqueue(["d0", "d1", "d2", "d3"], "g1", "[60, 0]", 2, False, 600, "")
        self.enqueue(["d3", "d4", "d5", "d6"], "", None, 1, False, -1, "t1")

    # --- the producer

    @rule(
        names=st.lists(DOCUMENT, min_size=1, max_size=5),
        group=st.sampled_from(["", *GROUPS]),
        intervals=st.sampled_from([None, "[0]", "[60]", "[60, 0]"]),
        retries=st.integers(1, 2),
        at_front=st.booleans(),
        failure_ttl=TTL,
        tenant=TENANT,
    )
    def enqueue(
        self,
        names: list[str],
        group: str,
        intervals: str | None,
        retries: int,
        at_front: bool,
        failure_ttl: int,
        tenant: str,
    ) -> None:
        options = EnqueueOptions(
            group_id=group,
            tenant=tenant,
            group_ttl=3600,
            result_ttl=3600,
            failure_ttl=failure_ttl,
            retries=None if intervals is None else retries,
            retry_intervals_json=intervals or "",
            retry_at_front=at_front,
        )
        jobs = [
            NewJob(
                job_id=name,
                data=payload.encode(str(request_of(name)).replace("'", '"').encode()),
                document_id=name,
                model=model_of(name),
                tokens=tokens_of(name),
                max_tokens=MAX_TOKENS,
                task=task_of(name),
            )
            for name in names
        ]
        outcomes = scripts.enqueue(self.redis, QUEUE, jobs, options)
        assert outcomes == [self._enqueued(name, group or LONE, options) for name in names]

    def _enqueued(self, name: str, holder: str, options: EnqueueOptions) -> int:
        document = self.documents[name]
        if holder != LONE:
            members = self.groups.setdefault(holder, [])
            members += [name] if name not in members else []
        if document.status == "finished" and holder == LONE:
            return 3  # nobody needs to hold what has ended
        if document.status in (*LIVE, "finished"):
            document.holders = [*(other for other in document.holders if other != holder), holder]
            document.grouped = True
            return 2 if document.status in LIVE else 3
        known = [] if document.status == "deleted" or not document.grouped else document.holders
        self.documents[name] = Document(
            status="queued",
            holders=[*(other for other in known if other != holder), holder],
            retries_left=options.retries or 0,
            intervals=[int(part) for part in options.retry_intervals_json.strip("[]").split(",") if part],
            failure_ttl=options.failure_ttl,
            strays=document.strays,
            tenant=options.tenant,
            place=options.tenant,
            tokens=tokens_of(name),
        )
        return 1

    @rule(index=INDEX)
    def enqueue_by_plain_rq(self, index: int) -> None:
        for name in self._chosen([index], "deleted"):
            document = self.documents[name]
            queue = Queue(QUEUE, connection=self.redis, serializer=OrjsonSerializer)
            queue.enqueue("ingestq.ingest", request_of(name), job_id=name, failure_ttl=600)
            self.documents[name] = Document(
                status="queued",
                holders=[LONE],
                failure_ttl=600,
                fresh=True,
                plain=True,
                grouped=False,
                strays=document.strays,
            )

    @rule(group=st.sampled_from(GROUPS))
    def cancel_group(self, group: str) -> None:
        members = self.groups.get(group, [])
        left = cancelled = terminal = 0
        for name in members:
            document = self.documents[name]
            if document.status not in LIVE:
                terminal += 1
            elif group in document.holders:
                document.holders.remove(group)
                left += bool(document.holders)
                if not document.holders:
                    cancelled += 1
                    document.strays |= document.status == "queued"
                    document.status, document.execution, document.ttl = "canceled", "", 600
        counts = scripts.cancel(self.redis, group, first=0, ttl=600)
        assert counts == (len(members), cancelled, left, terminal)

    # --- a worker

    @rule(max_in_flight=LIMIT, max_in_flight_fleet=LIMIT, max_kv_tokens=KV_LIMIT, max_kv_tokens_fleet=KV_LIMIT)
    def limit(self, **limits: int | None) -> None:
        self.limits = AdmissionLimits(**limits)
        write_limits(self.redis, QUEUE, self.limits)

    @rule(
        worker=WORKER,
        model=MODEL,
        want=WANT,
        fleet=st.sampled_from([0, 0, 3]),
        kv_tokens=st.sampled_from([0, 0, 40, 80]),
        kv_tokens_fleet=st.sampled_from([0, 0, 60]),
        prompt_tokens=st.sampled_from([None, None, 0, 30]),
    )
    def lease(
        self,
        worker: str,
        model: str,
        want: int,
        fleet: int,
        kv_tokens: int,
        kv_tokens_fleet: int,
        prompt_tokens: int | None,
    ) -> None:
        held = self.held(worker)
        room = min(IN_FLIGHT - len(held), want)
        if not room:
            return
        admission = Admission(
            documents=room,
            prompt_tokens=prompt_tokens,
            max_kv_tokens=kv_tokens,
            max_kv_tokens_fleet=kv_tokens_fleet,
            max_in_flight_fleet=fleet,
            block_size=BLOCK,
            expected_output=EXPECTED,
        )
        before = {tenant: self.redis.lrange(keys.queue(QUEUE, tenant), 0, -1) for tenant in ("", *TENANTS)}
        self.calls += 1
        reply = scripts.lease(
            self.redis,
            QUEUE,
            worker=worker,
            model=model,
            admission=admission,
            lease_ttl=60.0,
            call_id=f"{self.calls:014x}",
            company=CONTROLLER.company(self.documents[name].crashes for name in held),
            companies=CONTROLLER.companies,
        )
        places = {
            job.job_id: self.documents[job.job_id].place for job in reply.jobs if not self.documents[job.job_id].strays
        }
        for job in reply.jobs:
            self._leased(job, worker, model, admission)
        assert len(reply.jobs) <= room
        assert reply.limits == self.limits
        if reply.jobs:
            self._check_limits(worker, fleet)
            self._check_kv_limits(worker, admission, reply.jobs)
            self._check_prompt_tokens(admission, reply.jobs)
        for tenant, ids in before.items():
            order = [ids.index(job.job_id.encode()) for job in reply.jobs if places.get(job.job_id) == tenant]
            assert order == sorted(order), "leased in each list's order"
        if reply.gate == "open" and len(reply.jobs) < room:
            passed_over = [name for name, other in self.documents.items() if other.status == "queued"]
            assert all(model_of(name) != model or self.documents[name].plain for name in passed_over)
        if reply.unknown:
            needs = [
                JobNeeds(name, *needs_of(data), tokens_of(name), MAX_TOKENS, task_of(name))
                for name, data in dict(reply.unknown).items()  # a stray is another copy
            ]
            scripts.adopt(self.redis, QUEUE, needs)
            for name, *_ in needs:
                assert self.documents[name].plain
                self.documents[name].plain = False
                self.documents[name].tokens = tokens_of(name)

    def _leased(self, job: LeasedJob, worker: str, model: str, admission: Admission) -> None:
        document = self.documents[job.job_id]
        assert document.status == "queued"
        assert (job.tenant, job.task, job.max_tokens) == (document.tenant, task_of(job.job_id), MAX_TOKENS)
        assert job.tokens == document.tokens
        need, whole = need_of(job.job_id, document.tokens), min(self._kv_bounds(admission))
        if need <= whole:
            assert job.kv_tokens == need
        else:
            assert job.kv_tokens == 0 if document.exact else BLOCK <= job.kv_tokens <= min(need, whole)
        document.kv_tokens = job.kv_tokens
        assert model_of(job.job_id) == model
        if document.fresh:
            document.attempts = document.crashes = 0
        document.status, document.execution, document.fresh, document.ttl = "started", job.execution_id, False, -1
        document.attempts += 1
        assert (job.attempts, job.crashes, job.refused) == (document.attempts, document.crashes, "")
        self.leases.append((job, worker))

    def _check_limits(self, worker: str, fleet: int) -> None:
        held, running = self.held(worker), [name for each in WORKERS for name in self.held(each)]
        assert len(held) <= IN_FLIGHT
        assert len(held) <= CONTROLLER.company(self.documents[name].crashes for name in held) or not any(
            self.documents[name].crashes for name in held
        )
        assert self.limits.max_in_flight is None or len(held) <= self.limits.max_in_flight
        assert self.limits.max_in_flight_fleet is None or len(running) <= self.limits.max_in_flight_fleet
        assert fleet == 0 or len(running) <= fleet

    def _kv_bounds(self, admission: Admission) -> tuple[float, float]:
        """What the worker and what the fleet may have reserved."""
        own, fleet = self.limits.max_kv_tokens, self.limits.max_kv_tokens_fleet
        return (
            min(admission.max_kv_tokens or math.inf, math.inf if own is None else own),
            min(admission.max_kv_tokens_fleet or math.inf, math.inf if fleet is None else fleet),
        )

    def _check_kv_limits(self, worker: str, admission: Admission, jobs: Sequence[LeasedJob]) -> None:
        """What is beyond a whole limit is leased to be failed, whatever there is room for."""
        own, fleet = self._kv_bounds(admission)
        if any(job.kv_tokens for job in jobs):
            assert self._totals()[f"worker:{worker}"] <= own
            assert self._totals()[f"queue:{QUEUE}"] <= fleet

    @staticmethod
    def _check_prompt_tokens(admission: Admission, jobs: Sequence[LeasedJob]) -> None:
        if admission.prompt_tokens is not None and len(jobs) > 1:
            assert sum(job.tokens for job in jobs) <= max(admission.prompt_tokens, jobs[0].tokens)

    @rule(worker=WORKER, indices=INDICES, tokens=st.integers(1, 60), own=st.sampled_from([0, 60]))
    def reserve(self, worker: str, indices: list[int], tokens: int, own: int) -> None:
        """Of current leases, and of those that were lost or have ended."""
        jobs = self._pick(self._all(worker), indices)
        if not jobs:
            return
        admission = Admission(documents=0, max_kv_tokens=own)
        needs = [Need(job.member, tokens, MAX_TOKENS, need_of(job.job_id, tokens)) for job in jobs]
        answers = scripts.reserve(self.redis, QUEUE, worker=worker, admission=admission, needs=needs)
        for job, need, answer in zip(jobs, needs, answers, strict=True):
            document = self.documents[job.job_id]
            if document.execution != job.execution_id:
                assert answer == "lost"
                continue
            document.tokens, document.exact = tokens, True
            more = need.kv_tokens - document.kv_tokens
            rooms = [
                bound - self._totals()[field]
                for bound, field in zip(self._kv_bounds(admission), (f"worker:{worker}", f"queue:{QUEUE}"), strict=True)
            ]
            assert answer == ("granted" if more <= 0 or more <= min(rooms) else "denied")
            if answer == "granted":
                document.kv_tokens = need.kv_tokens

    @rule()
    def recount(self) -> None:
        held = self._totals()[f"queue:{QUEUE}"]
        self.leaked.clear()
        found = scripts.recount(self.redis, QUEUE)
        assert found.kv_tokens_held == held
        assert found.kv_tokens_counted == self._totals()[f"queue:{QUEUE}"]
        assert found.num_leases == len(self._in("started"))

    def _totals(self) -> Counter[str]:
        """What stands reserved by queue and worker."""
        totals = Counter(self.leaked)
        for worker in WORKERS:
            for job in self._current(worker):
                kv_tokens = self.documents[job.job_id].kv_tokens
                totals.update({f"queue:{QUEUE}": kv_tokens, f"worker:{worker}": kv_tokens})
        return totals

    @rule(worker=WORKER, model=MODEL, want=WANT, kind=KIND, ttl=TTL)
    def run(self, worker: str, model: str, want: int, kind: Any, ttl: int) -> None:
        self.lease(worker, model, want, 0, 0, 0, None)
        self.finish(worker, list(range(want)), False, kind, ttl)

    @rule(worker=WORKER, model=MODEL, want=WANT, crash=st.booleans())
    def end(self, worker: str, model: str, want: int, crash: bool) -> None:
        self.lease(worker, model, want, 0, 0, 0, None)
        self.hand_back_all_of_a_worker(worker, "right", crash)

    @rule(index=INDEX, indices=INDICES, late=st.booleans(), kind=KIND, ttl=TTL)
    def finish_some(self, index: int, indices: list[int], late: bool, kind: Any, ttl: int) -> None:
        if self.leases:
            self.finish(self.leases[-1 - index % len(self.leases)][1], indices, late, kind, ttl)

    def finish(self, worker: str, indices: list[int], late: bool, kind: Any, ttl: int) -> None:
        """Of current leases, and late: of those that were lost or have ended."""
        ends = self._pick(self._all(worker) if late else self._current(worker), indices)
        finishes = [
            Finish(job=job, kind=kind, ttl=ttl, result_json=b"{}", exception="" if kind == "S" else "EngineError: no")
            for job in ends
        ]
        if finishes:
            outcomes = scripts.finish(self.redis, QUEUE, worker=worker, model="m1", finishes=finishes)
            assert outcomes == [self._finished(job, kind, ttl, worker) for job in ends]

    def _finished(self, job: LeasedJob, kind: str, ttl: int, worker: str) -> str:
        document = self.documents[job.job_id]
        self.leftovers[worker].discard(job.member)
        if document.execution != job.execution_id:
            return "written" if document.written == job.execution_id else "fenced"
        document.execution = ""
        if kind == "F" and document.retries_left:
            left, number = document.retries_left, len(document.intervals)
            document.retries_left -= 1
            document.status = "scheduled" if document.intervals[max(number - left, 0)] else "queued"
            document.place = document.tenant
            return document.status
        document.status = {"S": "finished", "X": "stopped"}.get(kind, "failed")
        self._ended(job.job_id, ttl, job.execution_id)
        return {"S": "finished", "X": "stopped"}.get(kind, "failed")

    def _ended(self, name: str, ttl: int, written: str) -> None:
        document = self.documents[name]
        document.ttl, document.written, document.has_result = ttl, written, True
        if ttl == 0:
            self.documents[name] = Document(strays=document.strays)

    @rule(indices=INDICES, crash=st.booleans())
    def hand_back(self, indices: list[int], crash: bool) -> None:
        """By a worker that ends, or whose engine failed."""
        leases = self._pick([job for worker in WORKERS for job in self._all(worker)], indices)
        if leases:
            members = [job.member for job in leases]
            self._hand_back(leases, crash, members=members)

    @rule(worker=WORKER, incarnation=st.sampled_from(["right", "wrong"]), crash=st.booleans())
    def hand_back_all_of_a_worker(self, worker: str, incarnation: str, crash: bool) -> None:
        """By the guardian, or by the next worker of the name."""
        own = self.incarnations.get(worker)
        named = own if incarnation == "right" and own else "another"
        members = {raw.decode() for raw in self.redis.smembers(keys.worker_executions(worker))}
        theirs = [] if own and named != own else [job for job, _ in self.leases if job.member in members]
        self._hand_back(theirs, crash, worker=worker, incarnation=named)

    @rule(indices=INDICES)
    def hand_back_expired(self, indices: list[int]) -> None:
        leases = self._pick([job for worker in WORKERS for job in self._current(worker)], indices)
        if leases:
            self.redis.zadd(keys.started(QUEUE), {job.member: 1 for job in leases})
        self._hand_back(leases, True)

    def _hand_back(self, leases: Sequence[LeasedJob], crash: bool, **options: Any) -> None:
        returned = scripts.hand_back(
            self.redis, QUEUE, failure_ttl=600, max_crashes=MAX_CRASHES if crash else 0, reason="killed", **options
        )
        back, dead, lost = [], 0, 0
        for job in sorted(leases, key=lambda job: job.execution_id):
            document = self.documents[job.job_id]
            for leftovers in self.leftovers.values():
                leftovers.discard(job.member)
            if document.execution != job.execution_id:
                lost += 1
                continue
            document.execution = ""
            document.crashes += crash
            if document.crashes == MAX_CRASHES:
                dead += 1
                document.status = "failed"
                self._ended(job.job_id, document.failure_ttl, "")
            else:
                document.status, document.place = "queued", document.tenant
                document.attempts -= not crash
                back.append(job.job_id)
        assert (returned.queued, returned.dead_lettered, returned.lost) == (len(back), dead, lost)
        for tenant in ("", *TENANTS):
            expected = [name for name in back if self.documents[name].tenant == tenant]
            head = self.redis.lrange(keys.queue(QUEUE, tenant), 0, len(expected) - 1) if expected else []
            assert [name.decode() for name in head] == expected, "at the front, in the order of their leases"

    # --- guardian and housekeeper

    @rule(worker=WORKER, right=st.booleans())
    def renew(self, worker: str, right: bool) -> None:
        own = self.incarnations.get(worker)
        named = own if right and own else "another"
        expiries = self._expiries(worker)
        word = scripts.renew(
            self.redis, [QUEUE], worker=worker, incarnation=named, lease_ttl=90.0 + self.calls, worker_ttl=600
        )
        assert word == ("forgotten" if own is None else "known" if own == named else "replaced")
        if word == "replaced":
            assert self._expiries(worker) == expiries
        else:
            assert all(new > old for new, old in zip(self._expiries(worker), expiries, strict=True))
            self.leftovers[worker].clear()
        self.calls += 10

    def _expiries(self, worker: str) -> list[float]:
        members = [job.member for job in self._current(worker)]
        return [float(score) for score in self.redis.zmscore(keys.started(QUEUE), members)] if members else []

    @rule(worker=WORKER, knows_dead=st.booleans())
    def claim(self, worker: str, knows_dead: bool) -> None:
        self.calls += 1
        own, new = self.incarnations.get(worker), f"i{self.calls}"
        seconds = scripts.claim(
            self.redis,
            [QUEUE],
            worker=worker,
            incarnation=new,
            dead=own or "" if knows_dead else "",
            lease_ttl=60.0,
            worker_ttl=600,
            record={"birth": "2026-01-01T00:00:00.000000Z", "queues": QUEUE},
        )
        assert (seconds > 0) == (own is not None and worker not in self.dead and not knows_dead)
        if not seconds:
            self.incarnations[worker] = new
            self.dead.discard(worker)

    @rule(worker=WORKER, right=st.booleans())
    def sign_off(self, worker: str, right: bool) -> None:
        own = self.incarnations.get(worker)
        if self.held(worker):
            return  # what it held was handed back before
        scripts.sign_off(self.redis, [QUEUE], worker=worker, incarnation=own if right and own else "another")
        if own is None or right:
            self.leftovers[worker].clear()
            self.dead |= {worker} if own else set()

    @rule(indices=INDICES)
    def promote(self, indices: list[int]) -> None:
        due = self._chosen(indices, "scheduled")
        for name in due:
            self.redis.zadd(keys.scheduled(QUEUE), {name: 1})
            self.documents[name].status, self.documents[name].place = "queued", self.documents[name].tenant
        assert scripts.promote(self.redis, QUEUE) == len(due)

    # --- people

    @rule(index=INDEX)
    def requeue_by_rq(self, index: int) -> None:
        for name in self._chosen([index], *DEAD):
            document = self.documents[name]
            registry = FailedJobRegistry(QUEUE, connection=self.redis, serializer=OrjsonSerializer)
            registry.requeue(name)
            # RQ leaves the time that the dead letter was to be kept; the next lease takes it away.
            document.status, document.fresh, document.ttl, document.place = "queued", True, None, ""

    @rule(indices=INDICES, other=DOCUMENT)
    def retry(self, indices: list[int], other: str) -> None:
        names = list({*self._chosen(indices, *DEAD), other})
        self.calls += 1
        retried = scripts.retry(self.redis, QUEUE, names, stamp=f"2026-01-01T00:00:00.{self.calls:06}Z")
        assert retried == [self.documents[name].status in DEAD for name in names]
        for name, done in zip(names, retried, strict=True):
            if done:
                document = self.documents[name]
                document.status, document.fresh, document.ttl = "queued", True, -1
                document.place = document.tenant
                document.attempts = document.crashes = 0

    @rule(index=INDEX)
    def cancel_by_rq(self, index: int) -> None:
        for name in self._chosen([index], *LIVE):
            document = self.documents[name]
            Job.fetch(name, connection=self.redis, serializer=OrjsonSerializer).cancel()
            self._leave_over(name)
            document.strays |= self._is_out_of_reach(document)
            document.status, document.execution, document.ttl = "canceled", "", None

    @rule(index=INDEX)
    def delete_by_rq(self, index: int) -> None:
        for name in self._chosen([index], *LIVE, *DEAD, "finished", "canceled"):
            Job.fetch(name, connection=self.redis, serializer=OrjsonSerializer).delete()
            self._leave_over(name)
            document = self.documents[name]
            self.documents[name] = Document(strays=document.strays or self._is_out_of_reach(document))

    @staticmethod
    def _is_out_of_reach(document: Document) -> bool:
        """RQ takes a document out of the queue's own list only; the next lease drops it from another."""
        return document.status == "queued" and bool(document.place)

    def _leave_over(self, name: str) -> None:
        """RQ knows nothing of the set in which a worker's leases are, nor of what they reserve."""
        for job, worker in self.leases:
            if job.job_id == name and self.documents[name].execution == job.execution_id:
                self.leftovers[worker].add(job.member)
                kv_tokens = self.documents[name].kv_tokens
                self.leaked.update({f"queue:{QUEUE}": kv_tokens, f"worker:{worker}": kv_tokens})

    # --- what must hold

    @invariant()
    def every_document_is_where_its_status_says(self) -> None:
        with self.redis.pipeline() as pipeline:
            pipeline.time()
            for tenant in ("", *TENANTS):
                pipeline.lrange(keys.queue(QUEUE, tenant), 0, -1)
            pipeline.zrange(keys.started(QUEUE), 0, -1)
            pipeline.zrange(keys.scheduled(QUEUE), 0, -1)
            pipeline.zrange(keys.canceled(QUEUE), 0, -1)
            for registry in (keys.finished(QUEUE), keys.failed(QUEUE)):
                pipeline.zrange(registry, 0, -1, withscores=True)
            for name in self.documents:
                pipeline.hmget(keys.job(name), "status", "attempts", "crashes", "groups")
            (seconds, _), *places = pipeline.execute()
        *lists, started, scheduled, canceled = ([raw.decode() for raw in ids] for ids in places[:6])
        finished, failed = ([raw.decode() for raw, score in ids if score > seconds + 1] for ids in places[6:8])
        queued = [name for ids in lists for name in ids]
        for tenant, ids in zip(("", *TENANTS), lists, strict=True):
            assert {name for name in self._in("queued") if self.documents[name].place == tenant} <= set(ids)

        assert set(self._in("queued")) <= set(queued)
        assert {name for name in queued if not self.documents[name].strays} == {
            name for name in self._in("queued") if not self.documents[name].strays
        }
        assert all(number == 1 or self.documents[name].strays for name, number in Counter(queued).items())
        assert sorted(started) == sorted(f"{name}:{self.documents[name].execution}" for name in self._in("started"))
        assert sorted(scheduled) == self._in("scheduled")
        assert sorted(canceled) == self._in("canceled")
        assert sorted(finished) == self._in("finished")
        assert sorted(failed) == self._in(*DEAD)
        for (name, document), fields in zip(self.documents.items(), places[8:], strict=True):
            self._check_hash(name, document, [raw and raw.decode() for raw in fields])

    def _check_hash(self, name: str, document: Document, fields: Sequence[str | None]) -> None:
        status, attempts, crashes, groups = fields
        assert (status or "deleted") == document.status, name
        assert (int(attempts or 0), int(crashes or 0)) == (document.attempts, document.crashes), name
        if document.status != "deleted":
            assert (groups if groups is not None else LONE).split() == document.holders, name

    @invariant()
    def the_totals_are_what_the_leases_reserve(self) -> None:
        held = {field.decode(): int(total) for field, total in self.redis.hgetall(keys.kv_tokens()).items()}
        assert held == {field: total for field, total in self._totals().items() if total}

    @invariant()
    def every_tenant_with_a_backlog_takes_part(self) -> None:
        taking_part = {raw.decode() for raw in self.redis.zrange(keys.tenants(QUEUE), 0, -1)}
        assert {tenant for tenant in TENANTS if self.redis.llen(keys.queue(QUEUE, tenant))} <= taking_part

    @invariant()
    def no_key_is_without_its_owner_or_a_time(self) -> None:
        found = sorted(key.decode() for key in self.redis.keys("*"))
        with self.redis.pipeline() as pipeline:
            for key in found:
                pipeline.ttl(key)
            for worker in WORKERS:
                pipeline.smembers(keys.worker_executions(worker))
            replies = pipeline.execute()
        ttls = dict(zip(found, replies, strict=False))
        for worker, members in zip(WORKERS, replies[len(found) :], strict=True):
            current = {job.member for job in self._current(worker)}
            assert current <= {raw.decode() for raw in members} <= current | self.leftovers[worker]
        for key, ttl in ttls.items():
            assert self._is_owned(key, ttl), f"{key}, time to live {ttl}"

    def _is_owned(self, key: str, ttl: int) -> bool:
        _, kind, *rest = key.split(":")
        if kind in ("queue", "queues", "wip", "scheduled", "finished", "failed", "canceled", "workers"):
            return ttl == -1  # of the queue
        if kind == "ingest" and rest[0] in ("limits", "tenants", "kv_tokens"):
            return ttl == -1
        if kind in ("job", "results"):
            document = self.documents[rest[0]]
            if kind == "results" and document.status in LIVE:
                return document.has_result  # of the run before a requeue
            return document.status != "deleted" and (
                document.ttl is None or (0 < ttl <= document.ttl if document.ttl > 0 else ttl == -1)
            )
        # Leases (RQ's records of which outlive those that stock tools end), workers, groups, wake tokens.
        return kind in ("execution", "executions", "worker", "ingest") and ttl > 0

    # --- helpers

    def held(self, worker: str) -> list[str]:
        return [job.job_id for job in self._current(worker)]

    def _current(self, worker: str) -> list[LeasedJob]:
        return [
            job
            for job, leaser in self.leases
            if leaser == worker and self.documents[job.job_id].execution == job.execution_id
        ]

    def _in(self, *wanted: str) -> list[str]:
        return sorted(name for name, document in self.documents.items() if document.status in wanted)

    def _all(self, worker: str) -> list[LeasedJob]:
        return [job for job, leaser in self.leases if leaser == worker]

    def _chosen(self, indices: Sequence[int], *wanted: str) -> list[str]:
        names = self._in(*wanted)
        return list({names[index % len(names)]: None for index in indices}) if names else []

    @staticmethod
    def _pick(leases: Sequence[LeasedJob], indices: Sequence[int]) -> list[LeasedJob]:
        """The newest are the likeliest to be current."""
        picked = [leases[-1 - index % len(leases)] for index in indices] if leases else []
        return list({job.member: job for job in picked}.values())


@pytest.mark.timeout(300 * max(ROUNDS, 1))
def test_no_order_of_calls_loses_or_doubles_a_document(own: Redis) -> None:
    Scripts.redis = own
    run_state_machine_as_test(Scripts, settings=bounded(150, steps=50))


# --- order


@given(
    taken=st.lists(st.integers(1, 128), min_size=3, max_size=4), keep=st.sets(st.integers(0, 299)), crash=st.booleans()
)
@example(taken=[128, 128, 44], keep=set(), crash=False)
@example(taken=[127, 128, 45], keep={0, 128, 299}, crash=True)
@bounded(12)
def test_what_is_handed_back_keeps_its_order(own: Redis, taken: list[int], keep: set[int], crash: bool) -> None:
    """Over several calls of 128, by worker and by lease, with holes where documents were finished."""
    own.flushall()
    job_ids = put(own, [request(number) for number in range(300)])
    leased = [job for want in taken for job in _lease(own, "w", want)]
    done = [job for number, job in enumerate(leased) if number in keep]
    for start in range(0, len(done), 128):
        _finish(own, "w", done[start : start + 128])
    options = {"failure_ttl": 60, "max_crashes": MAX_CRASHES if crash else 0, "reason": "killed"}

    if crash and taken[0] % 2:
        own.zadd(keys.started(QUEUE), dict.fromkeys(own.zrange(keys.started(QUEUE), 0, -1), 1.0))
        returned = scripts.hand_back_all(own, QUEUE, **options)
    else:
        returned = scripts.hand_back_all(own, QUEUE, worker="w", incarnation="", **options)

    assert returned.queued == len(leased) - len(done)
    ended = {job.job_id for job in done}
    assert own.lrange(keys.queue(QUEUE), 0, -1) == [name.encode() for name in job_ids if name not in ended]


# --- poison


@given(
    seed=st.integers(0, 2**32),
    max_in_flight=st.integers(1, 40),
    max_crashes=st.integers(2, 5),
    number=st.integers(1, 60),
    num_workers=st.integers(1, 2),
    positions=st.lists(st.integers(0, 59), min_size=1, max_size=3),
)
@bounded(60)
def test_only_the_poison_is_dead_lettered(
    own: Redis,
    seed: int,
    max_in_flight: int,
    max_crashes: int,
    number: int,
    num_workers: int,
    positions: list[int],
) -> None:
    """A worker dies whenever a poison document is in its engine, beside whatever company it was admitted into."""
    own.flushall()
    job_ids = put(own, [request(i) for i in range(number)])
    poison = {job_ids[position % number] for position in positions}
    chance = Random(seed)
    bounds = DrainBounds(max_in_flight=max_in_flight, max_num_seqs=max_in_flight)
    controller = DrainController(bounds, companies=companies(max_in_flight, max_crashes))
    workers = ("a", "b")[:num_workers]
    in_engine: dict[str, list[LeasedJob]] = {worker: [] for worker in workers}

    for turn in range(20 * number + 200):
        if not own.llen(keys.queue(QUEUE)) and not any(in_engine.values()):
            break
        worker = workers[turn % len(workers)]
        held = in_engine[worker]
        held += _admitted(own, worker, controller, held)
        # The engine finishes some of them before it meets the poison, if there is any.
        done = [job for job in held if job.job_id not in poison and chance.random() < 0.5]
        _finish(own, worker, done)
        held[:] = [job for job in held if job not in done]
        if any(job.job_id in poison for job in held):
            scripts.hand_back_all(
                own, QUEUE, worker=worker, incarnation="", failure_ttl=60, max_crashes=max_crashes, reason="killed"
            )
            held.clear()

    assert {name for name, status in zip(job_ids, statuses(own, job_ids), strict=True) if status == "failed"} == poison
    assert set(statuses(own, job_ids)) <= {"finished", "failed"}
    assert {own.hget(keys.job(name), "crashes") for name in poison} == {str(max_crashes).encode()}


def _admitted(redis: Redis, worker: str, controller: DrainController, held: Sequence[LeasedJob]) -> list[LeasedJob]:
    """As the courier leases: what there is room for, in one call."""
    want = controller.bounds.max_in_flight - len(held)
    company = controller.company(job.crashes for job in held)
    return _lease(redis, worker, want, company=company, companies=controller.companies) if want else []


def _lease(redis: Redis, worker: str, want: int, **options: Any) -> list[LeasedJob]:
    call_id = secrets.token_hex(7)
    return scripts.lease(
        redis,
        QUEUE,
        worker=worker,
        model="sim",
        admission=Admission(documents=want),
        lease_ttl=60,
        call_id=call_id,
        **options,
    ).jobs


def _finish(redis: Redis, worker: str, jobs: Sequence[LeasedJob]) -> None:
    finishes = [Finish(job=job, kind="S", ttl=600, result_json=b"{}") for job in jobs]
    if finishes:
        assert set(scripts.finish(redis, QUEUE, worker=worker, model="sim", finishes=finishes)) == {"finished"}


# --- what people ask for


@pytest.mark.parametrize("by", ["rq requeue", "ingestq failed retry"])
def test_a_requeued_document_has_all_its_attempts_again(own: Redis, by: str) -> None:
    own.flushall()
    (name,) = put(own, [request(0)])
    for _ in range(MAX_CRASHES):
        _lease(own, "w", 1)
        scripts.hand_back_all(own, QUEUE, worker="w", incarnation="", failure_ttl=60, max_crashes=MAX_CRASHES)
    assert own.hmget(keys.job(name), "status", "attempts", "crashes") == [b"failed", b"3", b"3"]

    if by == "rq requeue":
        FailedJobRegistry(QUEUE, connection=own, serializer=OrjsonSerializer).requeue(name)
    else:
        assert scripts.retry(own, QUEUE, [name], stamp=scripts.now_iso()) == [True]

    (job,) = _lease(own, "w", 1, companies=CONTROLLER.companies)
    assert (job.attempts, job.crashes) == (1, 0)
    assert own.ttl(keys.job(name)) == -1, "it does not go while it runs"
