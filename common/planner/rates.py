"""How fast a machine can run a model: ceilings from its FLOPs and its bandwidth, and what to expect of them.

Nothing here was measured on a TPU or a GPU. Ceilings are arithmetic; the expected shares of them are planning ranges,
and the worker's warm-up measures the real rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from .capacity import expert_padding, layer_bytes_per_token
from .hardware import Machine
from .model_shapes import LayerLayout, ModelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of a ceiling, what to expect."""

    low: float
    high: float
    # Why.
    source: str


# Best published: 76 % on a dense 540B model (Pope et al., arXiv 2211.05102, abstract).
_DENSE_PREFILL = Share(
    low=0.4, high=0.6, source="planning range for dense models; best published is 76 % (arXiv 2211.05102)"
)
_MOE_PREFILL = Share(
    low=0.3, high=0.4, source="planning range for mixtures of experts: padding, uneven experts and copies between chips"
)
_DECODE = Share(
    low=0.4, high=0.7, source="planning range for decoding in large batches, bound by bandwidth and by step overhead"
)


def prefill_share(layout: ModelLayout) -> Share:
    """Share of the prefill ceiling to expect, without prefix-cache hits."""
    return _MOE_PREFILL if layout.experts else _DENSE_PREFILL


def decode_share() -> Share:
    """Share of the decode ceiling to expect."""
    return _DECODE


def positions_seen(num_tokens: int, window: int | None) -> int:
    """Sum over a sequence's tokens of the positions that each attends to, itself included."""
    bound = num_tokens if window is None else min(window, num_tokens)
    return bound * (bound + 1) // 2 + (num_tokens - bound) * bound


def attention_flops(layout: ModelLayout, first: int, last: int) -> float:
    """FLOPs of attention for the tokens `first` to `last` (exclusive) of a sequence.

    Four for each query head, head dimension and position: a multiplication and an addition for the scores, the same
    for the values. Source: Chowdhery et al., PaLM, appendix B, without the factor 3 of training.
    """
    return sum(
        4 * layout.num_query_heads * layer.head_dim * (_seen(layer, last) - _seen(layer, first))
        for layer in layout.layers
    )


def _seen(layer: LayerLayout, num_tokens: int) -> int:
    return positions_seen(num_tokens, layer.sliding_window)


def prefill_flops_per_token(
    layout: ModelLayout, prompt_tokens: int, cached_tokens: int = 0, *, output_projection: bool = True
) -> float:
    """FLOPs of a prompt token that isn't in the prefix cache, on average: two per parameter it meets, and attention.

    Args:
        output_projection: count it for every token, as utilisation is usually quoted; vLLM computes the logits of a
            prompt's last token only.
    """
    parameters = layout.active_parameters if output_projection else layout.body_parameters
    fresh = max(1, prompt_tokens - cached_tokens)
    return 2.0 * parameters + attention_flops(layout, prompt_tokens - fresh, prompt_tokens) / fresh


def decode_flops_per_token(layout: ModelLayout, context_tokens: int) -> float:
    """FLOPs of one generated token after `context_tokens`."""
    return 2.0 * layout.active_parameters + attention_flops(layout, context_tokens, context_tokens + 1)


def experts_touched(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Distinct experts of a layer that a step's tokens go through, if routing is even: E (1 - (1 - k/E)^n)."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def weight_bytes_read(
    layout: ModelLayout, machine: Machine, tensor_parallel_size: int, value_bytes: int, num_tokens: int
) -> float:
    """Bytes of weights that a decode step of so many sequences reads: no tables that are only looked up, no towers."""
    dense = layout.dense_parameters + layout.embedding_parameters
    if layout.experts is None:
        return float(dense * value_bytes)
    experts = layout.expert_parameters + expert_padding(layout, machine, tensor_parallel_size)
    touched = experts_touched(layout.experts.num_experts, layout.experts.top_k, num_tokens)
    return (dense + experts * touched / layout.experts.num_experts) * value_bytes


def kv_bytes_read(
    layout: ModelLayout, machine: Machine, tensor_parallel_size: int, value_bytes: int, context_tokens: int
) -> int:
    """Bytes of the KV cache that one generated token reads: a window's layers read the window only, everywhere."""
    return sum(
        layer_bytes_per_token(machine, layer, tensor_parallel_size, value_bytes)
        * min(layer.sliding_window or context_tokens, context_tokens)
        for layer in layout.layers
    )


def decode_step_seconds(*, bytes_read: float, flops: float, bytes_per_s: float, flops_per_s: float) -> float:
    """The least time of one step: whatever takes longer, reading or computing (the roofline)."""
    return max(bytes_read / bytes_per_s, flops / flops_per_s)


def document_seconds(
    *, fresh_tokens: int, output_tokens: int, prefill_tokens_per_s: float, decode_tokens_per_s: float
) -> float:
    """Seconds of the engine that one document takes: prefill and decode share it, each at its own full rate."""
    return fresh_tokens / prefill_tokens_per_s + output_tokens / decode_tokens_per_s


def mean_ttft_seconds(num_waiting: int, fresh_tokens: int, prefill_tokens_per_s: float) -> float:
    """Mean time to first token of prompts that arrive at once: first come, first served, so half of the whole wait."""
    return num_waiting * fresh_tokens / prefill_tokens_per_s / 2.0
