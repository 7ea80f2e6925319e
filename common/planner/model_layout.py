"""`read_layout`: a Hugging Face config.json -> `ModelLayout`, of the families listed in `_FAMILIES`; never a guess.

Shapes and defaults are those of transformers 5.19's configuration and modeling files of each family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UnknownLayout
from .config_reader import ConfigReader
from .model_shapes import Experts, LayerLayout, ModelLayout
from .model_towers import tower_parameters

__all__ = ["Experts", "LayerLayout", "ModelLayout", "load_layout", "read_layout", "shipped_models"]

# Deeper than any model; bounds the work on a hostile file.
_MAX_LAYERS = 1000

# Largest config.json that is read; real ones have a few KB.
_MAX_CONFIG_BYTES = 4 * 2**20

_WINDOWED = {"sliding_attention": True, "full_attention": False}


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a model_type's modeling file fixes."""

    # Norms of the hidden size in each layer.
    norms: int = 2
    # Whether queries and keys have a norm of the head size each.
    qk_norm: bool = False
    # Whether queries, keys and values have a bias whatever the config says.
    qkv_bias: bool = False
    # tie_word_embeddings and head_dim where config.json leaves them out; None: hidden size / query heads.
    tied: bool = False
    head_dim: int | None = None
    # One layer in this many attends to everything, the others to a window, where layer_types is missing.
    full_every: int | None = None
    # The last layer attends to everything, whatever layer_types says.
    last_is_full: bool = False
    # Every layer has the window, if there is one; else those from max_window_layers on.
    window_everywhere: bool = False
    # use_sliding_window has to be true for windows to count.
    window_flag: bool = True
    # Name of the number of experts in config.json, if the family has any.
    num_experts_key: str | None = None
    top_k_key: str = "num_experts_per_tok"
    expert_width_key: str = "moe_intermediate_size"
    # Whether layers with experts keep a dense MLP as well.
    dense_beside_experts: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(window_everywhere=True, window_flag=False),
    "mixtral": _Family(
        window_everywhere=True,
        window_flag=False,
        num_experts_key="num_local_experts",
        expert_width_key="intermediate_size",
    ),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True, head_dim=128),
    "qwen3_moe": _Family(qk_norm=True, num_experts_key="num_experts", window_everywhere=True),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(norms=4, tied=True, head_dim=256, full_every=2),
    "gemma3_text": _Family(norms=4, qk_norm=True, tied=True, head_dim=256, full_every=6),
    "gemma4_text": _Family(
        norms=4,
        qk_norm=True,
        tied=True,
        head_dim=256,
        full_every=6,
        last_is_full=True,
        num_experts_key="num_experts",
        top_k_key="top_k_experts",
        dense_beside_experts=True,
    ),
}

# Keys whose presence means state or attention that isn't counted here -> what it is.
_FOREIGN_KEYS = {
    "kv_lora_rank": "multi-head latent attention",
    "mamba_d_state": "Mamba layers",
    "ssm_cfg": "Mamba layers",
    "linear_num_key_heads": "linear attention layers",
    "attention_chunk_size": "chunked attention",
    "num_shared_experts": "shared experts",
    "n_shared_experts": "shared experts",
    "shared_expert_intermediate_size": "shared experts",
    "quantization_config": "quantized weights",
    "compression_config": "quantized weights",
}


