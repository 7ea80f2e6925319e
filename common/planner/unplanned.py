"""What changes what fits in ways that the planner doesn't know, by name: a plan without it would mislead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Variables by which the TPU runtime quantizes the weights of a checkpoint that isn't quantized (its envs.py).
VARIABLES = ("MOE_REQUANTIZE_WEIGHT_DTYPE", "BF16_LINEAR_REQUANTIZE_PATTERNS")

# vLLM's arguments, and those variables, with the values that change nothing; so do None, 0, false and "".
_UNPLANNED: dict[str, tuple[Any, ...]] = {
    # other weights than config.json says
    "quantization": (),
    "quantization_config": (),
    "config_format": ("auto", "hf"),
    "load_format": ("auto", "hf", "dummy", "pt", "safetensors", "fastsafetensors", "runai_streamer"),
    "enable_lora": (),
    **dict.fromkeys(VARIABLES, ()),
    # weights or KV cache elsewhere
    "cpu_offload_gb": (),
    "offload_backend": ("auto",),
    "offload_group_size": (),
    # more devices, or others, than tensor_parallel_size
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_expert_parallel": (),
    "nnodes": (1,),
    "distributed_executor_backend": ("mp", "uni", "external_launcher"),
    # On TPU it has sharding (also attention data parallel) and quantization (qwix) among other things.
    "additional_config": (),
    # another KV cache
    "num_gpu_blocks_override": (),
    "kv_cache_dtype_skip_layers": (),
    "disable_sliding_window": (),
    "disable_hybrid_kv_cache_manager": (),
}


def unplanned(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an engine's arguments (and variables) that are such."""
    return {name: args[name] for name, idle in _UNPLANNED.items() if args.get(name) and args[name] not in idle}


def told(args: Mapping[str, Any]) -> str:
    """How a message names them."""
    return ", ".join(f"{name}={value!r}" for name, value in args.items())
