"""What a document waits for: `explain` decides from what waiting.py read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..common.schema import SCHEMA_VERSION
from ..common.scripts import MAX_PASSES, PASS_TIMEOUT
from .fleet import Backlog, Fleet, Held
from .kv_room import need_of, shortages, too_large
from .units import duration, rounded
from .waiting import Snapshot, Waiting


class Reason(StrEnum):
    """What it is that a document waits for."""

    # Nothing: it has ended, and this is how.
    ENDED = "ended"
    # Nothing: a worker has it.
    RUNNING = "running"
    # The time of its next attempt.
    SCHEDULED = "scheduled"
    # Somebody: it is in none of the places from which a worker would take it.
    NOWHERE = "nowhere"
    # `rq resume`.
    SUSPENDED = "suspended"
    # A worker of a newer release.
    NEWER_WORKER = "newer_worker"
    # A machine whose engine failed so often that it takes no work.
    MACHINE = "machine"
    # A worker that serves its model.
    NO_WORKER = "no_worker"
    # A worker with few documents in flight, as it lost workers before.
    COMPANY = "company"
    # Room for its KV tokens.
    KV = "kv"
    # Documents before it.
    BEHIND = "behind"
    # A gate to open: of the queue, or on a worker.
    GATES = "gates"
    # The next look of a worker: it is next in line.
    NEXT = "next"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    reason: Reason
    # One sentence.
    why: str
    # Further ones.
    details: tuple[str, ...] = ()


def explain(snapshot: Snapshot) -> Answer:
    """The first of the reasons for which a document isn't done, in the order in which they matter."""
    for rule in _RULES:
        if answer := rule(snapshot):
            return answer
    return _next(snapshot)


def _ended(snapshot: Snapshot) -> Answer | None:
    row = snapshot.row
    if row is None:
        return None
    why = f"it {_ENDS[row.status]}"
    if row.worker:
        why += f" on {row.worker}"
    if row.error_class and row.error_message:
        why += f": {row.error_class}: {row.error_message}"
    return Answer(reason=Reason.ENDED, why=why)


_ENDS = {
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "was cancelled",
    "stopped": "was stopped",
    "expired": "ended, and its row has expired",
}


def _running(snapshot: Snapshot) -> Answer | None:
    job, lease, now = snapshot.job, snapshot.lease, snapshot.fleet.now
    if job.status != "started":
        return None
    if lease is None:
        why = "it was started, and no worker has a lease on it: other tools removed that"
        return Answer(reason=Reason.NOWHERE, why=why, details=(_AGAIN,))
    since = "" if lease.since is None else f", for {duration(max(0.0, now - lease.since))}"
    why = f"worker {lease.worker} has it{since}"
    if lease.until < now:
        why += f"; that worker was lost, and its lease ended {duration(now - lease.until)} ago: the next one takes over"
    load = snapshot.fleet.loads.get(lease.worker)
    if load is None:
        return Answer(reason=Reason.RUNNING, why=why)
    told = f"{lease.worker}: {load.num_running} documents in the engine, {load.num_ready} ready for it"
    return Answer(reason=Reason.RUNNING, why=why, details=(told,))


_AGAIN = "delete the job (rq's Job.delete) and enqueue the document again"


def _scheduled(snapshot: Snapshot) -> Answer | None:
    if snapshot.job.status != "scheduled":
        return None
    if snapshot.scheduled_for is None:
        why = "it was scheduled, and nothing says for when: other tools removed that"
        return Answer(reason=Reason.NOWHERE, why=why, details=(_AGAIN,))
    left = snapshot.scheduled_for - snapshot.fleet.now
    when = f"in {duration(left)}" if left > 0 else "now: a live worker will put it into the queue"
    return Answer(reason=Reason.SCHEDULED, why=f"its next attempt is due {when}")


def _nowhere(snapshot: Snapshot) -> Answer | None:
    job = snapshot.job
    if job.status == "queued" and snapshot.position is not None:
        return None
    where = "it is queued, and not in its list" if job.status == "queued" else f"RQ calls it {job.status!r}"
    return Answer(reason=Reason.NOWHERE, why=f"{where}: no worker will find it there", details=(_AGAIN,))


def _suspended(snapshot: Snapshot) -> Answer | None:
    if not snapshot.fleet.suspended:
        return None
    return Answer(reason=Reason.SUSPENDED, why="`rq suspend` is in force: nothing is taken until `rq resume`")


def _newer_worker(snapshot: Snapshot) -> Answer | None:
    schema = snapshot.job.schema
    if schema <= SCHEMA_VERSION:
        return None
    why = f"its schema version is {schema}, this release reads {SCHEMA_VERSION}: it waits for a worker of a newer one"
    return Answer(reason=Reason.NEWER_WORKER, why=why)


def _no_worker(snapshot: Snapshot) -> Answer | None:
    if snapshot.candidates:
        return None
    fleet, model = snapshot.fleet, snapshot.job.model
    refusing = {name: health for name, health in fleet.machines.items() if health.refuses}
    served = sorted({card.model for card in fleet.cards.values()})
    no_worker = f"no live worker of queue {fleet.queue}" + (f" serves {model}" if served else "")
    details = [f"served are: {', '.join(served)}"] if served else []
    for name, health in sorted(fleet.machines.items()):
        failures = health.start_failures + health.run_failures
        told = "takes no work" if health.refuses else "backs off between starts"
        details.append(f"machine {name} {told} after {failures} failures in a row, the last: {health.reason}")
    if not refusing:
        return Answer(reason=Reason.NO_WORKER, why=no_worker, details=tuple(details))
    mend = "; ".join(f"`ingestq forgive {name}`" for name in sorted(refusing))
    number = "a machine takes" if len(refusing) == 1 else f"{len(refusing)} machines take"
    why = f"{no_worker}, and {number} no work: mend, then {mend}"
    return Answer(reason=Reason.MACHINE, why=why, details=tuple(details))


