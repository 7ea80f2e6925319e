from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from redis import Redis
from rq import Queue, Retry
from rq.job import Job
from rq.serializers import JSONSerializer

from ingestq.common import engine_card, keys, scripts
from ingestq.common.connections import connect, sibling
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import EngineCard
from ingestq.common.errors import QueueUnavailable, RequestRefused, SettingsError, UnknownGroup
from ingestq.common.payload import FUNCTION_NAME
from ingestq.common.schema import IngestRequest, job_id
from ingestq.common.serializer import OrjsonSerializer
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue
from ingestq.producer.group import CancelCounts
from support.hand_worker import document_of, drain, finish, lease, request
from support.processes import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def queue(redis: Redis) -> IngestQueue:
    return IngestQueue("ingest", connection=redis, settings=Settings())


def requests(*document_ids: str) -> list[IngestRequest]:
    return [request(document_id) for document_id in document_ids]


def queued(redis: Redis) -> list[str]:
    return [entry.decode() for entry in redis.lrange(keys.queue("ingest"), 0, -1)]


def card(model: str = "m", *, max_model_len: int = 100, over_length: str = "refuse") -> EngineCard:
    return EngineCard(
        model=model,
        tokenizer_digest="t",
        max_token_bytes=4,
        max_model_len=max_model_len,
        max_num_seqs=8,
        device="simulated",
        engine="simulated",
        engine_digest="e",
        over_length=over_length,
    )


# --- each once


