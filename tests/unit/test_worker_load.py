"""Loads as workers publish them and others read them."""

from __future__ import annotations

from typing import Any

import orjson
from redis import Redis

from ingestq.common import keys
from ingestq.common.worker_load import LOAD_TTL, Closed, WorkerLoad, live_loads, publish_load

LOAD = WorkerLoad(
    in_flight=3,
    max_in_flight=8,
    num_running=2,
    num_ready=1,
    kv_tokens=4096,
    max_kv_tokens=0,
    waiting_prompt_tokens=100,
    closed=(Closed(gate="kv", why="full"),),
    ttft_p50_ms=12.5,
)


def rewrite(redis: Redis, worker: str, **fields: Any) -> None:
    """Changes what Redis has of a load."""
    stored = orjson.loads(redis.hget(keys.loads("ingest"), worker))
    redis.hset(keys.loads("ingest"), worker, orjson.dumps({**stored, **fields}))


def test_a_load_is_read_as_it_was_published_in_every_queue(redis: Redis) -> None:
    publish_load(redis, ["high", "ingest"], "w1", LOAD)

    for queue in ("high", "ingest"):
        [(worker, load)] = live_loads(redis, queue).items()
        assert worker == "w1"
        assert load.published_at > 0
        assert load.model_copy(update={"published_at": 0.0}) == LOAD
    assert live_loads(redis, "other") == {}


def test_a_worker_that_has_said_nothing_for_a_while_is_not_shown_as_live(redis: Redis) -> None:
    publish_load(redis, ["ingest"], "w1", LOAD)
    publish_load(redis, ["ingest"], "w2", LOAD)
    rewrite(redis, "w1", published_at=redis.time()[0] - LOAD_TTL - 1)

    assert set(live_loads(redis, "ingest")) == {"w2"}


def test_a_newer_release_may_say_more_and_what_can_not_be_read_is_left_out(redis: Redis) -> None:
    publish_load(redis, ["ingest"], "newer", LOAD)
    rewrite(redis, "newer", figure_of_the_future=1)
    publish_load(redis, ["ingest"], "odd", LOAD)
    rewrite(redis, "odd", in_flight="many")
    redis.hset(keys.loads("ingest"), "broken", b"\xff")

    assert set(live_loads(redis, "ingest")) == {"newer"}
