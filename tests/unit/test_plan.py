"""Plans: the figures of issue 4 and notes/tpu.md, their ranges, and every sentence about what can't run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestq.common.errors import SettingsError
from ingestq.common.planner.hardware import Machine, machine
from ingestq.common.planner.model_layout import load_layout, shipped_models
from ingestq.common.planner.plan import EngineShape, Plan, Workload, make_plan
from ingestq.common.settings import MAX_IN_FLIGHT, Settings

GEMMA = load_layout("gemma-4-26b-a4b")

ALWAYS = [
    "weights_bytes",
    "kv_bytes_per_token_ideal",
    "kv_bytes_per_sequence_ideal",
    "kv_bytes_per_token",
    "kv_pool_bytes",
    "kv_tokens",
    "block_size",
    "resident_sequences",
    "resident_sequences_ideal",
]
SUGGESTED = ["max_num_seqs", "max_num_batched_tokens"]
RATES = [
    "prefill_flops_per_token",
    "prefill_ceiling_tokens_per_s",
    "prefill_tokens_per_s",
    "decode_ceiling_tokens_per_s",
    "decode_tokens_per_s",
    "ttft_at_limit_ms",
]
WORK = ["documents_per_hour", "hours", "cost", "meets_deadline"]


def plan(
    prompt: int = 16_384,
    output: int = 256,
    *,
    model: str = "gemma-4-26b-a4b",
    chips: str | Machine = "v6e-4",
    documents: int | None = None,
    prefix: int = 0,
    price: float | None = None,
    deadline: float | None = None,
    **shape: object,
) -> Plan:
    return make_plan(
        load_layout(model),
        machine(chips) if isinstance(chips, str) else chips,
        Workload(prompt_tokens=prompt, output_tokens=output, num_documents=documents, shared_prefix_tokens=prefix),
        EngineShape(**shape),
        price_per_hour=price,
        deadline_hours=deadline,
    )


@pytest.mark.parametrize(("dtype", "tokens", "at_16k"), [("bfloat16", 226_000, 14), ("fp8_e5m2", 387_000, 24)])
def test_gemma_4_26b_holds_about_14_and_24_sequences_of_16k_on_v6e_4(dtype, tokens, at_16k):
    kv_tokens = plan(kv_cache_dtype=dtype)["kv_tokens"].value

    assert kv_tokens == pytest.approx(tokens, rel=0.002)
    assert round(kv_tokens / 16_384) == at_16k


@pytest.mark.parametrize(("prompt", "allocated", "ideal"), [(1024, 303, 471), (4096, 89, 372), (16_384, 23, 202)])
def test_resident_sequences_with_fp8_and_256_tokens_of_output_are_those_of_the_notes(prompt, allocated, ideal):
    """The notes round; a sequence that fits in part doesn't fit."""
    figures = plan(prompt, 256, kv_cache_dtype="fp8_e5m2")

    assert allocated - 1 <= figures["resident_sequences"].value <= allocated
    assert ideal - 1 <= figures["resident_sequences_ideal"].value <= ideal


def test_the_bytes_a_token_of_the_issue():
    wide, narrow = plan(kv_cache_dtype="bfloat16"), plan(kv_cache_dtype="fp8_e5m2")

    assert (wide["kv_bytes_per_token"].value, narrow["kv_bytes_per_token"].value) == (245_760, 143_360)
    assert (wide["kv_bytes_per_token_ideal"].value, narrow["kv_bytes_per_token_ideal"].value) == (20_480, 10_240)


def test_the_prefill_ceiling_at_16k_is_that_of_the_issue():
    """392k with 3.8 B active parameters in round numbers; 391k with all 3,822,530,560."""
    ceiling = plan()["prefill_ceiling_tokens_per_s"]

    assert ceiling.value == pytest.approx(392e3, rel=0.005)
    assert ceiling.high == pytest.approx(464e3, rel=0.005)  # without the output projection of all but the last token
    assert plan()["prefill_flops_per_token"].value == pytest.approx(9.36e9, rel=0.005)


def test_the_article_s_475_552_tokens_a_second_are_above_any_ceiling():
    ceiling = plan()["prefill_ceiling_tokens_per_s"]

    assert ceiling.value < ceiling.high < 475_552


def test_uncached_prefill_is_planned_at_120_to_160_thousand_tokens_a_second():
    expected = plan()["prefill_tokens_per_s"]

    assert expected.low == pytest.approx(120e3, rel=0.03)
    assert expected.high == pytest.approx(160e3, rel=0.03)


def test_a_plan_has_the_figures_that_its_docstring_lists_in_that_order():
    full = plan(chips="v6e-4", documents=10, price=1.0, deadline=1.0)

    names = [figure.name for figure in full.figures]
    assert names == [*ALWAYS, "compiled_shapes", *RATES, *SUGGESTED, "max_in_flight", *WORK]
    assert all(name in (make_plan.__doc__ or "") for name in names)