def _company(snapshot: Snapshot) -> Answer | None:
    job, fleet = snapshot.job, snapshot.fleet
    busy = {name: fleet.workers.get(name, Held()).documents for name in snapshot.candidates}
    if not job.crashes or snapshot.num_before or not all(busy.values()):
        return None
    lost = "a worker was" if job.crashes == 1 else f"{job.crashes} workers were"
    why = (
        f"{lost} lost while it was held: it runs in ever smaller company, and waits for a worker with few enough "
        f"documents in flight"
    )
    told = ", ".join(f"{name}={documents:,}" for name, documents in busy.items())
    return Answer(reason=Reason.COMPANY, why=why, details=(f"in flight: {told}",))


def _kv(snapshot: Snapshot) -> Answer | None:
    """It doesn't fit: the lease script said so, or it is first and there is room nowhere."""
    job, now = snapshot.job, snapshot.fleet.now
    short = list(shortages(snapshot))
    is_short = any(not name for name, _ in short) or {name for name, _ in short} >= set(snapshot.candidates)
    if job.blocked is None and (snapshot.num_before or not is_short):
        return None
    need = need_of(snapshot)
    why = f"it needs room for {need:,} KV tokens at most ({job.tokens:,} of prompt, {job.max_tokens:,} of output)"
    details = [told for _, told in short]
    if job.blocked is not None:
        why += f" and has not fitted for {duration(max(0.0, now - job.blocked))}"
        details.append(_passing(job, now))
    if job.held_for and job.held_until > now:
        details.append(f"worker {job.held_for} takes nothing else until it has room for it")
    return Answer(reason=Reason.KV, why=why, details=(*details, *too_large(snapshot)))


def _passing(job: Waiting, now: float) -> str:
    """Whether those behind a document that doesn't fit may still pass it."""
    left = (job.blocked or now) + PASS_TIMEOUT - now
    passes = MAX_PASSES - job.passed
    if left <= 0 or passes <= 0:
        return "it is passed no more"
    return f"{passes} behind it may pass, for {duration(left)} more"


def _behind(snapshot: Snapshot) -> Answer | None:
    job, fleet, before = snapshot.job, snapshot.fleet, snapshot.num_before
    if not before:
        return None
    documents = "1 document is" if before == 1 else f"{before:,} documents are"
    tenants = _backlogged(fleet)
    details = list(_turns(tenants, job.tenant))
    if fleet.documents_per_s > 0:
        rate = fleet.documents_per_s / max(1, len(tenants))
        details.append(f"about {duration(before / rate)} at {rounded(rate)} documents/s")
    if snapshot.first:
        details.append(f"the first of them: `ingestq why {snapshot.first}`")
    details += [*_others(snapshot), *too_large(snapshot), *_closed(snapshot)]
    why = f"{documents} before it in {_list_of(job, len(tenants))}"
    return Answer(reason=Reason.BEHIND, why=why, details=tuple(details))


def _list_of(job: Waiting, num_tenants: int) -> str:
    if job.tenant:
        return f"the list of tenant {job.tenant}"
    return "the list of those without a tenant" if num_tenants > 1 else "the queue"


def _others(snapshot: Snapshot) -> Iterator[str]:
    if snapshot.num_others:
        yield f"{snapshot.num_others} more before it are for workers of other models"


def _backlogged(fleet: Fleet) -> dict[str, Backlog]:
    return {name: backlog for name, backlog in fleet.backlogs.items() if backlog.queued}


def _turns(tenants: dict[str, Backlog], tenant: str) -> Iterator[str]:
    """How tenants share, where several wait."""
    if len(tenants) < 2 or tenant not in tenants:
        return
    yield f"{len(tenants)} tenants take turns by tokens, each gets 1/{len(tenants)} of them"
    least = min(tenants, key=lambda name: tenants[name].tokens_served)
    ahead = tenants[tenant].tokens_served - tenants[least].tokens_served
    if ahead > 0:
        named = f"tenant {least}" if least else "who has no tenant"
        yield f"next is {named}, served {ahead:,.0f} tokens less"


def _gates(snapshot: Snapshot) -> Answer | None:
    fleet = snapshot.fleet
    if fleet.closed:
        why = "; ".join(closed.why for closed in fleet.closed)
        return Answer(reason=Reason.GATES, why=why, details=tuple(_closed(snapshot)))
    if not all(name in fleet.loads and fleet.loads[name].closed for name in snapshot.candidates):
        return None
    why = "every live worker that could take it has a gate closed"
    return Answer(reason=Reason.GATES, why=why, details=tuple(_closed(snapshot)))


def _closed(snapshot: Snapshot) -> Iterator[str]:
    for name in snapshot.candidates:
        load = snapshot.fleet.loads.get(name)
        for closed in load.closed if load else ():
            yield f"{name}, {closed.gate}: {closed.why}"


def _next(snapshot: Snapshot) -> Answer:
    tenants = _backlogged(snapshot.fleet)
    details = (
        *_turns(tenants, snapshot.job.tenant),
        *_others(snapshot),
        *too_large(snapshot),
        *_closed(snapshot),
    )
    number = len(snapshot.candidates)
    could = "1 live worker could take it" if number == 1 else f"{number} live workers could take it"
    return Answer(reason=Reason.NEXT, why=f"nothing holds it back: it is next in line, and {could}", details=details)


_RULES: tuple[Callable[[Snapshot], Answer | None], ...] = (
    _ended,
    _running,
    _scheduled,
    _nowhere,
    _suspended,
    _newer_worker,
    _no_worker,
    _company,
    _kv,
    _behind,
    _gates,
)
