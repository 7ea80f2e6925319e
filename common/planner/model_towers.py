"""Parameters of the vision and audio towers that a multimodal config.json describes; counted, not planned for."""

from __future__ import annotations

from collections.abc import Callable

from .config_reader import ConfigReader


def tower_parameters(config: ConfigReader, text_hidden_size: int) -> int:
    """Of every tower and its projection to the decoder; 0 for a text model.

    Raises:
        UnknownLayout: a tower of a kind that isn't known here; its size would be missing from the weights.
    """
    total = 0
    for key in ("vision_config", "audio_config"):
        tower = config.section(key)
        if tower is None:
            continue
        kind = tower.text("model_type", _DEFAULT_KINDS.get((config.text("model_type"), key), ""))
        if kind not in _TOWERS:
            raise config.unknown(
                f"{key} has model_type={kind!r}, and only {', '.join(sorted(_TOWERS))} are counted; "
                f"give the model's text_config alone and leave room for the tower"
            )
        total += _TOWERS[kind](tower, text_hidden_size)
    return total


def _gemma4_vision(tower: ConfigReader, text_hidden_size: int) -> int:
    """transformers' Gemma4VisionModel and Gemma4MultimodalEmbedder."""
    hidden, head_dim = tower.integer("hidden_size"), tower.integer("head_dim")
    heads = tower.integer("num_attention_heads") + tower.integer("num_key_value_heads")
    attention = 2 * hidden * heads * head_dim + 2 * head_dim
    layer = attention + 3 * hidden * tower.integer("intermediate_size") + 4 * hidden
    patches = 3 * tower.integer("patch_size") ** 2 * hidden + 2 * tower.integer("position_embedding_size") * hidden
    return tower.integer("num_hidden_layers") * layer + patches + hidden * text_hidden_size


def _gemma4_audio(tower: ConfigReader, text_hidden_size: int) -> int:
    """transformers' Gemma4AudioModel (a conformer on 128 mel bins) and Gemma4MultimodalEmbedder."""
    hidden, output = tower.integer("hidden_size"), tower.integer("output_proj_dims")
    channels = tower.integers("subsampling_conv_channels")
    if len(channels) != 2:
        raise tower.unknown(f"subsampling_conv_channels={channels!r} are not two; the tower is not counted")
    first, second = channels
    subsampling = 9 * first + first + 9 * first * second + second + second * 32 * hidden  # 128 bins halved twice
    feed_forward = 2 * 4 * hidden * hidden + 2 * hidden
    attention = 5 * hidden * hidden + hidden // tower.integer("num_attention_heads")
    convolution = 3 * hidden * hidden + tower.integer("conv_kernel_size") * hidden + 2 * hidden
    layer = 2 * feed_forward + attention + convolution + 3 * hidden
    projection = hidden * output + output + output * text_hidden_size
    return subsampling + tower.integer("num_hidden_layers") * layer + projection


def _siglip_vision(tower: ConfigReader, text_hidden_size: int) -> int:
    """transformers' SiglipVisionModel without pooling head and Gemma3MultiModalProjector."""
    hidden, width, patch = tower.integer("hidden_size"), tower.integer("intermediate_size"), tower.integer("patch_size")
    if tower.flag("vision_use_head", True):
        raise tower.unknown("vision_use_head is not false: a SigLIP tower with a pooling head is not counted")
    attention = 4 * (hidden * hidden + hidden)
    layer = attention + 2 * hidden * width + width + hidden + 4 * hidden
    patches = 3 * patch**2 * hidden + hidden + (tower.integer("image_size") // patch) ** 2 * hidden
    projection = hidden * text_hidden_size + hidden
    return tower.integer("num_hidden_layers") * layer + patches + 2 * hidden + projection


_TOWERS: dict[str, Callable[[ConfigReader, int], int]] = {
    "gemma4_vision": _gemma4_vision,
    "gemma4_audio": _gemma4_audio,
    "siglip_vision_model": _siglip_vision,
}

# What transformers takes where a tower doesn't say.
_DEFAULT_KINDS = {
    ("gemma4", "vision_config"): "gemma4_vision",
    ("gemma4", "audio_config"): "gemma4_audio",
    ("gemma3", "vision_config"): "siglip_vision_model",
}
