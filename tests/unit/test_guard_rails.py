"""Each guard rail: key, value, bound, way out; and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from ingestq.common.errors import SettingsError
from ingestq.common.guard_rails import RAILS, Target, apply_guard_rails

TPU = Target(device="tpu", chips="v6e-4")
V5E = Target(device="tpu", chips="v5e-8")
GPU = Target(device="cuda", chips="h100-1")
CPU = Target(device="cpu", chips="cpu")
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}


def refused(target: Target = CPU, **args: Any) -> str:
    with pytest.raises(SettingsError) as refusal:
        apply_guard_rails(args, target)
    return str(refusal.value)


def said(target: Target = CPU, **args: Any) -> str:
    """What is logged about arguments that are taken as they are."""
    if target.device == "tpu":
        args.setdefault("max_num_seqs", 128)
    taken, lines = apply_guard_rails(args, target)
    assert taken == args
    return "\n".join(lines)


def test_arguments_that_nothing_is_to_be_said_about_pass_as_they_are() -> None:
    args = {"max_model_len": 8704, "max_num_seqs": 128, "max_num_batched_tokens": 8192, "kv_cache_dtype": "fp8_e5m2"}

    assert apply_guard_rails(args, TPU) == (args, [])
    assert apply_guard_rails({}, CPU) == ({}, [])


def test_everything_that_is_wrong_is_one_error() -> None:
    message = refused(TPU, kv_cache_dtype="int8", max_num_seqs=64, max_num_batched_tokens=8, max_model_len=1)

    assert [key for key in ("kv_cache_dtype", "max_num_batched_tokens", "max_model_len") if f"{key}=" in message] == [
        "kv_cache_dtype",
        "max_num_batched_tokens",
        "max_model_len",
    ]
    assert "\n" not in message


def test_a_rail_changes_nothing_of_what_it_is_given() -> None:
    args = {"kv_cache_dtype": "fp8"}
    multimodal = Target(device="tpu", chips="v6e-4", is_multimodal=True)
    for rail in RAILS:
        rail(args, multimodal)

    assert args == {"kv_cache_dtype": "fp8"}


# --- numbers


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, [1]])
def test_a_count_is_a_whole_number_of_one_or_more(name: str, value: Any) -> None:
    assert refused(**{name: value}) == f"{name}={value!r}: a whole number of 1 or more is expected"


@pytest.mark.parametrize("value", [0, -2, "32k", 4096.0, True])
def test_a_context_is_a_whole_number_of_tokens(value: Any) -> None:
    assert f"max_model_len={value!r}: a whole number of tokens is expected (-1: as many as fit)" in refused(
        max_model_len=value
    )


@pytest.mark.parametrize("value", [0, 1.01, -0.5, 92, "0.9", float("nan"), True])
def test_a_share_of_memory_is_over_zero_and_at_most_one(value: Any) -> None:
    message = refused(gpu_memory_utilization=value)

    assert message.startswith(f"gpu_memory_utilization={value!r}: ")
    assert "over 0 and at most 1; write 0.9" in message


# --- generation headroom


@pytest.mark.parametrize("length", [1024, 32768, 131072])
def test_a_context_of_exactly_the_documents_length_is_told_with_the_one_to_write(length: int) -> None:
    message = said(max_model_len=length)

    assert f"max_model_len={length} is prompt and output together" in message
    assert f"prompts of up to {length - 256} tokens fit" in message
    assert f"write {length + 512}" in message


@pytest.mark.parametrize("length", [-1, 33280, 8704, 4608, 2304, 512])
def test_a_context_with_headroom_passes_in_silence(length: int) -> None:
    assert said(max_model_len=length) == ""


def test_a_context_that_the_default_output_fills_is_told() -> None:
    message = said(max_model_len=256)

    assert "max_model_len=256" in message
    assert "256 tokens of output unless it says otherwise" in message
    assert "write the longest prompt + 512" in message


def test_a_context_without_room_for_one_token_of_output_is_refused() -> None:
    assert refused(max_model_len=1) == (
        "max_model_len=1: prompt and output share it, so at least 2; write the longest prompt + 512"
    )


# --- steps


def test_a_step_holds_a_token_of_each_sequence() -> None:
    message = refused(max_num_seqs=128, max_num_batched_tokens=127)

    assert "max_num_batched_tokens=127" in message
    assert "max_num_seqs is 128" in message
    assert "write at least 128" in message
    assert said(max_num_seqs=128, max_num_batched_tokens=128) == ""


def test_on_tpu_the_default_number_of_sequences_is_told() -> None:
    _, (line,) = apply_guard_rails({}, TPU)

    assert line.startswith("max_num_seqs is not set: vLLM's default on TPU is 256")


# --- the KV cache


@pytest.mark.parametrize(("target", "instead"), [(TPU, "fp8_e5m2"), (V5E, "fp8"), (GPU, "fp8"), (CPU, "fp8")])
def test_an_int8_kv_cache_is_refused(target: Target, instead: str) -> None:
    message = refused(target, kv_cache_dtype="int8")

    assert message.startswith("kv_cache_dtype='int8': vLLM has no such KV cache")
    assert f"write {instead}, or auto" in message


def test_on_tpu_a_kv_cache_that_only_gpus_have_is_refused() -> None:
    message = refused(TPU, kv_cache_dtype="fp8_per_token_head")

    assert "kv_cache_dtype='fp8_per_token_head': the TPU runtime has auto, bfloat16, float16, fp8" in message
    assert "write fp8_e5m2, or auto" in message
    assert said(GPU, kv_cache_dtype="fp8_per_token_head") == ""


def test_a_kv_cache_dtype_is_a_name() -> None:
    assert refused(kv_cache_dtype=8) == "kv_cache_dtype=8: a name is expected, such as auto, bfloat16 or fp8"


def test_fp8_on_v6e_becomes_e5m2_and_is_told() -> None:
    args, (line,) = apply_guard_rails({"kv_cache_dtype": "fp8", "max_num_seqs": 8}, TPU)

    assert args == {"kv_cache_dtype": "fp8_e5m2", "max_num_seqs": 8}
    assert line.startswith("kv_cache_dtype=fp8 becomes fp8_e5m2: on v6e")
    assert "tpu-inference#1112" in line
    assert "write fp8_e4m3 to have it all the same" in line


def test_e4m3_on_v6e_is_taken_as_asked_and_told() -> None:
    assert "far slower than fp8_e5m2 on v6e" in said(TPU, kv_cache_dtype="fp8_e4m3")


@pytest.mark.parametrize("target", [V5E, GPU, Target(device="tpu"), Target(device="cpu", chips="v6e-4")])
def test_fp8_elsewhere_stays_fp8(target: Target) -> None:
    assert said(target, kv_cache_dtype="fp8") == ""


# --- weights


def test_on_a_cpu_the_kv_cache_is_of_the_dtype_of_the_weights() -> None:
    """vLLM takes bfloat16 beside float32 there, and reads it as something else: SmolLM2 then writes nonsense."""
    message = refused(CPU, dtype="float32", kv_cache_dtype="bfloat16")

    assert message.startswith("kv_cache_dtype='bfloat16' with dtype='float32': ")
    assert message.endswith("write auto, or dtype: bfloat16")
    for fine in ("auto", "float32", "fp8"):
        assert apply_guard_rails({"dtype": "float32", "kv_cache_dtype": fine}, CPU)[0]["kv_cache_dtype"] == fine
    assert apply_guard_rails({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, TPU)


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn", "int8"])
def test_weights_are_not_quantized_by_their_dtype(dtype: str) -> None:
    message = refused(kv_cache_dtype="fp8", dtype=dtype)

    assert message.startswith(f"dtype={dtype!r}: weights and activations are bfloat16, float16, float32 or auto")
    assert "write bfloat16, and kv_cache_dtype for the KV cache" in message


def test_an_fp8_kv_cache_leaves_the_weights_alone() -> None:
    args, _ = apply_guard_rails({"kv_cache_dtype": "fp8", "max_num_seqs": 8}, TPU)

    assert "quantization" not in args
    assert "dtype" not in args


def test_quantized_weights_beside_an_fp8_kv_cache_are_taken_as_asked_and_told() -> None:
    message = said(GPU, kv_cache_dtype="fp8", quantization="fp8")

    assert message.startswith("quantization=fp8 quantizes the weights beside a KV cache in fp8: as asked")
    assert "leave it out to keep the weights as they are" in message
    assert said(GPU, quantization="fp8") == ""


# --- speculation


@pytest.mark.parametrize(
    "args",
    [
        {"speculative_config": NGRAM},
        {"speculative_config": {"model": "ngram", "num_speculative_tokens": 4}},
        {"spec_method": "ngram", "spec_tokens": 4},
        {"speculative_config": NGRAM, "async_scheduling": True},
        {"speculative_config": {"method": "suffix"}},
    ],
)
def test_ngram_is_off_unless_its_price_is_accepted_by_name(args: dict[str, Any]) -> None:
    message = refused(**args)

    assert message.startswith(("speculative_config: method", "spec_method: method"))
    assert "turns async scheduling off" in message
    assert "async_scheduling: false beside it" in message


def test_ngram_that_is_asked_for_runs_and_says_when_to_drop_it() -> None:
    assert "drop it if under 60 %" in said(speculative_config=NGRAM, async_scheduling=False)


def test_speculation_that_keeps_async_scheduling_passes_in_silence() -> None:
    assert said(speculative_config={"method": "eagle3", "model": "m", "num_speculative_tokens": 2}) == ""
    assert said(speculative_config={"model": "org/draft", "num_speculative_tokens": 2}) == ""


# --- multimodal models on TPU


def test_on_tpu_a_multimodal_model_gets_its_images_whole_and_that_is_told() -> None:
    multimodal = Target(device="tpu", chips="v6e-4", is_multimodal=True)
    args, (line,) = apply_guard_rails({"max_num_seqs": 8}, multimodal)

    assert args == {"max_num_seqs": 8, "disable_chunked_mm_input": True}
    assert line.startswith("disable_chunked_mm_input becomes true")


def test_elsewhere_and_for_text_models_images_are_left_alone() -> None:
    assert said(Target(device="cuda", is_multimodal=True)) == ""
    assert said(TPU) == ""
    assert said(Target(device="tpu", is_multimodal=True), disable_chunked_mm_input=True) == ""
