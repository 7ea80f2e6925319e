"""The planner against real vLLM: the KV cache that its CPU engine reports, and the groups that it makes on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ingestq.common.planner.capacity import kv_cache_shape
from ingestq.common.planner.hardware import machine
from ingestq.common.planner.model_layout import load_layout, shipped_models
from ingestq.common.planner.plan import EngineShape, Workload, make_plan
from ingestq.workers.startup.fit import plan_engine
from support.models import TINY_GEMMA4

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

GIB = 2**30
SHAPE = {"max_model_len": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 512}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma4": {**TINY_GEMMA4, "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]},
    "llama": {**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen3": {
        **TINY,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    # Two kinds of layers in unequal numbers: one global, seven with a window.
    "gemma3": {
        **TINY,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "sliding_window": 256,
    },
}


def engine_report(folder: Path, dtype: str, **args: Any) -> dict[str, int]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "support.kv_report", str(folder), json.dumps({"dtype": dtype, **SHAPE, **args})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize(
    ("model", "dtype"), [("gemma4", "float32"), ("gemma3", "float32"), ("llama", "bfloat16"), ("qwen3", "float32")]
)
def test_the_cpu_engine_has_the_kv_tokens_of_1_gib_that_the_plan_says(tmp_path, model, dtype):
    (tmp_path / "config.json").write_text(json.dumps({**MODELS[model], "dtype": dtype}))
    plan = make_plan(
        load_layout(str(tmp_path)),
        machine("cpu", kv_cache_bytes=GIB),
        Workload(prompt_tokens=1024, output_tokens=64),
        EngineShape(dtype=dtype, **SHAPE),
    )

    report = engine_report(tmp_path, dtype)

    assert plan.fits
    assert report["num_tokens"] == plan["kv_tokens"].value
    assert report["block_size"] == plan["block_size"].value


def test_the_context_that_vllm_takes_for_minus_one_is_the_plan_s(tmp_path):
    """1 GiB of the 4 GiB that the model's context takes: vLLM fits it to the cache, and so does the worker's plan."""
    config = {**MODELS["llama"], "max_position_embeddings": 4 * GIB // (3 * 2 * 2 * 32 * 4)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = {"dtype": "float32", **SHAPE, "max_model_len": -1}
    plan = plan_engine(config, args, machine("cpu", kv_cache_bytes=GIB))

    report = engine_report(tmp_path, "float32", max_model_len=-1)

    assert plan.problems == ()
    assert report["max_model_len"] == plan.shape.max_model_len < config["max_position_embeddings"]
    assert report["num_tokens"] == plan["kv_tokens"].value


@pytest.mark.parametrize("model", shipped_models())
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_groups_of_a_gpu_s_kv_cache_are_those_that_vllm_makes(model, size):
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

    layout = load_layout(model)
    specs: dict[str, KVCacheSpec] = {}
    for index, layer in enumerate(layout.kv_layers):
        heads = max(1, layer.num_kv_heads // size)
        common = {"block_size": 16, "num_kv_heads": heads, "head_size": layer.head_dim, "dtype": torch.bfloat16}
        window = layer.sliding_window
        specs[str(index)] = (
            SlidingWindowSpec(**common, sliding_window=window) if window else FullAttentionSpec(**common)
        )

    ours = kv_cache_shape(
        layout,
        machine("h100-8"),
        tensor_parallel_size=size,
        value_bytes=2,
        block_size=16,
        max_num_batched_tokens=8192,
    )

    if kv_cache_utils.is_kv_cache_spec_uniform(specs):
        assert [(group.num_layers, group.block_size) for group in ours.groups] == [(len(specs), 16)]
        assert ours.bytes_per_block == size * sum(spec.page_size_bytes for spec in specs.values())
        return
    unified = kv_cache_utils.unify_kv_cache_spec_page_size(specs)
    theirs = kv_cache_utils._get_kv_cache_groups_uniform_page_size(unified)
    assert Counter((group.block_size, group.window) for group in ours.groups) == Counter(
        (group.kv_cache_spec.block_size, getattr(group.kv_cache_spec, "sliding_window", None)) for group in theirs
    )
    widest = max(len(group.layer_names) for group in theirs)
    assert ours.bytes_per_block == size * widest * kv_cache_utils.get_uniform_page_size(unified.values())
    for group, spec in zip(ours.groups, (group.kv_cache_spec for group in theirs), strict=True):
        if isinstance(spec, SlidingWindowSpec):
            held = spec.max_admission_blocks_per_request(ours.in_flight_tokens, 100_000)
            assert group.blocks(100_000, ours.in_flight_tokens) == held