def read_layout(config: Mapping[str, Any], name: str) -> ModelLayout:
    """The layout that a config.json describes, its text_config nested or not.

    Args:
        config: the parsed file.
        name: what to call the model.

    Raises:
        UnknownLayout: a family, a layer or a key that isn't understood, or a value that is missing or none.
    """
    whole = ConfigReader(config, name)
    text = whole.section("text_config") or whole
    model_type = text.text("model_type")
    _refuse_foreign(whole, text, model_type)
    family = _FAMILIES[model_type]
    experts = _experts(text, family)
    layers = tuple(
        _layer(text, family, experts, index, windowed) for index, windowed in enumerate(_windows(text, family))
    )
    hidden = text.integer("hidden_size")
    tied = text.flag("tie_word_embeddings", whole.flag("tie_word_embeddings", family.tied))
    inputs = text.integer("hidden_size_per_layer_input", 0, minimum=0)
    return ModelLayout(
        name=name,
        model_type=whole.text("model_type", model_type),
        dtype=_dtype(whole, text),
        hidden_size=hidden,
        vocab_size=text.integer("vocab_size"),
        num_query_heads=text.integer("num_attention_heads"),
        max_position_embeddings=_max_positions(text, model_type),
        layers=layers,
        experts=experts,
        tied_embeddings=tied,
        per_layer_embedding_parameters=_per_layer_width(text)
        * text.integer("vocab_size_per_layer_input", 1, minimum=0),
        other_parameters=hidden + (hidden * _per_layer_width(text) + inputs),
        tower_parameters=tower_parameters(whole, hidden),
    )


def load_layout(model: str) -> ModelLayout:
    """The layout of a shipped name, a hub id of a shipped model, a folder with a config.json, or such a file.

    Raises:
        UnknownLayout: none of these, not JSON, or `read_layout` doesn't understand it.
    """
    path = _config_path(model)
    if path is not None:
        return read_layout(_parse(_read(path, model), model), model)
    shipped = _shipped_name(model)
    if shipped not in shipped_models():
        raise UnknownLayout(
            model,
            f"neither a folder with a config.json, nor such a file, nor one of {', '.join(shipped_models())}; "
            f"download the model's config.json and give its path",
        )
    return read_layout(_parse((files(__package__) / "models" / f"{shipped}.json").read_bytes(), shipped), shipped)


def shipped_models() -> list[str]:
    """Names that `load_layout` knows without any file, sorted."""
    return sorted(
        file.name.removesuffix(".json")
        for file in (files(__package__) / "models").iterdir()
        if file.name.endswith(".json")
    )


def _config_path(model: str) -> Path | None:
    """The config.json that `model` names as a folder or a file; None if it is a name of another kind."""
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        return path if path.suffix == ".json" and path.is_file() else None
    except (OSError, ValueError):  # too long, or a NUL in it
        return None


