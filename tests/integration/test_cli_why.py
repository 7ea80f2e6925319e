"""`ingestq why` as people use it: a document in each of the states in which it may wait."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import publish
from ingestq.common.limits import AdmissionLimits, write_limits
from ingestq.common.machine_health import record_failure
from ingestq.common.payload import FUNCTION_NAME
from ingestq.common.worker_load import publish_load
from ingestq.producer import IngestQueue
from support import processes
from support.hand_worker import finish, lease, request
from support.live_workers import card, closed, load

Why = Callable[..., dict[str, Any]]


@pytest.fixture
def run(server: EmbeddedServer, redis: Redis) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *arguments: processes.run("ingestq", "why", *arguments, url=server.url, timeout=60)


@pytest.fixture
def why(run: Callable[..., subprocess.CompletedProcess[str]]) -> Why:
    def ask(job_id: str) -> dict[str, Any]:
        done = run(job_id, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        answer: dict[str, Any] = orjson.loads(done.stdout)
        return answer

    return ask


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis)


@pytest.fixture
def worker(redis: Redis) -> None:
    """A live worker that could take anything."""
    publish(redis, "ingest", "w1", card())


def enqueue(queue: IngestQueue, *names: str, **options: Any) -> list[str]:
    return [queue.enqueue(request(name), **options).job_id for name in names]


def test_an_unknown_job_is_exit_code_5(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("nothing")

    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.splitlines() == [
        "ingestq: job 'nothing' is not in Redis: it was never enqueued, was deleted, or has expired"
    ]


def test_a_job_id_that_is_not_utf8_is_wrong_usage(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("a\udcff")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["ingestq: 'rq:job:a\\udcff' is not UTF-8"]


@pytest.mark.usefixtures("worker")
def test_the_next_in_line_waits_for_nothing(why: Why, queue: IngestQueue) -> None:
    [job_id] = enqueue(queue, "a")

    assert why(job_id) == {
        "job_id": job_id,
        "document_id": "a",
        "queue": "ingest",
        "tenant": "",
        "status": "queued",
        "waits_for": "next",
        "why": "nothing holds it back: it is next in line, and 1 live worker could take it",
        "details": [],
    }


@pytest.mark.usefixtures("worker")
def test_people_get_lines_of_their_terminals_width(
    run: Callable[..., subprocess.CompletedProcess[str]], queue: IngestQueue
) -> None:
    first, second = enqueue(queue, "a", "b")

    lines = run(second).stdout.splitlines()
    assert lines[0].startswith("b: queued in ingest, enqueued ")
    assert lines[1:] == ["behind: 1 document is before it in the queue", f"  the first of them: `ingestq why {first}`"]


def test_a_document_without_a_worker_says_so(why: Why, queue: IngestQueue, redis: Redis) -> None:
    [job_id] = enqueue(queue, "a")
    assert why(job_id)["waits_for"] == "no_worker"

    publish(redis, "ingest", "w1", card(model="other"))
    assert why(job_id)["why"] == "no live worker of queue ingest serves m"

    for _ in range(5):
        record_failure(redis, "ingest", "vm-1", "start", "out of HBM", max_failures=5)
    assert why(job_id)["waits_for"] == "machine"


@pytest.mark.usefixtures("worker")
def test_a_running_document_names_its_worker(why: Why, queue: IngestQueue, redis: Redis) -> None:
    [job_id] = enqueue(queue, "a")
    lease(redis)

    answer = why(job_id)
    assert answer["waits_for"] == "running"
    assert answer["why"].startswith("worker hand has it, for ")


@pytest.mark.parametrize(("kind", "how"), [("S", "it succeeded"), ("P", "it failed: EngineError: broken")])
def test_an_ended_document_says_how(why: Why, queue: IngestQueue, redis: Redis, kind: Any, how: str) -> None:
    [job_id] = enqueue(queue, "a")
    finish(redis, lease(redis), kind)

    answer = why(job_id)
    assert (answer["waits_for"], answer["why"]) == ("ended", how)


def test_a_scheduled_attempt_says_for_when(why: Why, queue: IngestQueue, redis: Redis) -> None:
    from rq import Retry

    job_id = queue.enqueue(request("a"), retry=Retry(max=1, interval=600)).job_id
    finish(redis, lease(redis), "F")

    answer = why(job_id)
    assert answer["waits_for"] == "scheduled"
    assert answer["why"].startswith("its next attempt is due in ")


@pytest.mark.usefixtures("worker")
def test_a_suspended_queue_holds_everything(why: Why, queue: IngestQueue, redis: Redis) -> None:
    [job_id] = enqueue(queue, "a")
    redis.set(keys.suspended(), "1")

    assert why(job_id)["waits_for"] == "suspended"


@pytest.mark.usefixtures("worker")
def test_a_newer_document_waits_for_a_newer_worker(why: Why, queue: IngestQueue, redis: Redis) -> None:
    [job_id] = enqueue(queue, "a")
    redis.hset(keys.job(job_id), "schema", 2)

    assert why(job_id)["waits_for"] == "newer_worker"


@pytest.mark.usefixtures("worker")
def test_the_list_of_its_own_tenant_is_what_counts(why: Why, queue: IngestQueue) -> None:
    enqueue(queue, "a", "b", "c")
    _, last = enqueue(queue, "d", "e", tenant="acme")

    answer = why(last)
    assert (answer["waits_for"], answer["tenant"]) == ("behind", "acme")
    assert answer["why"] == "1 document is before it in the list of tenant acme"
    assert answer["details"][0] == "2 tenants take turns by tokens, each gets 1/2 of them"


@pytest.mark.usefixtures("worker")
def test_a_document_that_does_not_fit_names_its_need_and_the_limit(why: Why, queue: IngestQueue, redis: Redis) -> None:
    enqueue(queue, "a")
    [held] = lease(redis)
    [job_id] = enqueue(queue, "b")
    write_limits(redis, "ingest", AdmissionLimits(max_kv_tokens_fleet=held.kv_tokens + 1))
    assert lease(redis) == []

    answer = why(job_id)
    assert answer["waits_for"] == "kv"
    assert " of output) and has not fitted for " in answer["why"]
    assert answer["details"][0] == (
        f"the fleet: {held.kv_tokens} of {held.kv_tokens + 1} KV tokens are reserved (max_kv_tokens_fleet)"
    )
    assert answer["details"][1].startswith("128 behind it may pass, for ")


def test_closed_gates_are_told_with_their_numbers(why: Why, queue: IngestQueue, redis: Redis) -> None:
    publish(redis, "ingest", "w1", card())
    publish_load(redis, ["ingest"], "w1", closed("in_flight", "128 documents are in flight, the limit is 128 now"))
    [job_id] = enqueue(queue, "a")

    answer = why(job_id)
    assert answer["waits_for"] == "gates"
    assert answer["details"] == ["w1, in_flight: 128 documents are in flight, the limit is 128 now"]


def test_a_document_that_lost_workers_waits_for_company_small_enough(
    why: Why, queue: IngestQueue, redis: Redis
) -> None:
    publish(redis, "ingest", "hand", card())
    publish_load(redis, ["ingest"], "hand", load())
    enqueue(queue, "a")
    lease(redis)
    [job_id] = enqueue(queue, "b")
    redis.hset(keys.job(job_id), "crashes", 2)

    answer = why(job_id)
    assert answer["waits_for"] == "company"
    assert answer["details"] == ["in flight: hand=1"]


@pytest.mark.usefixtures("worker")
def test_a_plain_rq_clients_job_is_explained_as_well(why: Why, redis: Redis) -> None:
    stock = Queue("ingest", connection=redis, serializer=JSONSerializer)
    job = stock.enqueue(FUNCTION_NAME, {"document_id": "plain", "text": "hello", "model": "m"})
    other = stock.enqueue(FUNCTION_NAME, {"document_id": "other", "text": "hello", "model": "another"})

    answer = why(job.id)
    assert (answer["document_id"], answer["waits_for"]) == ("plain", "next")
    assert why(other.id)["why"] == "no live worker of queue ingest serves another"


@pytest.mark.usefixtures("worker")
def test_documents_of_other_models_are_passed_over(why: Why, queue: IngestQueue) -> None:
    queue.enqueue(request("other", model="another"))
    [job_id] = enqueue(queue, "a")

    answer = why(job_id)
    assert answer["waits_for"] == "next"
    assert answer["details"] == ["1 more before it are for workers of other models"]


def test_a_queued_job_that_is_in_no_list_is_told(why: Why, queue: IngestQueue, redis: Redis) -> None:
    [job_id] = enqueue(queue, "a")
    redis.delete(keys.queue("ingest"))

    assert why(job_id)["waits_for"] == "nowhere"


def test_the_jobs_own_queue_is_asked(why: Why, redis: Redis) -> None:
    other = IngestQueue("other", connection=redis)
    publish(redis, "other", "w1", card())
    [job_id] = enqueue(other, "a")

    answer = why(job_id)
    assert (answer["queue"], answer["waits_for"]) == ("other", "next")
