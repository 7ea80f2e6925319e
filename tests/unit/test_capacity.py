"""What fits, by the runtimes' rules: golden figures, independent counts, and what must hold of any model."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ingestq.common.errors import SettingsError, UnknownMachine
from ingestq.common.planner import capacity, rates
from ingestq.common.planner.hardware import MACHINES, Machine, for_engine, machine
from ingestq.common.planner.model_layout import ModelLayout, load_layout, read_layout
from ingestq.common.planner.records import EngineShape, Workload
from ingestq.common.planner.sizing import Sizing, resolve

GEMMA = load_layout("gemma-4-26b-a4b")
V6E_4 = machine("v6e-4")

# No test asserts a time.
untimed = settings(deadline=None)


def kv_bytes(layout: ModelLayout, chips: Machine, size: int, dtype: str) -> int:
    return capacity.kv_bytes_per_token(layout, chips, tensor_parallel_size=size, kv_cache_dtype=dtype)


def sizing(layout: ModelLayout, chips: Machine, tokens: int, **shape: object) -> Sizing:
    workload = Workload(prompt_tokens=tokens - 1, output_tokens=1)
    return resolve(layout, chips, workload, EngineShape(**shape))[1]


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        (4, "bfloat16", 245_760),
        (4, "fp8_e5m2", 143_360),
        (4, "auto", 245_760),
        (8, "fp8", 286_720),
        (1, "fp8", 112_640),
    ],
)
def test_the_tpu_runtime_takes_so_many_bytes_a_token_of_gemma_4_26b(size, dtype, expected):
    """notes of issue 4, and at TP=8 copies of heads eat up what fp8 saves."""
    assert kv_bytes(GEMMA, V6E_4, size, dtype) == expected


@pytest.mark.parametrize(("value_bytes", "token", "sequence"), [(2, 20_480, 200 * 2**20), (1, 10_240, 100 * 2**20)])
def test_an_ideal_layout_would_take_so_much(value_bytes, token, sequence):
    assert capacity.ideal_kv_bytes_per_token(GEMMA, value_bytes) == token
    assert capacity.ideal_kv_bytes_per_sequence(GEMMA, value_bytes, 16_384) == sequence
    assert capacity.ideal_kv_bytes_per_sequence(GEMMA, value_bytes, 512) == sequence // 2


def test_vllm_on_a_gpu_keeps_windows_and_takes_the_ideal_bytes_a_token():
    assert kv_bytes(GEMMA, machine("h100-1"), 1, "bfloat16") == 20_480


@pytest.mark.parametrize(
    ("heads", "head_dim", "size", "value_bytes", "expected"),
    [
        (8, 128, 4, 2, 2 * 8 * 128 * 2),  # nothing to pad
        (8, 128, 8, 1, 2 * 2 * 8 * 128),  # one head a device: two of four values of a word
        (8, 80, 4, 2, 2 * 8 * 128 * 2),  # padded to whole lanes
        (8, 64, 4, 2, 8 * 128 * 2),  # keys and values side by side
        (8, 64, 4, 1, 4 * 4 * 128),  # two heads a device in words of four
        (2, 256, 4, 2, 2 * 4 * 256 * 2),  # two heads on four devices
        (2, 256, 4, 4, 2 * 4 * 256 * 4),
    ],
)
def test_padding_packing_and_copies_on_tpu(heads, head_dim, size, value_bytes, expected):
    assert capacity.tpu_layer_bytes_per_token(heads, head_dim, size, value_bytes) == expected


def test_experts_are_padded_to_whole_lanes_on_every_chip():
    assert capacity.padded_expert_width(704, 4) == 1024
    assert capacity.padded_expert_width(704, 1) == 768
    assert capacity.padded_expert_width(768, 4) == 1024
    assert capacity.padded_expert_width(1024, 4) == 1024


def test_resident_weights_of_gemma_4_26b_are_what_was_measured_within_the_share_that_is_not_arithmetic():
    weights = capacity.weight_bytes(GEMMA, V6E_4, tensor_parallel_size=4, dtype="bfloat16")

    assert weights / 2**30 == pytest.approx(60.96, abs=0.01)
    assert weights * capacity.TPU_RESIDENT_SHARE / 2**30 == pytest.approx(8 * 7.91, rel=0.001)
    assert capacity.expert_padding(GEMMA, machine("h100-1"), 1) == 0


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "expected"),
    [(33_280, 256, 128), (33_280, 1024, 512), (1280, 128, 128), (4352, 128, 256), (16_640, 24, 16), (100, 8, 16)],
)
def test_the_block_size_grows_with_sequences_times_length(max_model_len, max_num_seqs, expected):
    assert capacity.block_size(V6E_4, max_model_len=max_model_len, max_num_seqs=max_num_seqs) == expected


@pytest.mark.parametrize(("tokens", "count"), [(4096, 9), (8192, 10), (32_768, 12), (5000, 10)])
def test_token_buckets_are_powers_of_two_and_the_budget(tokens, count):
    buckets = capacity.token_buckets(tokens)

    assert len(buckets) == count
    assert buckets[0] == 16
    assert buckets == sorted(set(buckets))
    assert tokens <= buckets[-1] < tokens + 16


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"), [(128, [8, 16, 32, 64, 128]), (100, [8, 16, 32, 64, 100]), (8, [8]), (3, [8])]
)
def test_request_buckets_are_powers_of_two_and_the_limit(max_num_seqs, expected):
    assert capacity.request_buckets(max_num_seqs) == expected


def test_windows_and_full_attention_share_blocks_of_one_size_in_bytes():
    """Gemma 4 26B on a GPU: the 5 global layers' blocks hold 32 tokens, 25 sliding layers are 5 groups of 5."""
    shape = capacity.kv_cache_shape(
        GEMMA, machine("h100-1"), tensor_parallel_size=1, value_bytes=2, block_size=16, max_num_batched_tokens=8192
    )

    assert sorted((group.num_layers, group.block_size, group.window or 0) for group in shape.groups) == [
        (5, 16, 1024),
        (5, 16, 1024),
        (5, 16, 1024),
        (5, 16, 1024),
        (5, 16, 1024),
        (5, 32, 0),
    ]
    assert shape.bytes_per_block == 5 * 16 * 2 * 8 * 256 * 2


