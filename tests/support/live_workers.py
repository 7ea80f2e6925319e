"""Engine cards and loads of workers that don't exist, for tests of what others make of them."""

from __future__ import annotations

from typing import Any

from ingestq.common.engine_card import EngineCard
from ingestq.common.worker_load import Closed, WorkerLoad


def card(**fields: Any) -> EngineCard:
    values: dict[str, Any] = {
        "model": "m",
        "tokenizer_digest": "t",
        "max_token_bytes": 16,
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "device": "cpu",
        "engine": "vllm 0.32.0",
        "engine_digest": "e",
        "over_length": "refuse",
        **fields,
    }
    return EngineCard.model_validate(values)


def load(**fields: Any) -> WorkerLoad:
    """Of a worker that is busy and holds nothing back."""
    values: dict[str, Any] = {
        "in_flight": 104,
        "max_in_flight": 128,
        "num_running": 96,
        "num_ready": 8,
        "kv_tokens": 1_040_000,
        "max_kv_tokens": 2_000_000,
        "waiting_prompt_tokens": 12_000,
        "prefill_tokens_per_s": 391_234.0,
        "decode_tokens_per_s": 4_211.0,
        "ttft_p50_ms": 812.0,
        "ttft_p95_ms": 1_804.3,
        "ttft_p99_ms": 1_996.0,
        "queue_p50_ms": 12_000.0,
        "queue_p95_ms": 82_000.0,
        "ttft_sla_ms": 2_000.0,
        "kv_usage": 0.81,
        "prefix_hit_rate": 0.34,
        "documents_per_s": 6.25,
        "tokens_per_s": 81_234.0,
        **fields,
    }
    return WorkerLoad.model_validate(values)


def closed(gate: str, why: str) -> WorkerLoad:
    """Of a worker that one gate keeps from taking more."""
    return load(closed=(Closed(gate=gate, why=why),))