def test_documents_are_queued_in_their_order(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b", "c"))

    assert (group.num_enqueued, group.num_joined, group.num_finished) == (3, 0, 0)
    assert queued(redis) == [job_id(item.to_json()) for item in requests("a", "b", "c")]
    assert [document_of(job) for job in lease(redis)] == ["a", "b", "c"]


def test_the_same_document_submitted_twice_runs_once(queue: IngestQueue, redis: Redis) -> None:
    first = queue.enqueue_many(requests("a", "b"))
    second = queue.enqueue_many(requests("b", "c"))

    assert first.id != second.id
    assert (second.num_enqueued, second.num_joined, second.joined) == (1, 1, ("b",))
    assert len(queued(redis)) == 3
    assert drain(redis) == ["a", "b", "c"]


def test_members_are_ranked_in_the_order_of_submission(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("c", "a"), group_id="g")
    queue.enqueue_many(requests("a", "b", "c", "d"), group_id="g")

    members = [member.decode().partition(":")[2] for member in redis.zrange(keys.group_members("g"), 0, -1)]
    assert members == ["c", "a", "b", "d"]


def test_a_repetition_within_one_call_runs_once(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a", "b", "a"))

    assert (group.num_enqueued, group.num_joined, group.num_members) == (2, 1, 2)
    assert len(queued(redis)) == 2


def test_a_running_document_is_joined(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue(request("a"))
    lease(redis)

    assert queue.enqueue(request("a")).outcome == "joined"
    assert queued(redis) == []


def test_a_finished_document_does_not_run_again(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("a"))
    drain(redis)

    group = queue.enqueue_many(requests("a"))

    assert (group.num_finished, group.joined) == (1, ("a",))
    assert queue.enqueue(request("a")).outcome == "finished"
    assert queued(redis) == []


def end_as_failed(redis: Redis, queue: IngestQueue) -> None:
    drain(redis, "F")


def end_as_stopped(redis: Redis, queue: IngestQueue) -> None:
    drain(redis, "X")


def end_as_cancelled(redis: Redis, queue: IngestQueue) -> None:
    queue.group("first").cancel()


def end_as_expired(redis: Redis, queue: IngestQueue) -> None:
    drain(redis)
    name = job_id(request("a").to_json())
    redis.delete(keys.job(name), keys.results(name))


def end_with_its_result_gone(redis: Redis, queue: IngestQueue) -> None:
    drain(redis)
    redis.delete(keys.results(job_id(request("a").to_json())))


def end_as_cancelled_by_stock_rq(redis: Redis, queue: IngestQueue) -> None:
    Job.fetch(job_id(request("a").to_json()), connection=redis, serializer=OrjsonSerializer).cancel()


@pytest.mark.parametrize(
    "end",
    [
        end_as_failed,
        end_as_stopped,
        end_as_cancelled,
        end_as_expired,
        end_with_its_result_gone,
        end_as_cancelled_by_stock_rq,
    ],
)
def test_a_document_that_ended_without_a_good_row_runs_again(end, queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("a"), group_id="first")
    end(redis, queue)

    again = queue.enqueue_many(requests("a"), group_id="second")

    assert again.num_enqueued == 1
    assert drain(redis) == ["a"]
    assert again.counts()["succeeded"] == 1
    assert redis.zcard(keys.failed("ingest")) == redis.zcard(keys.canceled("ingest")) == 0


def test_a_job_is_the_same_whoever_submits_it_at_the_same_time(queue: IngestQueue, redis: Redis) -> None:
    documents = requests(*(f"d{i}" for i in range(600)))
    groups = []
    threads = [threading.Thread(target=lambda: groups.append(queue.enqueue_many(documents))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(group.num_enqueued for group in groups) == 600
    assert len(queued(redis)) == 600


# --- streaming


def test_any_iterable_is_read_as_it_is_sent(queue: IngestQueue, redis: Redis) -> None:
    in_redis = []

    def source() -> Iterator[IngestRequest]:
        for i in range(1000):
            in_redis.append(redis.llen(keys.queue("ingest")))
            yield request(f"d{i}")

    progress: list[int] = []
    group = queue.enqueue_many(source(), on_progress=progress.append)

    assert group.num_enqueued == 1000
    # One chunk is made ready while Redis works on another.
    assert all(i - count <= 2 * scripts.CHUNK for i, count in enumerate(in_redis))
    assert progress[-1] == 1000
    assert progress == sorted(set(progress))


def test_a_full_chunk_is_there_before_the_source_goes_on(queue: IngestQueue, redis: Redis) -> None:
    def source() -> Iterator[IngestRequest]:
        yield from requests(*(f"d{i}" for i in range(scripts.CHUNK)))
        wait_until(lambda: len(queued(redis)) == scripts.CHUNK, "the first chunk is in Redis")
        yield request("last")

    redis.script_flush()  # as on a new server
    assert queue.enqueue_many(source()).num_enqueued == scripts.CHUNK + 1


def test_no_connection_is_left_open(queue: IngestQueue, redis: Redis) -> None:
    def source() -> Iterator[IngestRequest]:
        yield from requests(*(f"d{i}" for i in range(200)))
        raise KeyboardInterrupt

    queue.enqueue_many(requests("a"))
    before = {client["id"] for client in redis.client_list()}
    with pytest.raises(KeyboardInterrupt):
        queue.enqueue_many(source())

    wait_until(lambda: {client["id"] for client in redis.client_list()} <= before, "the call's own connection is gone")


def test_script_calls_are_cut_by_bytes(redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings(max_text_bytes=2**20))
    progress: list[int] = []

    queue.enqueue_many((request(f"d{i}", "x" * 400_000) for i in range(5)), on_progress=progress.append)

    assert progress == [1, 2, 3, 4, 5]


def test_a_slow_source_does_not_hold_its_documents_back(
    queue: IngestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestq.producer.queue._LINGER", 0.0)

    def source() -> Iterator[IngestRequest]:
        yield request("a")
        wait_until(lambda: len(queued(redis)) == 1, "the first document is there before the second is made")
        yield request("b")

    assert queue.enqueue_many(source()).num_enqueued == 2


def test_nothing_to_submit_gives_a_sealed_group(queue: IngestQueue) -> None:
    group = queue.enqueue_many([])

    assert group.is_sealed
    assert group.num_members == 0


def test_the_producer_shows_signs_of_life_while_its_source_is_slow(
    queue: IngestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestq.producer.queue._BEAT", 0.01)

    def source() -> Iterator[IngestRequest]:
        redis.hset(keys.group("g"), "seen_ms", 1)
        wait_until(lambda: int(redis.hget(keys.group("g"), "seen_ms") or 0) > 1, "a sign of life")
        assert not queue.group("g").is_sealed
        yield request("a")

    assert queue.enqueue_many(source(), group_id="g").is_sealed


# --- groups


def test_group_ids_are_readable_and_new(queue: IngestQueue) -> None:
    ids = {queue.enqueue_many([]).id for _ in range(20)}

    assert len(ids) == 20
    assert all(group_id.startswith("ingest-2") for group_id in ids)


def test_a_group_is_open_until_it_is_sealed(queue: IngestQueue) -> None:
    group = queue.enqueue_many(requests("a"), group_id="g", seal=False)
    assert not group.is_sealed

    group.seal()
    assert group.is_sealed

    queue.enqueue_many(requests("b"), group_id="g", seal=False)
    assert not group.is_sealed
    assert group.num_members == 2


def test_a_source_that_fails_leaves_its_group_open(queue: IngestQueue) -> None:
    def source() -> Iterator[IngestRequest]:
        yield from requests(*(f"d{i}" for i in range(200)))
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as raised:
        queue.enqueue_many(source(), group_id="g")

    assert raised.value.__notes__ == ["ingestq: 128 documents were accepted into group 'g', which is open"]
    assert not queue.group("g").is_sealed
    assert queue.enqueue_many(requests(*(f"d{i}" for i in range(200))), group_id="g").num_enqueued == 72


def test_counts_say_where_every_member_stands(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(
        requests("ok", "bad", "stopped", "gone", "running", "waiting", "cancelled"), group_id="g"
    )
    other = queue.enqueue_many(requests("cancelled"), group_id="other")
    jobs = {document_of(job): job for job in lease(redis, 5)}
    finish(redis, [jobs["ok"], jobs["gone"]])
    finish(redis, [jobs["bad"]], "F")
    finish(redis, [jobs["stopped"]], "X")
    redis.delete(keys.job(jobs["gone"].job_id))
    other.cancel()

    expected = {"succeeded": 1, "failed": 1, "stopped": 1, "expired": 1, "running": 1, "scheduled": 0}
    assert group.counts() == {**expected, "queued": 2, "cancelled": 0}
    assert other.counts()["cancelled"] == 1


def test_a_large_group_is_counted_in_parts(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(request(f"d{i}") for i in range(2001))

    assert group.counts()["queued"] == group.num_members == 2001


def test_cancelling_a_group_cancels_what_no_other_group_holds(queue: IngestQueue, redis: Redis) -> None:
    first = queue.enqueue_many(requests("a", "both", "done"))
    second = queue.enqueue_many(requests("both"))
    done = [job for job in lease(redis) if document_of(job) == "done"]
    finish(redis, done)

    assert first.cancel() == CancelCounts(num_cancelled=1, num_left=1, num_terminal=1)
    assert first.counts() == {**dict.fromkeys(first.counts(), 0), "cancelled": 2, "succeeded": 1}
    assert second.counts()["running"] == 1


def test_a_document_submitted_alone_is_not_cancelled_with_a_group_that_joined_it(
    queue: IngestQueue, redis: Redis
) -> None:
    queue.enqueue(request("before"))
    group = queue.enqueue_many(requests("before", "after", "mine"))
    queue.enqueue(request("after"))

    assert group.cancel() == CancelCounts(num_cancelled=1, num_left=2)
    assert group.counts()["cancelled"] == 3
    assert drain(redis) == ["before", "after"]


def test_a_document_submitted_alone_that_runs_again_is_still_held(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue(request("a"))
    drain(redis, "F")
    group = queue.enqueue_many(requests("a"))

    assert group.cancel() == CancelCounts(num_left=1)


def test_a_job_that_a_plain_rq_client_submitted_is_not_cancelled_with_a_group(queue: IngestQueue, redis: Redis) -> None:
    stock = Queue("ingest", connection=redis, serializer=JSONSerializer)
    stock.enqueue(FUNCTION_NAME, {"text": "t"}, job_id=job_id(request("a").to_json()))
    group = queue.enqueue_many(requests("a"))

    assert group.num_joined == 1
    assert group.cancel() == CancelCounts(num_left=1)


@pytest.mark.parametrize("state", ["queued", "running", "scheduled"])
def test_cancelling_reaches_a_job_of_another_queue(state: str, queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("a"), group_id="g", retry=Retry(max=1, interval=60))
    leased = lease(redis) if state != "queued" else []
    if state == "scheduled":
        assert finish(redis, leased, "F") == ["scheduled"]
    night = IngestQueue("night", connection=redis, settings=Settings())
    through_night = night.enqueue_many(requests("b"), group_id="g")

    assert through_night.cancel().num_cancelled == 2
    assert redis.zcard(keys.started("ingest")) == redis.zcard(keys.scheduled("ingest")) == 0
    assert redis.zcard(keys.canceled("ingest")) == redis.zcard(keys.canceled("night")) == 1
    if state == "running":
        assert finish(redis, leased) == ["fenced"]


def test_a_group_keeps_the_queue_that_it_began_with(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("a"), group_id="g")
    IngestQueue("night", connection=redis, settings=Settings()).enqueue_many(requests("b"), group_id="g")

    assert queue.group("g").queue == "ingest"


def test_a_large_group_is_cancelled_in_parts(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(request(f"d{i}") for i in range(300))

    assert group.cancel().num_cancelled == 300
    assert lease(redis) == []


def test_a_cancelled_running_document_can_not_write_its_row(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"))
    leased = lease(redis)

    group.cancel()

    assert finish(redis, leased) == ["fenced"]
    assert group.counts()["cancelled"] == 1


def test_an_unknown_group_is_named(queue: IngestQueue) -> None:
    with pytest.raises(UnknownGroup, match="'nope' is not in Redis"):
        queue.group("nope")


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 129])
def test_names_are_bounded(name: str, queue: IngestQueue, redis: Redis) -> None:
    with pytest.raises(SettingsError, match="1 to 128"):
        queue.enqueue_many([], group_id=name)
    with pytest.raises(SettingsError, match="1 to 128"):
        IngestQueue(name, connection=redis, settings=Settings())


# --- bounds


def test_a_text_over_the_bound_is_refused_with_both_numbers(redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings(max_text_bytes=100))

    queue.enqueue(request("exactly", "ä" * 50))
    with pytest.raises(RequestRefused, match="document 'over': the text has 102 bytes, the bound is 100; split it"):
        queue.enqueue(request("over", "ä" * 51))


def test_a_request_over_one_script_call_is_refused(redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings(max_text_bytes=16 * 2**20))

    with pytest.raises(RequestRefused, match=r"has \d+ bytes as JSON, the bound is 4194304"):
        queue.enqueue(request("a", "x" * 4 * 2**20))


def test_a_text_that_is_not_unicode_is_refused(queue: IngestQueue) -> None:
    with pytest.raises(RequestRefused, match="document 'a': a field is not Unicode text"):
        queue.enqueue(request("a", "half a pair: \ud800"))


def test_a_refused_document_stops_the_call_before_its_chunk_is_sent(redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings(max_text_bytes=1000))
    documents = [request(f"d{i}") for i in range(150)]
    documents.insert(140, request("bad", "x" * 1001))

    with pytest.raises(RequestRefused) as raised:
        queue.enqueue_many(documents, group_id="g")

    assert raised.value.document_id == "bad"
    assert raised.value.accepted == queued(redis) == [job_id(item.to_json()) for item in documents[:128]]
    assert not queue.group("g").is_sealed
    documents.pop(140)
    completed = queue.enqueue_many(documents, group_id="g")
    assert (completed.num_enqueued, completed.num_joined) == (22, 128)


def test_on_refused_goes_on_without_the_bad_ones(redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings(max_text_bytes=100))
    refused: list[str] = []

    group = queue.enqueue_many(
        [request("a"), request("bad", "x" * 101), request("b")],
        on_refused=lambda error: refused.append(error.document_id),
    )

    assert (refused, group.num_enqueued, group.is_sealed) == (["bad"], 2, True)


# --- engine cards


def test_max_tokens_over_the_context_is_refused_with_both_numbers(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "ingest", "w", card(max_model_len=100))

    with pytest.raises(
        RequestRefused, match=r"at least 101 tokens \(1 of prompt, 100 of output\), max_model_len is 100"
    ):
        queue.enqueue(request("a", "x", sampling={"max_tokens": 100}))


def test_a_prompt_that_can_not_fit_is_refused_with_both_numbers(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "ingest", "w", card(max_model_len=100))
    fits = {"sampling": {"max_tokens": 10}, "instruction": "y" * 40}

    queue.enqueue(request("fits", "x" * 320, **fits))
    with pytest.raises(
        RequestRefused, match=r"at least 101 tokens \(91 of prompt, 10 of output\), max_model_len is 100"
    ):
        queue.enqueue(request("over", "x" * 321, **fits))


def test_white_space_that_a_template_strips_is_not_counted(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "ingest", "w", card(max_model_len=100))

    assert queue.enqueue(request("a", "x" + " " * 1000)).outcome == "enqueued"


def test_an_engine_that_clamps_needs_room_for_one_output_token(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "ingest", "w", card(max_model_len=100, over_length="clamp"))

    queue.enqueue(request("a", "x" * 396, sampling={"max_tokens": 500}))
    with pytest.raises(
        RequestRefused, match=r"at least 101 tokens \(100 of prompt, 1 of output\), max_model_len is 100"
    ):
        queue.enqueue(request("b", "x" * 397))


def test_one_engine_that_can_run_it_is_enough(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "ingest", "small", card(max_model_len=100))
    engine_card.publish(redis, "ingest", "large", card(max_model_len=1000))
    engine_card.publish(redis, "ingest", "other", card("n", max_model_len=10_000))

    queue.enqueue(request("a", "x" * 2000))
    with pytest.raises(RequestRefused, match="max_model_len is 1000"):
        queue.enqueue(request("b", "x" * 5000))


def test_a_seed_is_refused_while_only_tpus_serve_the_model(queue: IngestQueue, redis: Redis) -> None:
    seeded = [request("a", "x", sampling={"max_tokens": 1, "seed": 7, "temperature": 0.7})]
    engine_card.publish(redis, "ingest", "t", card().model_copy(update={"device": "tpu"}))

    with pytest.raises(RequestRefused, match="seed=7 not supported by the TPU runtime"):
        queue.enqueue_many(seeded)
    engine_card.publish(redis, "ingest", "g", card().model_copy(update={"device": "cuda"}))
    assert queue.enqueue_many(seeded).num_enqueued == 1


def test_cards_of_dead_workers_and_of_other_queues_refuse_nothing(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "night", "w", card(max_model_len=100))
    dead = card(max_model_len=100).model_copy(update={"published_at": redis.time()[0] - engine_card.CARD_TTL - 5.0})
    redis.hset(keys.engines("ingest"), "dead", dead.model_dump_json())
    redis.hset(keys.engines("ingest"), "broken", "{")

    assert queue.enqueue(request("a", "x" * 5000)).outcome == "enqueued"


def test_cards_are_read_anew_by_each_enqueue_many(queue: IngestQueue, redis: Redis) -> None:
    engine_card.publish(redis, "ingest", "w", card(max_model_len=100))
    with pytest.raises(RequestRefused):
        queue.enqueue_many([request("a", "x" * 5000)])
    engine_card.publish(redis, "ingest", "w", card(max_model_len=10_000))

    assert queue.enqueue_many([request("a", "x" * 5000)]).num_enqueued == 1


def test_a_model_that_nobody_serves_is_accepted_with_one_warning(
    queue: IngestQueue, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    engine_card.publish(redis, "ingest", "w", card("served"))

    with caplog.at_level(logging.WARNING, "ingestq"):
        assert queue.enqueue_many(requests("a", "b")).num_enqueued == 2
        queue.enqueue(request("c"))

    assert [record.getMessage() for record in caplog.records] == [
        "no live worker of queue 'ingest' serves model 'm'; they serve 'served'. Its documents wait for one that does"
    ]


# --- Redis in trouble


def test_a_dropped_connection_is_healed(queue: IngestQueue, redis: Redis) -> None:
    def source() -> Iterator[IngestRequest]:
        for i in range(300):
            if i % 100 == 50:
                redis.connection_pool.disconnect()
            if i % 128 == 64:  # and that on which a chunk is under way
                redis.client_kill_filter(_type="normal", skipme=True)
            yield request(f"d{i}")

    group = queue.enqueue_many(source())

    assert group.num_members == group.num_enqueued + group.num_joined == len(queued(redis)) == 300


def test_a_restart_of_redis_loses_and_repeats_nothing(tmp_path: Path) -> None:
    with EmbeddedServer(directory=tmp_path, appendfsync="always") as server:
        redis = Redis.from_url(server.url)
        queue = IngestQueue("ingest", connection=redis, settings=Settings())

        def source() -> Iterator[IngestRequest]:
            for i in range(300):
                if i == 200:
                    server.kill()
                    threading.Timer(0.5, server.start).start()
                yield request(f"d{i}")

        group = queue.enqueue_many(source())

        assert group.num_members == 300
        assert sorted(drain(redis)) == sorted(f"d{i}" for i in range(300))
        redis.close()


def test_when_redis_stays_away_the_error_says_what_was_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestq.producer.queue.PATIENCE", 0.2)
    with EmbeddedServer(directory=tmp_path, appendfsync="always") as server:
        redis = Redis.from_url(server.url)
        queue = IngestQueue("ingest", connection=redis, settings=Settings())
        documents = [request(f"d{i}") for i in range(300)]

        def source() -> Iterator[IngestRequest]:
            for i, document in enumerate(documents):
                if i == 200:
                    wait_until(lambda: len(queued(redis)) == 128, "the chunk that is under way has arrived")
                    server.kill()
                yield document

        with pytest.raises(
            QueueUnavailable, match=r"128 documents were accepted before that; .* group_id='g'"
        ) as raised:
            queue.enqueue_many(source(), group_id="g")
        server.start()

        assert raised.value.accepted == [job_id(item.to_json()) for item in documents[:128]] == queued(redis)
        completed = queue.enqueue_many(documents, group_id="g")
        assert (completed.num_enqueued, completed.num_joined) == (172, 128)
        redis.close()


def test_a_full_redis_refuses_at_once_and_says_so(queue: IngestQueue, redis: Redis) -> None:
    redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(QueueUnavailable, match=r"Redis: .*maxmemory.*; 0 documents were accepted"):
            queue.enqueue_many(requests("a"))
    finally:
        redis.config_set("maxmemory", "0")


def test_a_read_only_redis_refuses_at_once_and_says_so(queue: IngestQueue, redis: Redis) -> None:
    redis.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(QueueUnavailable, match="read only replica"):
            queue.enqueue(request("a"))
    finally:
        redis.replicaof("NO", "ONE")


def test_a_wrong_password_is_not_tried_again(server: EmbeddedServer, redis: Redis) -> None:
    stranger = sibling(Redis(port=server.port, username="nobody", password="wrong"))  # a client that retries nothing
    queue = IngestQueue("ingest", connection=stranger, settings=Settings())
    redis.acl_log_reset()

    with pytest.raises(QueueUnavailable, match=r"(?i)invalid username-password"):
        queue.enqueue(request("a"))
    assert sum(int(entry["count"]) for entry in redis.acl_log()) == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@127.0.0.1:1/0", "redis://127.0.0.1:1/0: Error"),
        ("redis://127.0.0.1:1/0?password=secret", "redis://127.0.0.1:1/0: Error"),
        ("redis://127.0.0.1:1/0?password=sec@secret", "redis://127.0.0.1:1/0: Error"),
        ("redis://:secret/part@127.0.0.1:1/0", "redis://...: not a URL like"),
        ("redis://user:12/secret@127.0.0.1:1/0", "redis://...: not a URL like"),
        ("redis://:secret?part@127.0.0.1:1/0", "redis://...: not a URL like"),
        ("redis://:part#secret@127.0.0.1:1/0", "redis://...: not a URL like"),
        ("redis://:secret[@127.0.0.1:1/0", "redis://...: not a URL like"),
        ("redis://:secret", "redis://...: not a URL like"),
        ("redis://user:secret:127.0.0.1:1", "redis://...: not a URL like"),
        ("secret@127.0.0.1:1", "127.0.0.1:1: not a URL like"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1: not a URL like"),
        ("unix://user:secret@/no/such.socket?db=0", "unix:///no/such.socket: Error"),
    ],
)
def test_no_message_shows_a_password(url: str, shown: str) -> None:
    with pytest.raises(QueueUnavailable) as raised:
        connect(url)

    assert str(raised.value).startswith(f"Redis at {shown}")
    assert "secret" not in str(raised.value)
    assert "12" not in str(raised.value).replace("127.0.0.1", "")


def test_a_unix_socket_will_do(server_binary: str | None) -> None:
    with EmbeddedServer(server_binary, unixsocket="redis.socket") as server:
        queue = IngestQueue("ingest", connection=connect(f"unix://{server.directory}/redis.socket?db=0"))

        assert queue.enqueue_many(request(f"d{i}") for i in range(300)).num_enqueued == 300


def test_a_client_that_decodes_responses_is_refused(server: EmbeddedServer) -> None:
    with pytest.raises(SettingsError, match="decode_responses"):
        IngestQueue("ingest", connection=Redis(port=server.port, decode_responses=True), settings=Settings())


# --- RQ stays RQ


@pytest.mark.parametrize("serializer", [OrjsonSerializer, JSONSerializer])
def test_rq_reads_our_jobs(serializer, queue: IngestQueue, redis: Redis) -> None:
    accepted = queue.enqueue(request("a"))

    job = Job.fetch(accepted.job_id, connection=redis, serializer=serializer)

    assert job.func_name == FUNCTION_NAME
    assert job.args == [request("a").model_dump(mode="json", exclude_none=True)]
    assert job.kwargs == {}
    assert (job.get_status(), job.origin, job.description) == ("queued", "ingest", "a")
    assert (job.result_ttl, job.failure_ttl) == (7 * 86400, 365 * 86400)
    assert job.enqueued_at is not None


@pytest.mark.parametrize("serializer", [OrjsonSerializer, JSONSerializer])
def test_rq_reads_our_rows(serializer, queue: IngestQueue, redis: Redis) -> None:
    accepted = queue.enqueue(request("a"))
    drain(redis)

    job = Job.fetch(accepted.job_id, connection=redis, serializer=serializer)
    result = job.latest_result()

    assert job.is_finished
    assert result.return_value["text"] == "out"
    assert job.args == []


def test_rq_lists_our_queue(queue: IngestQueue, redis: Redis) -> None:
    queue.enqueue_many(requests("a", "b"))

    assert [each.name for each in Queue.all(connection=redis)] == ["ingest"]
    assert Queue("ingest", connection=redis).count == 2


def test_retry_is_kept_as_rq_keeps_it(queue: IngestQueue, redis: Redis) -> None:
    accepted = queue.enqueue(request("a"), retry=Retry(max=3, interval=[1, 2, 4], enqueue_at_front=True))

    job = Job.fetch(accepted.job_id, connection=redis, serializer=OrjsonSerializer)

    assert (job.retries_left, job.retry_intervals, job.enqueue_at_front_on_retry) == (3, [1, 2, 4], True)


@pytest.mark.parametrize("number", [0, 10**19])
def test_a_number_of_retries_that_redis_can_not_count_is_refused(number: int, queue: IngestQueue, redis: Redis) -> None:
    retry = Retry(max=1)
    retry.max = number

    with pytest.raises(SettingsError, match=f"max is {number}, the bounds are 1 and 1000"):
        queue.enqueue(request("a"), retry=retry)
    assert queued(redis) == []


def test_a_retry_runs_the_document_again(queue: IngestQueue, redis: Redis) -> None:
    group = queue.enqueue_many(requests("a"), retry=Retry(max=1))

    assert finish(redis, lease(redis), "F") == ["queued"]
    assert group.counts()["queued"] == 1
    assert finish(redis, lease(redis)) == ["finished"]


def test_the_ttls_of_the_settings_are_the_jobs(redis: Redis) -> None:
    queue = IngestQueue("ingest", connection=redis, settings=Settings(result_ttl=5, failure_ttl=6, group_ttl=77))
    group = queue.enqueue_many(requests("a"))

    leased = lease(redis)

    assert (leased[0].result_ttl, leased[0].failure_ttl) == (5, 6)
    assert 70 <= redis.ttl(keys.group(group.id)) <= 77
    assert 70 <= redis.ttl(keys.group_members(group.id)) <= 77


# --- the installation

NOT_CORE = ("vllm", "torch", "transformers")


def test_the_import_brings_no_engine_and_stands_beside_folders_of_the_same_name(tmp_path: Path) -> None:
    for name in ("common", "workers", "producer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    code = f"""
import sys
import ingestq.producer
from ingestq.producer import *
unwanted = {NOT_CORE} + ("rq", "rich", "click", "trafilatura", "tenacity", "ingestq.workers")
print([name for name in unwanted if name in sys.modules])
print(IngestQueue.__name__, Group.__name__, fetch_results.__name__, iter_results.__name__, Status.SUCCEEDED)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert ended.stderr == ""
    engines, names = ended.stdout.splitlines()
    assert engines == "[]"
    assert names == "IngestQueue Group fetch_results iter_results succeeded"


def test_the_wheel_asks_for_no_engine_unless_by_an_extra(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"  # a build leaves things behind
    for name in ("common", "producer", "workers"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)

    [wheel] = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        wanted = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    core = [requirement for requirement in map(Requirement, wanted) if "extra" not in str(requirement.marker)]
    assert "rq" in {requirement.name for requirement in core}
    assert not [each for each in core if each.name.startswith(NOT_CORE)]
    assert any(requirement.startswith("vllm") for requirement in wanted)