def test_a_dtype_that_is_not_planned_for_is_refused_with_those_that_are():
    with pytest.raises(
        SettingsError, match=r"kv_cache_dtype='int8' is none of float32, .* fp8_e5m2; write one of these"
    ):
        capacity.kv_dtype_bytes("int8", "bfloat16")


def test_machines_are_found_by_any_name_that_is_in_use():
    assert machine("V6E-4") is not None
    assert machine("v5litepod-8") == machine("v5e-8")
    assert machine("tpu7x-8") == machine("v7x-8")
    assert machine("h100") == machine("h100-1")
    assert machine("cpu", memory_bytes=2**34).hbm_bytes == 2**34
    assert machine("cpu", kv_cache_bytes=2**30).kv_cache_bytes == 2**30


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v6-4", r"did you mean v6e-1, v6e-2, v6e-4, v6e-8\?$"),
        ("v6e", r"did you mean v6e-1, v6e-2, v6e-4, v6e-8\?$"),
        ("v7x-64", r"did you mean v7x-2, v7x-4, v7x-8\?$"),
        ("a100-8", r"known are v5e-1, .*h100-8, cpu$"),
        ("", r"known are v5e-1, .*h100-8, cpu$"),
    ],
)
def test_an_unknown_machine_says_those_of_its_chip_or_all(name, told):
    with pytest.raises(UnknownMachine, match=f"^chips '{name}' are not known; {told}"):
        machine(name)


@pytest.mark.parametrize("name", ["h100-2", "h100-4", "v6e-2", "v7x-4"])
def test_parts_of_a_host_are_machines(name):
    assert machine(name).num_devices == int(name.partition("-")[2])


def test_an_engine_has_its_kv_cache_on_each_device_and_as_many_of_a_cpu_as_it_asks_for():
    assert for_engine(machine("h100-8"), 2, 2**30).kv_cache_bytes == 2 * 2**30
    assert for_engine(machine("h100-8"), None, 2**30).kv_cache_bytes == 8 * 2**30
    assert for_engine(machine("h100-8"), 2, None) == machine("h100-8")
    assert for_engine(machine("cpu"), 2, None).num_devices == 2


GEMMA_3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262_144,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
}


def test_on_tpu_a_model_of_vllms_torch_code_keeps_its_windows_and_one_in_jax_does_not():
    """tpu_inference 0.32, runner/kv_cache_manager.py get_kv_cache_spec: Gemma 3 has no JAX model there, Qwen 3 has."""
    torch = read_layout(GEMMA_3, "gemma 3")
    windowed = {"layer_types": ["sliding_attention"] * 11 + ["full_attention"]}
    jax = read_layout({**GEMMA_3, **windowed, "model_type": "qwen3"}, "qwen 3")

    one_layer = 2 * 4 * 256 * 2
    assert kv_bytes(torch, V6E_4, 4, "bfloat16") == 2 * one_layer
    assert kv_bytes(jax, V6E_4, 4, "bfloat16") == 12 * one_layer
    assert sizing(torch, V6E_4, 100_000).resident_sequences > 3 * sizing(jax, V6E_4, 100_000).resident_sequences