@pytest.mark.parametrize("model", shipped_models())
@pytest.mark.parametrize("chips", ["v5e-8", "v6e-4", "v7x-8", "h100-8"])
def test_every_figure_has_a_formula_a_source_a_unit_and_a_number(model, chips):
    for figure in plan(2048, 256, model=model, chips=chips, documents=10, price=1.0, deadline=1.0).figures:
        assert figure.formula
        assert figure.source
        assert figure.unit
        assert figure.value is not None or (figure.low is not None and figure.high is not None)
        assert figure.low is None or figure.high is None or 0 <= figure.low <= figure.high


def test_a_cpu_has_no_rates_as_they_depend_on_the_machine_at_hand():
    figures = plan(1024, 64, chips=machine("cpu", kv_cache_bytes=2**30), documents=10)

    assert [figure.name for figure in figures.figures] == [*ALWAYS, *SUGGESTED, "max_in_flight"]
    assert figures["kv_pool_bytes"].exact
    assert figures.fits


def test_what_is_left_open_is_chosen_and_what_is_given_is_kept():
    chosen = plan(1024, 256, kv_cache_dtype="fp8_e5m2").shape
    given_shape = plan(1024, 256, max_num_seqs=64, max_num_batched_tokens=4096, max_model_len=2048).shape

    assert chosen.tensor_parallel_size == 4
    assert chosen.max_model_len == 1280
    assert chosen.max_num_seqs == 302
    assert chosen.max_num_batched_tokens == 8192
    assert (given_shape.max_num_seqs, given_shape.max_num_batched_tokens, given_shape.max_model_len) == (64, 4096, 2048)


def test_a_shared_prefix_is_prefilled_once_and_makes_documents_cheaper():
    alone, shared = plan(4096, 64, documents=1000), plan(4096, 64, documents=1000, prefix=2048)

    assert shared["documents_per_hour"].low > alone["documents_per_hour"].low
    assert shared["prefill_flops_per_token"].value > alone["prefill_flops_per_token"].value  # they look back further


def test_a_prefix_that_is_the_whole_prompt_leaves_its_last_token():
    assert plan(4096, 64, prefix=4096, documents=1)["hours"].low > 0


def test_work_scales_with_documents_and_price():
    one, ten = (plan(2048, 64, documents=count, price=3.0) for count in (1000, 10_000))

    assert ten["hours"].high == pytest.approx(10 * one["hours"].high)
    assert ten["cost"].low == pytest.approx(3.0 * ten["hours"].low)
    assert plan(2048, 64, documents=0)["hours"].high == 0


@pytest.mark.parametrize(
    ("deadline", "value", "low", "high"), [(1e6, 1.0, 1, 1), (1e-6, 0.0, 0, 0), (10.0, None, 0, 1)]
)
def test_a_deadline_is_met_missed_or_between(deadline, value, low, high):
    verdict = plan(16_384, 256, documents=100_000, deadline=deadline, kv_cache_dtype="fp8_e5m2")["meets_deadline"]

    assert (verdict.value, verdict.low, verdict.high) == (value, low, high)


def test_time_to_first_token_is_what_waits_over_the_rate():
    """notes/tpu.md: 1024 prompts of 16,384 tokens at the article's rate wait 17.6 s on average."""
    from ingestq.common.planner.rates import mean_ttft_seconds

    assert mean_ttft_seconds(1024, 16_384, 475_552) == pytest.approx(17.6, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"chips": "v5e-4"}, ["takes 63.27 GiB", "v5e-4 give 57.96 GiB", "take more devices or a smaller model"]),
        (
            {"model": "gemma-4-31b", "prompt": 100_000},
            ["one sequence of max_model_len=100256 takes", "for 64", "lower max_model_len or take more devices"],
        ),
        (
            {"max_model_len": 16_384},
            [
                "prompt_tokens=16384 and output_tokens=256 are 16640 tokens, max_model_len is 16384",
                "raise max_model_len",
            ],
        ),
        ({"prompt": 262_144, "chips": "v7x-8"}, ["is above the 262144 positions", "split the documents"]),
        ({"tensor_parallel_size": 8}, ["tensor_parallel_size=8 is above the 4 devices of v6e-4; lower it"]),
        ({"tensor_parallel_size": 3}, ["doesn't divide 16 query heads; take one of 1, 2, 4, 8, 16"]),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            ["max_num_batched_tokens=32 is below max_num_seqs=64", "raise the one or lower the other"],
        ),
        ({"chips": "cpu"}, ["the memory of cpu is not known; say it"]),
    ],
)
def test_what_cannot_run_says_value_bound_and_way_out(arguments, says):
    found = plan(**arguments)

    assert not found.fits
    text = "\n".join(found.problems)
    for part in says:
        assert part in text


def test_the_longest_sequence_that_a_problem_names_does_fit():
    problem = " ".join(plan(100_000, model="gemma-4-31b").problems)
    longest = int(problem.partition(" GiB, for ")[2].split()[0])

    assert plan(longest - 256, model="gemma-4-31b", max_model_len=longest).fits
    assert not plan(longest - 255, model="gemma-4-31b", max_model_len=longest + 1, max_num_seqs=1).fits


