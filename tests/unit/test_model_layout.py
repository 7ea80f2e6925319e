"""Layouts from config.json, against the models that transformers builds from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestq.common.errors import UnknownLayout
from ingestq.common.planner.hardware import machine
from ingestq.common.planner.model_layout import ModelLayout, load_layout, read_layout, shipped_models
from ingestq.common.planner.plan import EngineShape, Workload, make_plan

SHIPPED = ["gemma-4-26b-a4b", "gemma-4-31b", "gemma-4-e4b", "llama-3.1-8b", "qwen3-30b-a3b"]

# Small, so that each quirk of a family is worth something in the count.
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 4096,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases, tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "head_dim": 16},
    "qwen3": {"attention_bias": True},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "gemma": {},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64},
    "gemma4_text": {"sliding_window": 64, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "gemma4_text of the 26B's kind": {
        "model_type": "gemma4_text",
        "sliding_window": 64,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_text of the E4B's kind": {
        "model_type": "gemma4_text",
        "sliding_window": 64,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 256,
        "attention_bias": True,
    },
}

# Every key that is read.
KEYS = sorted(
    {key for config in FAMILIES.values() for key in config}
    | set(SHAPE)
    | {"text_config", "vision_config", "audio_config", "layer_types", "per_layer_config", "num_kv_shared_layers"}
    | {"dtype", "torch_dtype", "sliding_window_pattern", "use_double_wide_mlp", "is_encoder_decoder"}
)


def text_config(family: str) -> dict[str, Any]:
    return {**SHAPE, "model_type": family, **FAMILIES[family]}


def transformers_config(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers", reason="the independent count is transformers'")
    return transformers.AutoConfig.for_model(**config)


def transformers_count(config: Any, *, multimodal: bool = False) -> int:
    """Parameters of the real model, built without memory."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def keys_and_values_of_sharing_layers(layout: ModelLayout) -> int:
    """Projections and norms that the checkpoint and vLLM have in layers that share KV, and transformers leaves out."""
    return sum(
        2 * layout.hidden_size * layer.num_kv_heads * layer.head_dim + layer.head_dim
        for layer in layout.layers
        if layer.shares_kv
    )


def test_the_shipped_models_are_those_of_the_issue():
    assert shipped_models() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_has_as_many_parameters_as_transformers_builds_from_its_config(name):
    layout = load_layout(name)
    path = Path(__file__).parents[2] / "common" / "planner" / "models" / f"{name}.json"
    config = transformers_config(json.loads(path.read_text()))

    count = transformers_count(config, multimodal=name.startswith("gemma"))

    assert layout.num_parameters - keys_and_values_of_sharing_layers(layout) == count


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("gemma-4-26b-a4b", 25.2e9, 3.8e9),
        ("gemma-4-31b", 30.7e9, 30.7e9),
        ("llama-3.1-8b", 8.03e9, 7.5e9),
        ("qwen3-30b-a3b", 30.5e9, 3.0e9),
    ],
)
def test_counts_of_the_decoder_are_the_published_ones(name, total, active):
    layout = load_layout(name)

    assert layout.num_parameters - layout.tower_parameters == pytest.approx(total, rel=0.005)
    assert layout.active_parameters == pytest.approx(active, rel=0.015)