@untimed
@given(num_blocks=st.integers(0, 3000), chips=st.sampled_from(["v6e-4", "h100-1"]), length=st.integers(1, 40_000))
def test_the_longest_sequence_fits_and_a_longer_one_does_not(num_blocks, chips, length):
    cache = sizing(GEMMA, machine(chips), 2048, tensor_parallel_size=1).kv_cache
    pool = num_blocks * cache.bytes_per_block

    longest = cache.longest_sequence(pool, length)

    assert longest == 0 or cache.resident_sequences(pool, longest)
    assert longest == length or not cache.resident_sequences(pool, longest + 1)


@pytest.mark.parametrize("name", MACHINES)
def test_every_number_of_a_machine_has_its_source(name):
    assert len(MACHINES[name].source) > 20


# Properties.

llama_like = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "qwen3"]),
        "vocab_size": st.integers(1000, 300_000),
        "hidden_size": st.sampled_from([512, 1024, 2048, 4096]),
        "intermediate_size": st.sampled_from([1024, 4096, 14_336]),
        "num_hidden_layers": st.integers(1, 13),
        "num_attention_heads": st.sampled_from([8, 16, 32]),
        "num_key_value_heads": st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([64, 80, 128, 256]),
        "max_position_embeddings": st.just(131_072),
    }
)
windowed = st.fixed_dictionaries(
    {"model_type": st.just("gemma3_text"), "sliding_window": st.sampled_from([128, 512, 4096])}
)
layouts = st.one_of(llama_like, st.builds(lambda base, extra: {**base, **extra}, llama_like, windowed)).map(
    lambda config: read_layout(config, "drawn")
)
machines = st.sampled_from([name for name in MACHINES if name != "cpu"]).map(machine)
lengths = st.integers(2, 65_536)


@untimed
@given(layouts, machines, lengths, lengths, st.sampled_from(["bfloat16", "fp8_e5m2"]))
def test_more_context_never_fits_more_sequences(layout, chips, one, other, dtype):
    short, long = sorted((one, other))
    shape = {"kv_cache_dtype": dtype, "max_num_seqs": 64, "max_model_len": 65_536}

    assert (
        sizing(layout, chips, long, **shape).resident_sequences
        <= sizing(layout, chips, short, **shape).resident_sequences
    )


@untimed
@given(layouts, machines, lengths)
def test_fp8_never_takes_more_than_bfloat16(layout, chips, tokens):
    wide, narrow = (sizing(layout, chips, tokens, kv_cache_dtype=dtype) for dtype in ("bfloat16", "fp8"))

    assert narrow.kv_cache.bytes_per_block <= wide.kv_cache.bytes_per_block
    assert narrow.resident_sequences_ideal >= wide.resident_sequences_ideal
    size = chips.num_devices
    assert kv_bytes(layout, chips, size, "fp8") <= kv_bytes(layout, chips, size, "bfloat16")


@untimed
@given(layouts, lengths, st.sampled_from(["bfloat16", "fp8"]))
def test_more_devices_never_fit_less_unless_heads_are_copied_or_padded(layout, tokens, dtype):
    assume(kv_bytes(layout, V6E_4, 4, dtype) == kv_bytes(layout, V6E_4, 1, dtype))
    shape = {"kv_cache_dtype": dtype, "max_num_seqs": 64}

    few, many = (sizing(layout, V6E_4, tokens, tensor_parallel_size=size, **shape) for size in (1, 4))

    assert many.resident_sequences >= few.resident_sequences


@untimed
@given(layouts, machines, lengths)
def test_no_runtime_takes_less_than_the_ideal_layout(layout, chips, tokens):
    found = sizing(layout, chips, tokens)

    assert found.resident_sequences <= found.resident_sequences_ideal


@untimed
@given(st.integers(0, 300), st.one_of(st.none(), st.integers(1, 64)))
def test_positions_seen_are_what_counting_gives(num_tokens, window):
    counted = sum(min(position + 1, window or position + 1) for position in range(num_tokens))

    assert rates.positions_seen(num_tokens, window) == counted


@untimed
@given(st.integers(1, 8), st.integers(8, 256), st.integers(1, 2048))
def test_a_step_touches_at_least_one_token_s_experts_and_at_most_all(top_k, num_experts, num_tokens):
    touched = rates.experts_touched(num_experts, top_k, num_tokens)

    assert top_k - 1e-9 <= touched <= num_experts


@untimed
@given(st.integers(1, 40_000), st.integers(1, 2048), st.integers(1, 131_072))
def test_a_block_table_fits_half_of_the_scalar_memory(tokens, max_num_seqs, max_model_len):
    block = capacity.block_size(V6E_4, max_model_len=max_model_len, max_num_seqs=max_num_seqs)

    assert block & (block - 1) == 0
    assert max_num_seqs * -(-max_model_len // block) * 4 <= 2**20 // 2 or max_model_len <= block
