"""`EngineCard`: what a worker's engine is, published per queue so that `enqueue` can refuse what can't run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import keys, scripts

if TYPE_CHECKING:
    from redis import Redis

# Seconds after which a card that was not renewed no longer speaks for a worker.
CARD_TTL = 120

# Seconds that the hash of all cards outlives its last writer.
_HASH_TTL = 86400


class EngineCard(BaseModel):
    """One worker's engine. Extra fields of a newer version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # The name that requests carry.
    model: str
    # Digest of the tokenizer's vocabulary: equal ones count tokens alike.
    tokenizer_digest: str
    # Bytes of UTF-8 in the vocabulary's longest token: a text of n bytes has at least n / this many tokens.
    max_token_bytes: int = Field(ge=1)
    # Prompt and output tokens of one document at most.
    max_model_len: int
    # Sequences that the engine runs at once.
    max_num_seqs: int
    # Tokens that the engine computes in one step at most; None on the cards of former releases.
    max_num_batched_tokens: int | None = None
    # "cpu", "cuda", "tpu", or "simulated".
    device: str
    # Engine and version, such as "vllm 0.32.0".
    engine: str
    # Digest of the engine's settings and version, the same as in results.
    engine_digest: str
    # "refuse" or "clamp" (INGEST_OVER_LENGTH).
    over_length: str
    # What the warm-up found; None on the cards of former releases, and where it can't be known.
    # The KV cache as it really is: type of its values ("fp8_e5m2"), tokens that fit at once, blocks, tokens of a block.
    kv_cache_dtype: str | None = None
    num_kv_tokens: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    # Tokens in a second, all sequences together.
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    # Milliseconds from the loaded engine to the ready worker.
    warmup_ms: float | None = None
    # Since then: graphs that had to be compiled, and sequences that lost their KV blocks to others.
    recompiles: int | None = None
    num_preemptions: int | None = None
    # Since then: share of the speculative tokens that were accepted, 0 to 1; None without speculation.
    draft_acceptance: float | None = None
    # Seconds since the epoch by Redis' clock.
    published_at: float = 0.0


def publish(connection: Redis, queue: str, worker: str, card: EngineCard) -> None:
    """Writes or renews a worker's card."""
    seconds, micros = connection.time()
    stamped = card.model_copy(update={"published_at": seconds + micros / 1e6})
    scripts.write_fields(connection, keys.engines(queue), {worker: stamped.model_dump_json()}, ttl=_HASH_TTL)


def withdraw(connection: Redis, queue: str, worker: str) -> None:
    """Removes the card of a worker that stops."""
    connection.hdel(keys.engines(queue), worker)


def live_cards(connection: Redis, queue: str) -> dict[str, EngineCard]:
    """Worker name -> card, of the workers heard of in the last CARD_TTL seconds; unreadable cards are left out."""
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.time()
        pipeline.hgetall(keys.engines(queue))
        (seconds, _), raw = pipeline.execute()
    cards = {}
    for worker, value in raw.items():
        try:
            card = EngineCard.model_validate_json(value)
        except ValidationError:
            continue
        if abs(seconds - card.published_at) <= CARD_TTL:
            cards[worker.decode(errors="replace")] = card
    return cards