def test_e4b_is_8_billion_with_its_towers_and_tables():
    assert load_layout("gemma-4-e4b").num_parameters == pytest.approx(8.0e9, rel=0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_never_seen_is_counted_as_transformers_builds_it(family):
    config = text_config(family)

    layout = read_layout(config, "unseen")

    assert layout.num_parameters == transformers_count(transformers_config(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_heads_of_a_model_never_seen_are_those_of_transformers(family):
    config = text_config(family)
    theirs = transformers_config(config)

    layers = read_layout(config, "unseen").layers

    kinds = getattr(theirs, "layer_types", None)
    everywhere = "sliding_attention" if getattr(theirs, "sliding_window", None) else "full_attention"
    expected = kinds or [everywhere] * len(layers)
    assert ["sliding_attention" if layer.sliding_window else "full_attention" for layer in layers] == expected
    assert {layer.sliding_window for layer in layers} <= {None, 64}
    if kinds and getattr(theirs, "per_layer_config", None):
        per_layer = theirs.per_layer_config
        heads = [(per_layer[i].num_key_value_heads, per_layer[i].head_dim) for i in range(len(layers))]
        assert [(layer.num_kv_heads, layer.head_dim) for layer in layers] == heads


def test_a_multimodal_gemma_3_counts_its_vision_tower():
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 56,
        "vision_use_head": False,
    }
    config = {
        "model_type": "gemma3",
        "text_config": text_config("gemma3_text"),
        "vision_config": vision,
        "mm_tokens_per_image": 4,
    }

    layout = read_layout(config, "unseen")

    assert layout.num_parameters == transformers_count(transformers_config(config), multimodal=True)


def test_layers_that_share_keys_and_values_keep_none():
    layout = load_layout("gemma-4-e4b")

    assert len(layout.kv_layers) == 24
    assert [layer.shares_kv for layer in layout.layers].count(True) == 18


def test_a_config_saved_by_a_new_transformers_is_the_same_model(tmp_path):
    config = text_config("gemma4_text of the 26B's kind")
    transformers_config(config).save_pretrained(tmp_path)
    assert "per_layer_config" in json.loads((tmp_path / "config.json").read_text())

    saved = load_layout(str(tmp_path))

    assert saved.layers == read_layout(config, "same").layers
    assert saved.num_parameters == read_layout(config, "same").num_parameters


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("google/gemma-4-26B-A4B-it", "gemma-4-26b-a4b"),
        ("GEMMA-4-31B", "gemma-4-31b"),
        ("google/gemma-4-E4B-it", "gemma-4-e4b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
    ],
)
def test_hub_ids_of_shipped_models_are_known(name, shipped):
    assert load_layout(name).name == shipped


def test_a_folder_and_a_file_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(text_config("llama")))

    assert load_layout(str(tmp_path)).layers == load_layout(str(tmp_path / "config.json")).layers


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3' is none of"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"layer_types": ["linear_attention"] * 7}, "layer_types has linear_attention; only"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries and num_hidden_layers=7"),
        ({"mamba_d_state": 128}, "Mamba layers"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized weights"),
        ({"hidden_size": None}, "hidden_size is missing; give the model's complete config.json"),
        ({"hidden_size": "96"}, "hidden_size='96' is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not a whole number"),
        ({"num_hidden_layers": 10**6}, "is above 1000"),
        ({"vocab_size": -1}, "vocab_size=-1 is not a whole number"),
        ({"vocab_size": 10**30}, "is not a whole number from 1 to"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' is neither true nor false"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision_config has model_type='pixtral'"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 8},
            "is above",
        ),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers=7 leaves none of num_hidden_layers=7 to share"),
        (
            {"audio_config": {"model_type": "gemma4_audio", "hidden_size": 8, "output_proj_dims": 8}},
            "subsampling_conv_channels is missing",
        ),
        ({"vision_config": []}, "vision_config=[] is not a mapping"),
        ({"text_config": 7}, "text_config=7 is not a mapping"),
        ({"dtype": 16}, "dtype=16 is not a text"),
    ],
)
def test_what_is_not_understood_is_refused_and_says_what(changes, says):
    config = {**text_config("llama"), **changes}

    with pytest.raises(UnknownLayout) as refused:
        read_layout(config, "odd")

    assert says in str(refused.value)
    assert str(refused.value).startswith("model 'odd': ")
    assert refused.value.model == "odd"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), junk, max_size=3))
def test_whatever_a_config_says_it_is_planned_or_refused(family, changes):
    try:
        layout = read_layout({**text_config(family), **changes}, "odd")
    except UnknownLayout:
        return
    for chips in ("v6e-4", "h100"):
        make_plan(layout, machine(chips), Workload(prompt_tokens=100, output_tokens=10), EngineShape())


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"model_type": {}}', "[" * 100_000, "\x00"])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(UnknownLayout):
        load_layout(str(tmp_path))


def test_a_name_that_is_nothing_says_what_there_is():
    with pytest.raises(UnknownLayout, match=r"neither a folder .* gemma-4-26b-a4b, .* give its path"):
        load_layout("acme/unheard-of-7b")


@pytest.mark.parametrize("name", ["", "..", "/", "../secret", "a\x00b", "x" * 5000])
def test_odd_names_are_refused_not_opened(name):
    with pytest.raises(UnknownLayout):
        load_layout(name)


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 16_384),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e4}}, 10_240),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 4096),
        ("gemma3_text", {"sliding_window": 64, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 4096),
        ("gemma3_text", {"sliding_window": 64, "rope_parameters": {"full_attention": {"rope_type": "linear"}}}, 4096),
    ],
)
def test_positions_are_stretched_as_vllm_does(family: str, rope: dict[str, Any], expected: int) -> None:
    """vllm 0.32, config/model.py _get_and_verify_max_len: EngineArgs took 16000 tokens of the first of these."""
    assert read_layout({**SHAPE, "model_type": family, **rope}, "m").max_position_embeddings == expected


@pytest.mark.parametrize("factor", [0.5, True, "2", 2**50])
def test_a_stretch_that_is_none_is_not_understood(factor: Any) -> None:
    rope = {"rope_scaling": {"type": "linear", "factor": factor}}
    with pytest.raises(UnknownLayout, match="rope_scaling: factor="):
        read_layout({**SHAPE, "model_type": "llama", **rope}, "m")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_are_not_planned(key: str) -> None:
    with pytest.raises(UnknownLayout, match=f"{key} means quantized weights"):
        read_layout({**SHAPE, "model_type": "llama", key: {"quant_method": "fp8"}}, "m")