def test_what_does_not_fit_has_no_rates_of_the_work():
    names = [figure.name for figure in plan(chips="v5e-4", documents=10, price=1.0).figures]

    assert "documents_per_hour" not in names
    assert "max_in_flight" not in names


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kv_cache_dtype": "fp8"}, "write fp8_e5m2"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8 fits 1.71 times the tokens of bfloat16"),
        ({"kv_cache_dtype": "fp8_e5m2", "chips": "v6e-8"}, "fp8 fits 1.00 times the tokens of bfloat16"),
        ({}, "keeps all tokens of 25 layers that only look back on a window"),
        ({"max_num_seqs": 1024}, "max_num_seqs=1024 and the KV cache holds 13 sequences of 16640 tokens"),
        ({"model": "llama-3.1-8b", "tensor_parallel_size": 2}, "leaves 2 of 4 devices idle"),
    ],
)
def test_what_runs_otherwise_than_expected_is_a_warning(arguments, says):
    found = plan(**arguments)

    assert found.fits
    assert says in "\n".join(found.warnings)


def test_fp8_on_a_cpu_is_a_warning_as_it_depends_on_the_cpu():
    found = plan(1024, 64, chips=machine("cpu", kv_cache_bytes=2**30), kv_cache_dtype="fp8")

    assert found.fits
    assert "AVX-512" in "\n".join(found.warnings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Workload(prompt_tokens=0, output_tokens=1),
        lambda: Workload(prompt_tokens=1, output_tokens=0),
        lambda: Workload(prompt_tokens=1, output_tokens=1, num_documents=-1),
        lambda: Workload(prompt_tokens=1, output_tokens=1, shared_prefix_tokens=2),
        lambda: EngineShape(max_num_seqs=0),
        lambda: EngineShape(gpu_memory_utilization=1.5),
        lambda: EngineShape(gpu_memory_utilization=float("nan")),
        lambda: plan(kv_cache_dtype="int8"),
        lambda: plan(dtype="int4"),
    ],
)
def test_values_that_make_no_sense_are_refused(make):
    with pytest.raises(SettingsError, match=r": it is |is none of|is above prompt_tokens"):
        make()


@settings(deadline=None)
@given(
    model=st.sampled_from(shipped_models()),
    chips=st.sampled_from(["v5e-1", "v5e-8", "v6e-1", "v6e-4", "v6e-8", "v7x-2", "h100-1", "h100-8"]),
    prompt=st.integers(1, 131_072),
    output=st.integers(1, 8192),
    dtype=st.sampled_from(["auto", "fp8", "fp8_e5m2"]),
    max_num_seqs=st.one_of(st.none(), st.integers(1, 2048)),
    documents=st.integers(0, 10**9),
)
def test_any_plan_is_made_and_says_whether_it_fits(model, chips, prompt, output, dtype, max_num_seqs, documents):
    found = plan(
        prompt, output, model=model, chips=chips, documents=documents, kv_cache_dtype=dtype, max_num_seqs=max_num_seqs
    )

    assert found.fits == (not found.problems)
    assert found["kv_pool_bytes"].value >= 0
    assert found["kv_tokens"].value >= 0
    if found.fits and prompt + output == found.shape.max_model_len:
        assert found["resident_sequences"].value >= 1
    assert all(sentence.count("\n") == 0 for sentence in (*found.problems, *found.warnings))


@pytest.mark.parametrize(
    ("chips", "prefix", "fresh"),
    [
        ("v6e-4", 15, 1000),  # less than a block is not cached
        ("v6e-4", 500, 1000 - 496),
        ("v6e-4", 1000, 1000 - 992),  # the last token is always computed
        ("h100-1", 31, 1000),  # blocks of 16 and of 32: both have to be whole
        ("h100-1", 500, 1000 - 480),
    ],
)
def test_a_shared_prefix_saves_whole_blocks_of_every_group(chips, prefix, fresh):
    found = plan(1000, 256, chips=chips, prefix=prefix, max_model_len=2000, max_num_seqs=8, block_size=16)

    assert found.fresh_tokens == fresh
    assert f"({fresh:,} / prefill rate" in found["documents_per_hour"].formula.replace("3600 / ", "")


def test_no_more_are_in_flight_than_the_setting_takes_and_a_step_can_start():
    assert plan(1, 1, max_num_seqs=5000)["max_in_flight"].value == MAX_IN_FLIGHT
    assert plan(10, 10, max_num_seqs=16)["max_in_flight"].value == 32
    assert plan(4096, 10, max_num_seqs=16, max_num_batched_tokens=8192)["max_in_flight"].value == 18
    with pytest.raises(SettingsError, match="INGEST_MAX_IN_FLIGHT"):
        Settings.from_env({"INGEST_MAX_IN_FLIGHT": str(MAX_IN_FLIGHT + 1)})


def test_a_small_cache_is_told_in_mib():
    tiny = machine("cpu", kv_cache_bytes=3 * 2**20)
    problems = plan(1000, 24, model="llama-3.1-8b", chips=tiny, dtype="float32").problems

    assert any("takes 256.00 MiB of KV cache, and there are 3.00 MiB" in problem for problem in problems)
