"""`instead`: what to write for an engine argument that vLLM does not have."""

from __future__ import annotations

from collections.abc import Collection

from .settings import nearest

# Arguments that are ours to set, with what to do instead.
RESERVED = {
    "model": "set INGEST_MODEL",
    "disable_log_stats": "leave it out: the time to first token comes from vLLM's statistics",
}

_SPECULATION = (
    "leave it out, or write speculative_config: {method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4} "
    "with async_scheduling: false, which is its price"
)
_PREEMPTION = "leave it out: vLLM no longer swaps, it computes a preempted document again (watermark keeps blocks free)"
_CACHE = "leave it out: compiled code is kept in the folder VLLM_XLA_CACHE_PATH, whose size has no bound"
_SCHEDULER = "leave it out: vLLM's scheduler no longer has it"
_ASYNC = "leave it out: async scheduling, on by default, took its place"
_PARTIAL = "leave it out: long_prefill_token_threshold bounds what one long prompt takes of a step"
_ROPE = "write hf_overrides: {rope_parameters: {...}}"
_GUIDED = "write structured_outputs_config: {backend: ...}"
_ADAPTER = "leave it out: prompt adapters are gone"
_LORA = "leave it out: LoRA adapters no longer extend the vocabulary"
_CAPTURE = "write max_cudagraph_capture_size"
_TOKENIZERS = "leave it out: tokenizer pools are gone, and ingestq tokenizes by itself"
_SERVER = "leave it out: it belongs to `vllm serve`, and ingestq runs no server"

# Names that people write and vLLM 0.32 does not have: the article's, arguments of former releases (swap_space went with
# 0.18), and options of `vllm serve`. tests/acceptance/test_engine_arguments.py checks both sides against EngineArgs.
_INSTEAD = {
    "speculative_decoding_method": _SPECULATION,
    "num_speculative_tokens": "leave it out, or move it into speculative_config",
    "speculative_method": _SPECULATION,
    "speculative_model": "write speculative_config: {model: ..., num_speculative_tokens: ...}",
    "speculative_draft_tensor_parallel_size": "write speculative_config: {draft_tensor_parallel_size: ...}",
    "speculative_disable_by_batch_size": "leave it out: speculation no longer switches itself off",
    "ngram_prompt_lookup_max": _SPECULATION,
    "ngram_prompt_lookup_min": _SPECULATION,
    "num_lookahead_slots": "leave it out: it follows from speculative_config",
    "swap_space": _PREEMPTION,
    "preemption_mode": _PREEMPTION,
    "cpu_swap_space": _PREEMPTION,
    "compile_cache_max_size": _CACHE,
    "compile_cache_dir": "set the environment variable VLLM_XLA_CACHE_PATH (on TPU) or VLLM_CACHE_ROOT",
    "num_scheduler_steps": _ASYNC,
    "multi_step_stream_outputs": _ASYNC,
    "disable_async_output_proc": _ASYNC,
    "use_v2_block_manager": _SCHEDULER,
    "scheduler_delay_factor": _SCHEDULER,
    "delay_factor": _SCHEDULER,
    "max_num_partial_prefills": _PARTIAL,
    "max_long_partial_prefills": _PARTIAL,
    "max_paddings": _SCHEDULER,
    "device": "leave it out: vLLM runs on the device that it was installed for",
    "task": "leave it out: ingestq generates (runner: generate)",
    "worker_use_ray": "write distributed_executor_backend: ray",
    "engine_use_ray": "leave it out",
    "rope_scaling": _ROPE,
    "rope_theta": _ROPE,
    "max_context_len_to_capture": _CAPTURE,
    "max_seq_len_to_capture": _CAPTURE,
    "cuda_graph_sizes": "write cudagraph_capture_sizes",
    "guided_decoding_backend": _GUIDED,
    "guided_decoding_disable_fallback": _GUIDED,
    "quantization_param_path": "leave it out: scales of the KV cache come with the checkpoint",
    "calculate_kv_scales": "leave it out: scales of the KV cache come with the checkpoint",
    "enable_prompt_adapter": _ADAPTER,
    "max_prompt_adapters": _ADAPTER,
    "max_prompt_adapter_token": _ADAPTER,
    "lora_extra_vocab_size": _LORA,
    "enable_lora_bias": _LORA,
    "long_lora_scaling_factors": _LORA,
    "tokenizer_pool_size": _TOKENIZERS,
    "tokenizer_pool_type": _TOKENIZERS,
    "tokenizer_pool_extra_config": _TOKENIZERS,
    "override_neuron_config": "write additional_config",
    "override_pooler_config": "write pooler_config",
    "disable_mm_preprocessor_cache": "write mm_processor_cache_gb: 0",
    "enable_multimodal_encoder_data_parallel": "write mm_encoder_tp_mode: data",
    "disable_log_requests": "leave it out: prompts are never logged",
    "enable_log_requests": "leave it out: prompts are never logged",
    "gpu_memory_fraction": "write gpu_memory_utilization",
    "host": _SERVER,
    "port": _SERVER,
    "api_key": _SERVER,
    "chat_template": "leave it out: the chat template is the tokenizer's",
    "uvicorn_log_level": _SERVER,
    "disable_frontend_multiprocessing": "set INGEST_CORE=in-process",
    "max_concurrent_requests": "set INGEST_MAX_IN_FLIGHT",
}


def instead(name: str, known: Collection[str]) -> str:
    """The end of a message about an argument that isn't vLLM's: what to write.

    Args:
        known: the names that are.
    """
    plain = name.strip().lower().replace("-", "_").lstrip("_")
    if plain in known:
        return f"write {plain}"
    if plain in _INSTEAD:
        return _INSTEAD[plain]
    hint = nearest(plain, sorted(known))
    return hint if hint.startswith("did you mean") else "it is like none of them (see vllm.EngineArgs)"


def gone() -> dict[str, str]:
    """Every name that `instead` knows by heart, with what it says."""
    return dict(_INSTEAD)
