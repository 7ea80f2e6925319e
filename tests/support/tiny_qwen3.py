"""A tiny random Qwen3: the TPU runtime runs it on a CPU (`tpu_on_cpu.py`), and not the experts of a Gemma 4."""

from pathlib import Path
from typing import Any

from .models import built

TINY_QWEN3: dict[str, Any] = {
    "vocab_size": 49152,  # SmolLM2's tokenizer
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,  # a row of the TPU's vector unit: nothing is padded
    "max_position_embeddings": 4096,
    # Tied embeddings, or weights as small as usual, make a random model repeat its last token, whatever it attends to.
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


def tiny_qwen3(cache_dir: Path | None = None) -> Path:
    """A Hugging Face folder: always the same random weights, with SmolLM2's tokenizer and chat template.

    Built once, and then found in `cache_dir` (default: the demo's) under a digest of what it is made of.
    """
    return built("tiny-qwen3", TINY_QWEN3, _qwen3, cache_dir)


def _qwen3(config: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**config))
