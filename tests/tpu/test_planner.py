"""The planner's TPU rules are the runtime's: its formulas against functions of tpu_inference, over many shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from jax.sharding import AbstractMesh
from tpu_inference.layers.common.process_weights.moe_weights import get_w13_padding_config
from tpu_inference.layers.vllm.backends.flash_attn import PallasAttentionBackend
from tpu_inference.models.common import model_loader
from tpu_inference.runner.kv_cache import get_attention_page_size_bytes
from tpu_inference.runner.utils import build_token_paddings, get_req_paddings
from tpu_inference.utils import get_padded_head_dim, get_padded_num_heads

from ingestq.common.planner import capacity
from ingestq.common.planner.hardware import MACHINES
from ingestq.common.planner.model_layout import load_layout, shipped_models

KV_DTYPES = ["auto", "bfloat16", "fp8", "fp8_e5m2"]
MAX_MODEL_LENS = [128, 1000, 2304, 4096, 8192, 8193, 8704, 16640, 33280, 131072]
MAX_NUM_SEQS = [1, 8, 12, 16, 100, 128, 192, 256, 1000, 1024]


def runtime_bytes_per_token(num_kv_heads: int, head_dim: int, tensor_parallel_size: int, kv_dtype: str) -> float:
    """Of one layer over all devices, by the runtime's own arithmetic; blocks of 16."""
    page = get_attention_page_size_bytes(
        AbstractMesh((1, tensor_parallel_size), ("data", "model")),
        block_size=16,
        num_kv_heads=get_padded_num_heads(num_kv_heads, tensor_parallel_size),
        head_size=get_padded_head_dim(head_dim),
        dtype="bfloat16" if kv_dtype == "auto" else kv_dtype,
        use_mla=False,
    )
    return page / 16


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 512])
def test_a_layers_bytes_are_the_runtimes(kv_dtype: str, head_dim: int, facts: dict[str, Any]) -> None:
    shapes = [(heads, tp) for heads in (1, 2, 4, 8, 16, 32) for tp in (1, 2, 4, 8)]
    for heads, tp in shapes:
        planned = capacity.tpu_layer_bytes_per_token(heads, head_dim, tp, 2 if kv_dtype in ("auto", "bfloat16") else 1)
        assert planned == runtime_bytes_per_token(heads, head_dim, tp, kv_dtype), (heads, tp)
    facts["kv_shapes_compared"] = facts.get("kv_shapes_compared", 0) + len(shapes)


@pytest.mark.parametrize("model", shipped_models())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4, 8])
def test_a_shipped_models_bytes_are_the_runtimes(model: str, kv_dtype: str, tensor_parallel_size: int) -> None:
    layout = load_layout(model)

    planned = capacity.kv_bytes_per_token(
        layout, MACHINES["v6e-8"], tensor_parallel_size=tensor_parallel_size, kv_cache_dtype=kv_dtype
    )

    assert planned == sum(
        runtime_bytes_per_token(layer.num_kv_heads, layer.head_dim, tensor_parallel_size, kv_dtype)
        for layer in layout.kv_layers
    )


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("gemma", "GemmaForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("gemma4", "Gemma4ForConditionalGeneration"),
        ("gemma4_text", "Gemma4ForCausalLM"),
    ],
)
def test_the_models_that_keep_no_windows_are_those_that_the_runtime_has_in_jax(
    model_type: str, architecture: str
) -> None:
    config: Any = SimpleNamespace(architectures=[architecture])
    try:
        model_loader._get_model_architecture(config)
        in_jax = architecture not in model_loader._VLLM_PREFERRED_ARCHITECTURES
    except model_loader.UnsupportedArchitectureError:  # it goes on with vLLM's torch code
        in_jax = False

    assert (model_type in capacity._JAX_MODELS) == in_jax


@pytest.mark.parametrize(("kv_dtype", "expected"), [("bfloat16", 245_760), ("fp8_e5m2", 143_360)])
def test_gemma_4_26b_takes_what_the_article_did_not_count(kv_dtype: str, expected: int) -> None:
    layers = load_layout("gemma-4-26b-a4b").kv_layers

    assert sum(runtime_bytes_per_token(item.num_kv_heads, item.head_dim, 4, kv_dtype) for item in layers) == expected


@pytest.mark.parametrize("max_model_len", MAX_MODEL_LENS)
def test_the_block_size_is_the_runtimes(max_model_len: int) -> None:
    for max_num_seqs in MAX_NUM_SEQS:
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=max_model_len),
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        )
        # platforms/tpu_platform.py takes the larger of the two.
        expected = max(PallasAttentionBackend.get_page_size(config), PallasAttentionBackend.get_min_page_size(config))

        planned = capacity.block_size(MACHINES["v6e-4"], max_model_len=max_model_len, max_num_seqs=max_num_seqs)

        assert planned == expected, max_num_seqs


@pytest.mark.parametrize("max_num_batched_tokens", [16, 64, 100, 512, 4096, 8192, 16640, 32768])
def test_the_token_buckets_are_the_runtimes(max_num_batched_tokens: int) -> None:
    assert capacity.token_buckets(max_num_batched_tokens) == build_token_paddings(16, max_num_batched_tokens, 0)


@pytest.mark.parametrize("max_num_seqs", [8, 12, 16, 100, 128, 192, 256, 1024])
def test_the_request_buckets_are_the_runtimes(max_num_seqs: int) -> None:
    assert capacity.request_buckets(max_num_seqs) == get_req_paddings(8, max_num_seqs)


@pytest.mark.parametrize("width", [704, 768, 1024, 1408, 2048])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4, 8])
def test_experts_are_padded_as_the_runtime_does(width: int, tensor_parallel_size: int) -> None:
    config = get_w13_padding_config(width, tensor_parallel_size)

    assert capacity.padded_expert_width(width, tensor_parallel_size) == config.padded_intermediate_size