def _read(path: Path, model: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UnknownLayout(model, f"{path} can't be read ({error})") from error


def _shipped_name(model: str) -> str:
    """google/gemma-4-26B-A4B-it -> gemma-4-26b-a4b: without owner, Meta- and the suffix of a tuned variant."""
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    for suffix in ("-instruct", "-it", "-base"):
        name = name.removesuffix(suffix)
    return name


def _parse(data: bytes, model: str) -> Mapping[str, Any]:
    if len(data) > _MAX_CONFIG_BYTES:
        raise UnknownLayout(model, f"config.json has more than {_MAX_CONFIG_BYTES} bytes; that is no model's")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnknownLayout(model, f"config.json is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UnknownLayout(model, f"config.json holds a {type(config).__name__}, not a mapping")
    return config


def _refuse_foreign(whole: ConfigReader, text: ConfigReader, model_type: str) -> None:
    """Raises for what would make a plan wrong."""
    for reader in (whole, text):
        for key, meaning in _FOREIGN_KEYS.items():
            if reader.values.get(key):
                raise reader.unknown(f"{key} means {meaning}, which are not counted here; plan with a model without")
    if whole.flag("is_encoder_decoder", False) or text.values.get("use_bidirectional_attention") in ("all", True):
        raise whole.unknown("it has an encoder, which needs no KV cache of this kind; only decoders are planned")
    if model_type not in _FAMILIES:
        raise text.unknown(
            f"model_type={model_type!r} is none of {', '.join(sorted(_FAMILIES))}; if it has the shapes of one "
            f"of them, give a config.json with that model_type"
        )


def _dtype(whole: ConfigReader, text: ConfigReader) -> str:
    """transformers 5 calls it dtype, 4 torch_dtype; a file without either was saved as float32."""
    for reader in (text, whole):
        for key in ("dtype", "torch_dtype"):
            if reader.values.get(key) is not None:
                return reader.text(key)
    return "float32"


def _max_positions(text: ConfigReader, model_type: str) -> int:
    """Positions as vLLM counts them: it multiplies them where RoPE is stretched and config.json has those before.

    Source: vllm/config/model.py _get_and_verify_max_len; Gemma 3's are those after.
    """
    positions = text.integer("max_position_embeddings")
    rope = text.section("rope_parameters") or text.section("rope_scaling")
    if rope is None or rope.values.get("rope_type", rope.values.get("type")) not in ("linear", "dynamic"):
        return positions
    return positions if model_type == "gemma3_text" else int(positions * rope.number("factor", 1))


def _windows(text: ConfigReader, family: _Family) -> list[bool]:
    """For each layer, whether it attends to a window only."""
    windows = _windows_as_configured(text, family)
    return [*windows[:-1], windows[-1] and not family.last_is_full]


def _windows_as_configured(text: ConfigReader, family: _Family) -> list[bool]:
    num_layers = text.integer("num_hidden_layers")
    if num_layers > _MAX_LAYERS:
        raise text.unknown(f"num_hidden_layers={num_layers} is above {_MAX_LAYERS}")
    kinds = text.texts("layer_types")
    if kinds is not None:
        return _windows_of_types(text, kinds, num_layers)
    if family.full_every is not None:
        every = text.integer("sliding_window_pattern", family.full_every)
        return [(index + 1) % every != 0 for index in range(num_layers)]
    if text.values.get("sliding_window") is None or not text.flag("use_sliding_window", not family.window_flag):
        return [False] * num_layers
    first = 0 if family.window_everywhere else text.integer("max_window_layers", minimum=0)
    return [index >= first for index in range(num_layers)]


def _windows_of_types(text: ConfigReader, kinds: list[str], num_layers: int) -> list[bool]:
    unknown = sorted(set(kinds) - set(_WINDOWED))
    if unknown:
        raise text.unknown(f"layer_types has {', '.join(unknown)}; only {' and '.join(_WINDOWED)} are understood")
    if len(kinds) != num_layers:
        raise text.unknown(f"layer_types has {len(kinds)} entries and num_hidden_layers={num_layers}")
    return [_WINDOWED[kind] for kind in kinds]


def _experts(text: ConfigReader, family: _Family) -> Experts | None:
    if family.num_experts_key is None:
        return None
    if family.dense_beside_experts and not text.flag("enable_moe_block", False):
        return None
    num_experts, top_k = text.integer(family.num_experts_key), text.integer(family.top_k_key)
    if top_k > num_experts:
        raise text.unknown(f"{family.top_k_key}={top_k} is above {family.num_experts_key}={num_experts}")
    return Experts(num_experts=num_experts, width=text.integer(family.expert_width_key), top_k=top_k)


def _layer(text: ConfigReader, family: _Family, experts: Experts | None, index: int, windowed: bool) -> LayerLayout:
    hidden = text.integer("hidden_size")
    shares_kv = _shares_kv(text, index)
    num_kv_heads, head_dim = _heads(text, family, index, windowed)
    has_experts = experts is not None and _has_experts(text, index)
    widen = 2 if shares_kv and text.flag("use_double_wide_mlp", False) else 1
    dense = not has_experts or family.dense_beside_experts
    return LayerLayout(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=text.integer("sliding_window") if windowed else None,
        shares_kv=shares_kv,
        attention_parameters=_attention_parameters(text, family, num_kv_heads, head_dim, windowed),
        mlp_parameters=_mlp_parameters(text, hidden, widen) if dense else 0,
        has_experts=has_experts,
        router_parameters=hidden * experts.num_experts if experts and has_experts else 0,
        other_parameters=_other_parameters(text, family, experts if has_experts else None, head_dim),
    )


def _shares_kv(text: ConfigReader, index: int) -> bool:
    """Gemma 4 E2B, E4B: the last layers read the keys and values of the last layer of their kind before them."""
    num_layers, num_shared = text.integer("num_hidden_layers"), text.integer("num_kv_shared_layers", 0, minimum=0)
    if num_shared >= num_layers:
        raise text.unknown(f"num_kv_shared_layers={num_shared} leaves none of num_hidden_layers={num_layers} to share")
    return index >= num_layers - num_shared


def _has_experts(text: ConfigReader, index: int) -> bool:
    """Qwen3-MoE: transformers' Qwen3MoeDecoderLayer; every layer elsewhere."""
    step = text.integer("decoder_sparse_step", 1)
    return index not in text.integers("mlp_only_layers", []) and (index + 1) % step == 0


def _heads(text: ConfigReader, family: _Family, index: int, windowed: bool) -> tuple[int, int]:
    """KV heads and head size of one layer: Gemma 4 has others in its global layers."""
    query_heads = text.integer("num_attention_heads")
    num_kv_heads = text.integer("num_key_value_heads", query_heads if family is _FAMILIES["llama"] else None)
    head_dim = text.integer("head_dim", family.head_dim or text.integer("hidden_size") // query_heads)
    override = (text.section("per_layer_config") or _EMPTY).section(str(index))
    if override is not None:  # transformers from 5.15 on
        return override.integer("num_key_value_heads", num_kv_heads), override.integer("head_dim", head_dim)
    if family is _FAMILIES["gemma4_text"] and not windowed:
        head_dim = text.integer("global_head_dim", 512)
        if text.flag("attention_k_eq_v", False):
            num_kv_heads = text.integer("num_global_key_value_heads", num_kv_heads)
    return num_kv_heads, head_dim


def _attention_parameters(text: ConfigReader, family: _Family, num_kv_heads: int, head_dim: int, windowed: bool) -> int:
    """Queries, keys, values and output, with biases; keys that are the values as well are stored once."""
    hidden, query = text.integer("hidden_size"), text.integer("num_attention_heads") * head_dim
    shared = text.flag("attention_k_eq_v", False) and not windowed
    keys_and_values = num_kv_heads * head_dim * (1 if shared else 2)
    bias = 0
    if family.qkv_bias or text.flag("attention_bias", False):
        bias = query + keys_and_values + (0 if family.qkv_bias else hidden)
    return hidden * (2 * query + keys_and_values) + bias


def _mlp_parameters(text: ConfigReader, hidden: int, widen: int) -> int:
    """Gate, up and down projection."""
    width = text.integer("intermediate_size") * widen
    return 3 * hidden * width + (2 * width + hidden if text.flag("mlp_bias", False) else 0)


def _other_parameters(text: ConfigReader, family: _Family, experts: Experts | None, head_dim: int) -> int:
    """Norms and scales of a layer, and Gemma 4's per-layer inputs and the norms around its experts."""
    hidden, inputs = text.integer("hidden_size"), text.integer("hidden_size_per_layer_input", 0, minimum=0)
    norms = family.norms * hidden + (2 * head_dim if family.qk_norm else 0)
    per_layer = 2 * hidden * inputs + hidden if inputs else 0
    around_experts = 4 * hidden + experts.num_experts if experts and family.dense_beside_experts else 0
    return norms + per_layer + around_experts


def _per_layer_width(text: ConfigReader) -> int:
    """Columns of Gemma 4 E4B's table of per-layer inputs."""
    return text.integer("num_hidden_layers") * text.integer("hidden_size_per_layer_input", 0, minimum=0)


_EMPTY = ConfigReader({}, "")
