"""What `ingestq why` concludes from what it read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from ingestq.common.limits import AdmissionLimits
from ingestq.common.machine_health import MachineHealth
from ingestq.common.schema import IngestResult, Status
from ingestq.common.worker_load import WorkerLoad
from ingestq.producer.fleet import Backlog, Fleet, Held
from ingestq.producer.waiting import Lease, Snapshot, Waiting
from ingestq.producer.why import Answer, Reason, explain
from support.live_workers import card, closed, load

NOW = 1_000_000.0
JOB = Waiting(job_id="j", document_id="a-17", status="queued", queue="ingest", model="m", tokens=1000, max_tokens=24)
QUIET = load(in_flight=0, num_running=0, num_ready=0, kv_tokens=0, max_kv_tokens=0, documents_per_s=0.0)
FLEET = Fleet(
    queue="ingest",
    now=NOW,
    suspended=False,
    backlogs={"": Backlog(queued=1)},
    limits=AdmissionLimits(),
    held=Held(),
    workers={"w1": Held()},
    cards={"w1": card(block_size=16)},
    loads={"w1": QUIET},
    machines={},
)


def answer(*, position: int | None = 0, fleet: Mapping[str, Any] = {}, **job: Any) -> Answer:
    snapshot = Snapshot(job=replace(JOB, **job), fleet=replace(FLEET, **fleet), position=position, first="first")
    return explain(snapshot)


def told(given: Answer) -> str:
    return "\n".join((given.why, *given.details))


def test_a_document_that_nothing_holds_back_is_next() -> None:
    assert answer() == Answer(
        reason=Reason.NEXT, why="nothing holds it back: it is next in line, and 1 live worker could take it"
    )


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"status": Status.SUCCEEDED, "worker": "w1"}, "it succeeded on w1"),
        (
            {"status": Status.FAILED, "worker": "w1", "error_class": "PromptTooLong", "error_message": "too long"},
            "it failed on w1: PromptTooLong: too long",
        ),
        ({"status": Status.CANCELLED}, "it was cancelled"),
    ],
)
def test_an_ended_document_says_how(row: dict[str, Any], why: str) -> None:
    job = replace(JOB, status="finished")
    result = IngestResult(document_id="a-17", job_id="j", **row)

    assert explain(Snapshot(job=job, fleet=FLEET, row=result)) == Answer(reason=Reason.ENDED, why=why)


def running(lease: Lease | None) -> Answer:
    return explain(Snapshot(job=replace(JOB, status="started"), fleet=FLEET, lease=lease))


def test_a_running_document_says_where_and_for_how_long() -> None:
    given = running(Lease(worker="w1", since=NOW - 90, until=NOW + 30))

    assert (given.reason, given.why) == (Reason.RUNNING, "worker w1 has it, for 90 s")
    assert given.details == ("w1: 0 documents in the engine, 0 ready for it",)


def test_a_lease_that_has_ended_is_about_to_be_taken_over() -> None:
    given = running(Lease(worker="gone", since=NOW - 90, until=NOW - 5))

    assert given.reason is Reason.RUNNING
    assert "that worker was lost, and its lease ended 5 s ago: the next one takes over" in given.why


def test_a_running_document_without_a_lease_is_nowhere() -> None:
    assert running(None).reason is Reason.NOWHERE


@pytest.mark.parametrize(("due", "when"), [(NOW + 120, "in 2 min"), (NOW - 1, "now")])
def test_a_scheduled_document_says_until_when(due: float, when: str) -> None:
    given = explain(Snapshot(job=replace(JOB, status="scheduled"), fleet=FLEET, scheduled_for=due))

    assert given.reason is Reason.SCHEDULED
    assert f"due {when}" in given.why


@pytest.mark.parametrize("status", ["queued", "deferred", "created"])
def test_a_document_that_is_in_no_list_is_nowhere(status: str) -> None:
    assert answer(position=None, status=status).reason is Reason.NOWHERE


def test_a_suspended_queue_comes_first() -> None:
    assert answer(fleet={"suspended": True, "cards": {}}, position=7).reason is Reason.SUSPENDED


def test_a_newer_document_waits_for_a_newer_worker() -> None:
    given = answer(schema=2)

    assert given.reason is Reason.NEWER_WORKER
    assert "its schema version is 2, this release reads 1" in given.why


def test_a_model_that_nobody_serves_is_named_with_those_that_are() -> None:
    given = answer(model="other")

    assert (given.reason, given.why) == (Reason.NO_WORKER, "no live worker of queue ingest serves other")
    assert given.details == ("served are: m",)


def test_without_any_worker_it_says_so() -> None:
    assert answer(fleet={"cards": {}}).why == "no live worker of queue ingest"


@pytest.mark.parametrize("model", [None, "*"])
def test_a_job_whose_model_is_not_known_is_for_any_worker(model: str | None) -> None:
    assert answer(model=model).reason is Reason.NEXT


def test_a_machine_that_takes_no_work_is_named_with_its_reason_and_the_way_out() -> None:
    health = MachineHealth(start_failures=5, reason="out of HBM")
    given = answer(fleet={"cards": {}, "machines": {"vm-1": health}})

    assert given.reason is Reason.MACHINE
    assert "`ingestq forgive vm-1`" in given.why
    assert "machine vm-1 takes no work after 5 failures in a row, the last: out of HBM" in given.details


def test_a_machine_that_backs_off_is_mentioned() -> None:
    given = answer(fleet={"cards": {}, "machines": {"vm-1": MachineHealth(run_failures=1, reason="broken")}})

    assert given.reason is Reason.NO_WORKER
    assert "machine vm-1 backs off between starts after 1 failures in a row, the last: broken" in given.details


def test_a_document_that_lost_workers_waits_for_few_enough_in_flight() -> None:
    given = answer(crashes=2, fleet={"workers": {"w1": Held(documents=96)}})

    assert given.reason is Reason.COMPANY
    assert told(given) == (
        "2 workers were lost while it was held: it runs in ever smaller company, and waits for a worker with few "
        "enough documents in flight\nin flight: w1=96"
    )
    assert answer(crashes=2).reason is Reason.NEXT  # on an idle worker


# --- KV tokens

FULL = {"limits": AdmissionLimits(max_kv_tokens_fleet=8192), "held": Held(documents=7, kv_tokens=8000)}


def test_a_blocked_document_says_what_it_needs_against_which_limit_and_since_when() -> None:
    given = answer(fleet=FULL, blocked=NOW - 20, passed=100)

    assert given.reason is Reason.KV
    assert given.why == (
        "it needs room for 1,024 KV tokens at most (1,000 of prompt, 24 of output) and has not fitted for 20 s"
    )
    assert given.details == (
        "the fleet: 8,000 of 8,192 KV tokens are reserved (max_kv_tokens_fleet)",
        "28 behind it may pass, for 40 s more",
    )


def test_after_a_minute_nothing_passes_it_and_a_worker_makes_room() -> None:
    given = answer(fleet=FULL, blocked=NOW - 61, held_for="w1", held_until=NOW + 1)

    assert "it is passed no more" in given.details
    assert "worker w1 takes nothing else until it has room for it" in given.details
    assert "worker w1" not in told(answer(fleet=FULL, blocked=NOW - 61, held_for="w1", held_until=NOW - 1))


def test_after_128_have_passed_nothing_passes_it() -> None:
    assert "it is passed no more" in answer(fleet=FULL, blocked=NOW - 1, passed=128).details


def test_the_need_is_in_whole_blocks() -> None:
    assert "1,040 KV tokens" in answer(fleet=FULL, tokens=1001).why


def test_a_first_document_without_room_on_any_worker_is_told_of_each() -> None:
    limits = AdmissionLimits(max_kv_tokens=5000)
    given = answer(fleet={"limits": limits, "workers": {"w1": Held(documents=4, kv_tokens=4096)}})

    assert given.reason is Reason.KV
    assert given.details == ("w1: 4,096 of 5,000 KV tokens are reserved (max_kv_tokens)",)


def test_the_lower_of_a_workers_own_limit_and_the_queues_holds() -> None:
    own: WorkerLoad = load(max_kv_tokens=4500)
    fleet = {"loads": {"w1": own}, "workers": {"w1": Held(documents=4, kv_tokens=4096)}}

    assert "of 4,500 KV tokens" in told(answer(fleet=fleet))
    assert "of 4,200 KV tokens" in told(answer(fleet={**fleet, "limits": AdmissionLimits(max_kv_tokens=4200)}))


def test_room_on_one_worker_is_enough() -> None:
    fleet = {
        "limits": AdmissionLimits(max_kv_tokens=5000),
        "cards": {"w1": card(), "w2": card()},
        "workers": {"w1": Held(documents=4, kv_tokens=4096), "w2": Held()},
    }
    assert answer(fleet=fleet).reason is Reason.NEXT


def test_a_document_that_may_be_too_large_is_told_what_will_become_of_it() -> None:
    given = answer(fleet={"limits": AdmissionLimits(max_kv_tokens_fleet=512)})

    assert given.reason is Reason.NEXT  # its tokens are to be counted
    assert given.details == (
        "the fleet: max_kv_tokens_fleet is 512, and it may need 1,024 by itself: the worker that counts its tokens "
        "fails it if it does",
    )


def test_a_document_that_may_be_too_large_needs_some_room_all_the_same() -> None:
    full = {"limits": AdmissionLimits(max_kv_tokens_fleet=512), "held": Held(documents=1, kv_tokens=500)}

    assert answer(fleet=full).reason is Reason.KV


# --- others before it


def test_documents_before_it_are_counted_and_the_first_is_named() -> None:
    given = answer(position=1203, fleet={"loads": {"w1": load(documents_per_s=10.0)}})

    assert (given.reason, given.why) == (Reason.BEHIND, "1,203 documents are before it in the queue")
    assert given.details == ("about 2 min at 10 documents/s", "the first of them: `ingestq why first`")


def test_documents_of_other_models_do_not_count() -> None:
    behind = Snapshot(job=JOB, fleet=FLEET, position=5, num_others=3, first="first")
    passed_over = Snapshot(job=JOB, fleet=FLEET, position=3, num_others=3)

    assert explain(behind).why == "2 documents are before it in the queue"
    assert "3 more before it are for workers of other models" in explain(behind).details
    assert explain(passed_over).reason is Reason.NEXT


def test_tenants_shares_are_told() -> None:
    backlogs = {
        "": Backlog(),
        "acme": Backlog(queued=10, tokens_served=5000),
        "beta": Backlog(queued=1, tokens_served=2000),
    }
    given = answer(position=4, tenant="acme", fleet={"backlogs": backlogs, "loads": {"w1": load(documents_per_s=10.0)}})

    assert given.why == "4 documents are before it in the list of tenant acme"
    assert given.details[:3] == (
        "2 tenants take turns by tokens, each gets 1/2 of them",
        "next is tenant beta, served 3,000 tokens less",
        "about 800 ms at 5 documents/s",
    )
    assert "next is tenant beta" in told(answer(tenant="acme", fleet={"backlogs": backlogs}))


# --- gates


def test_a_limit_of_the_fleet_that_is_reached_is_a_closed_gate() -> None:
    given = answer(fleet={"limits": AdmissionLimits(max_in_flight_fleet=7), "held": Held(documents=7)})

    assert (given.reason, given.why) == (
        Reason.GATES,
        "7 documents are in flight, max_in_flight_fleet is 7",
    )


def test_gates_that_are_closed_on_every_worker_are_told_one_by_one() -> None:
    fleet = {
        "cards": {"w1": card(), "w2": card()},
        "loads": {"w1": closed("prefill", "too much waits"), "w2": closed("in_flight", "8 of 8")},
    }
    given = answer(fleet=fleet)

    assert given.reason is Reason.GATES
    assert given.details == ("w1, prefill: too much waits", "w2, in_flight: 8 of 8")


@pytest.mark.parametrize("other", [{"w2": QUIET}, {}], ids=["open", "silent"])
def test_a_worker_that_is_open_or_says_nothing_may_take_it(other: dict[str, WorkerLoad]) -> None:
    fleet = {"cards": {"w1": card(), "w2": card()}, "loads": {"w1": closed("prefill", "too much waits"), **other}}

    assert answer(fleet=fleet).reason is Reason.NEXT


def test_gates_of_workers_that_serve_other_models_do_not_matter() -> None:
    fleet = {
        "cards": {"w1": card(), "w2": card(model="other")},
        "loads": {"w1": QUIET, "w2": closed("prefill", "too much waits")},
    }
    assert answer(fleet=fleet).details == ()
