"""`WorkerLoad`: what a worker does now and what holds it back, published per queue every other second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from . import keys, scripts

if TYPE_CHECKING:
    from redis import Redis

# Seconds after which a load that was not renewed no longer speaks for a worker: several publications may be late.
LOAD_TTL = 15

# Seconds that the hash of all loads outlives its last writer.
_HASH_TTL = 86400


class Closed(BaseModel):
    """A gate that keeps documents waiting."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # A `scripts.Gate` other than "open", or one of the worker's own: "in_flight", "start: ttft".
    gate: str
    # One sentence for people, with the numbers.
    why: str


class WorkerLoad(BaseModel):
    """One worker at one moment. Extra fields of a newer version are ignored; None is what isn't known yet."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Documents leased, over all queues, and how many the drain controller allows now.
    in_flight: int
    max_in_flight: int
    # Documents in the engine, and documents leased and tokenized that wait for it.
    num_running: int
    num_ready: int
    # Tokens of KV cache reserved for what is leased, and at most; 0: no bound.
    kv_tokens: int
    max_kv_tokens: int
    # Prompt tokens in the engine whose prompts have no first token yet.
    waiting_prompt_tokens: int
    # What keeps documents waiting now, in the queue or in the worker.
    closed: tuple[Closed, ...] = ()
    # Tokens in a second, measured from the engine's last steps.
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    # Milliseconds from the engine's add_request to the first output token, of the last documents: quantiles.
    ttft_p50_ms: float | None = None
    ttft_p95_ms: float | None = None
    ttft_p99_ms: float | None = None
    # Milliseconds from enqueue to lease, of the last documents: quantiles.
    queue_p50_ms: float | None = None
    queue_p95_ms: float | None = None
    # Milliseconds within which `ttft_percentile` (0 to 1) of the first tokens are to come; None: no bound.
    ttft_sla_ms: float | None = None
    ttft_percentile: float = 0.95
    # Share of the KV cache's blocks that are in use, 0 to 1.
    kv_usage: float = 0.0
    # Since the worker was ready: sequences that lost their KV blocks to others.
    num_preemptions: int = 0
    # Since then: share of the prompt tokens that came from the prefix cache, and of the speculative tokens that were
    # accepted, 0 to 1; None without such a cache or speculation.
    prefix_hit_rate: float | None = None
    draft_acceptance: float | None = None
    # Over the last minute: documents that ended, and their tokens of prompt and output, in a second.
    documents_per_s: float = 0.0
    tokens_per_s: float = 0.0
    # Seconds since the epoch by Redis' clock.
    published_at: float = 0.0


def publish_load(connection: Redis, queues: Sequence[str], worker: str, load: WorkerLoad) -> None:
    """Writes or renews a worker's load in each of its queues."""
    seconds, micros = connection.time()
    fields = {worker: load.model_copy(update={"published_at": seconds + micros / 1e6}).model_dump_json()}
    for queue in queues:
        scripts.write_fields(connection, keys.loads(queue), fields, ttl=_HASH_TTL)


def live_loads(connection: Redis, queue: str) -> dict[str, WorkerLoad]:
    """Worker name -> load, of the workers heard of in the last LOAD_TTL seconds; unreadable ones are left out."""
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.time()
        pipeline.hgetall(keys.loads(queue))
        (seconds, _), raw = pipeline.execute()
    loads = {}
    for worker, value in raw.items():
        try:
            load = WorkerLoad.model_validate_json(value)
        except ValidationError:
            continue
        if abs(seconds - load.published_at) <= LOAD_TTL:
            loads[worker.decode(errors="replace")] = load
    return loads
