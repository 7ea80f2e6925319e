"""What the warm-up decides, and what it measures on an engine whose speed is known."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from ingestq.common.engine_card import EngineCard
from ingestq.common.errors import EngineError, PromptRefused
from ingestq.common.planner.hardware import MACHINES
from ingestq.common.planner.model_layout import load_layout
from ingestq.common.planner.plan import EngineShape, Figure, Plan, Workload
from ingestq.common.schema import Sampling
from ingestq.common.settings import Settings
from ingestq.workers.engines.base import Completion, EngineCounters, KvCache, Prompt, Rates
from ingestq.workers.engines.simulated_engine import SimulatedEngine
from ingestq.workers.engines.vllm_engine import kv_dtype_name
from ingestq.workers.live_card import LiveCard
from ingestq.workers.startup.kv_check import off_plan, wrong_dtype
from ingestq.workers.startup.measure import measure_rates
from ingestq.workers.startup.rehearsal import Rehearsal
from ingestq.workers.startup.warmup import Warmed, affordable

CACHE = KvCache(
    dtype="bfloat16",
    is_read=True,
    asked="auto",
    num_blocks=1000,
    block_size=16,
    num_tokens=16_000,
    prefix_caching=True,
)


def simulated(**args: object) -> SimulatedEngine:
    return SimulatedEngine.from_settings(
        Settings(engine="simulated", model="sim", engine_args={"time_scale": 0, **args})
    )


def rehearsal(engine: SimulatedEngine) -> Rehearsal:
    return Rehearsal(engine, before_step=lambda: None)


# --- the KV cache


@pytest.mark.parametrize(
    ("dtype", "settled", "name"),
    [
        ("torch.bfloat16", "auto", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("torch.uint8", "fp8", "fp8_e4m3"),
        ("torch.uint8", "fp8_e5m2", "fp8_e5m2"),
        ("float8_e5m2", "fp8_e5m2", "fp8_e5m2"),
        ("float8_e4m3fn", "fp8", "fp8_e4m3"),
        ("torch.float8_e4m3fn", "fp8_inc", "fp8_e4m3"),
        ("fp8", "fp8", "fp8_e4m3"),
    ],
)
def test_a_kv_dtype_has_vllms_name_whatever_it_is_stored_as(dtype: str, settled: str, name: str) -> None:
    assert kv_dtype_name(dtype, settled) == name


@pytest.mark.parametrize(
    ("asked", "dtype", "is_read"),
    [
        ("auto", "float32", True),
        ("fp8", "fp8_e4m3", True),
        ("fp8_e5m2", "fp8_e5m2", True),
        # Layers that were left out of it.
        ("fp8", "bfloat16, fp8_e4m3", True),
        # What isn't known to be wrong.
        ("fp8_e5m2", "bfloat16", False),
        ("nvfp4", "nvfp4", True),
        ("int8_per_token_head", "int8", True),
    ],
)
def test_a_kv_dtype_that_was_asked_for_is_right(asked: str, dtype: str, is_read: bool) -> None:
    assert wrong_dtype(replace(CACHE, asked=asked, dtype=dtype, is_read=is_read)) is None


@pytest.mark.parametrize(
    ("asked", "dtype"), [("fp8", "bfloat16"), ("fp8_e5m2", "fp8_e4m3"), ("fp8", "fp8_e5m2"), ("bfloat16", "float32")]
)
def test_another_kv_dtype_is_told_with_what_was_asked_and_the_way_out(asked: str, dtype: str) -> None:
    told = wrong_dtype(replace(CACHE, asked=asked, dtype=dtype))
    assert told is not None
    assert f"kv_cache_dtype={asked!r}" in told
    assert f"is {dtype};" in told
    assert "leave kv_cache_dtype out" in told
    assert "INGEST_MISFIT=warn" in told


def figure(name: str, value: float | None, low: float | None = None, high: float | None = None) -> Figure:
    return Figure(name=name, value=value, low=low, high=high, unit="", formula="", source="", exact=True)


def plan(*figures: Figure) -> Plan:
    return Plan(
        model=load_layout("llama-3.1-8b"),
        machine=next(iter(MACHINES.values())),
        workload=Workload(prompt_tokens=1, output_tokens=1),
        fresh_tokens=1,
        shape=EngineShape(),
        figures=figures,
    )


@pytest.mark.parametrize(
    ("planned", "is_off"),
    [
        (figure("kv_tokens", 16_000), False),
        (figure("kv_tokens", 17_700), False),
        (figure("kv_tokens", 14_600), False),
        (figure("kv_tokens", 18_000), True),
        (figure("kv_tokens", 14_000), True),
        (figure("kv_tokens", None, 12_000, 20_000), False),
        (figure("kv_tokens", None, 18_000, 20_000), True),
        (figure("kv_tokens", None), False),
        (figure("block_size", 32), True),
        (figure("something_else", 1), False),
    ],
)
def test_a_kv_cache_more_than_a_tenth_off_its_plan_is_told(planned: Figure, is_off: bool) -> None:
    told = off_plan(CACHE, plan(planned))
    assert bool(told) == is_off
    if told and planned.value:
        assert told == [
            f"{planned.name}: the plan says {planned.value:.0f}, the engine has "
            f"{CACHE.num_tokens if planned.name == 'kv_tokens' else CACHE.block_size}"
        ]


# --- prefixes


RATES = Rates(prefill_tokens_per_s=1000.0, decode_tokens_per_s=100.0, decode_num_seqs=4)


def chosen(lengths: list[int], rates: Rates | None = None, **cache: int) -> list[int]:
    prefixes = [[number] * length for number, length in enumerate(lengths)]
    return [len(prefix) for prefix in affordable(prefixes, replace(CACHE, **cache), 8192, rates)]


def test_a_prefix_of_less_than_a_block_or_of_a_whole_context_is_left_out() -> None:
    assert chosen([15, 16, 100, 8191, 8192], num_tokens=100_000) == [16, 100, 8191]


def test_prefixes_take_a_quarter_of_the_kv_cache_at_most() -> None:
    assert chosen([3000, 900, 101, 100]) == [3000, 900, 100]


def test_prefixes_take_ten_seconds_of_prefill_at_most() -> None:
    assert chosen([6000, 5000, 4000], RATES, num_tokens=1_000_000) == [6000, 4000]


def test_a_prefix_is_computed_once() -> None:
    assert affordable([[1] * 20, [1] * 20], CACHE, 8192, None) == [[1] * 20]


# --- rates


def test_measured_rates_are_those_of_the_profile() -> None:
    """On an engine whose clock is its profile; the last trial of prefill is a full step."""
    engine = simulated(max_num_seqs=16, max_num_batched_tokens=1024)
    found = measure_rates(rehearsal(engine), Random(0))
    assert found is not None
    assert found.prefill_tokens_per_s == pytest.approx(engine.rates.prefill_tokens_per_s, rel=0.01)
    assert found.decode_tokens_per_s == pytest.approx(engine.rates.decode_tokens_per_s, rel=0.01)
    assert found.decode_num_seqs == engine.rates.decode_num_seqs == 16


def test_decode_is_measured_with_sequences_that_run_together() -> None:
    """Not with those that wait for others' KV blocks: ten sequences of two blocks fit."""
    engine = simulated(num_kv_blocks=20, max_model_len=300)
    found = measure_rates(rehearsal(engine), Random(0))
    assert found is not None
    assert found.decode_num_seqs == 10
    assert found.decode_tokens_per_s == pytest.approx(10 / 20.4e-3, rel=0.01)


class LateEngine(SimulatedEngine):
    """Compiles a shape when it first meets it, as XLA does without precompiling; that takes 20 s."""

    _compiled: frozenset[tuple[int, int]] = frozenset()

    def _schedule(self) -> list[Any]:
        scheduled = super()._schedule()
        num_tokens = sum(num_tokens for _, num_tokens in scheduled)
        shape = (num_tokens.bit_length(), len(scheduled).bit_length())
        self._now_ms += 20_000.0 * (shape not in self._compiled)
        self._compiled |= {shape}
        return scheduled


def test_what_is_compiled_late_is_no_part_of_a_rate() -> None:
    args = {"time_scale": 0, "max_num_seqs": 16, "max_num_batched_tokens": 1024}
    engine = LateEngine.from_settings(Settings(engine="simulated", model="sim", engine_args=args))
    found = measure_rates(rehearsal(engine), Random(0))
    assert found is not None
    assert found.prefill_tokens_per_s == pytest.approx(engine.rates.prefill_tokens_per_s, rel=0.01)
    assert found.decode_tokens_per_s == pytest.approx(engine.rates.decode_tokens_per_s, rel=0.01)
    assert found.decode_num_seqs == 16


@pytest.mark.parametrize(
    ("args", "max_num_steps"),
    [
        # 40 tokens/s: 64 tokens, twice, are enough, and one sequence decodes.
        ({"step_ms_per_prefill_token": 25.0}, 20),
        # 8,192 tokens take no time: four trials more.
        ({"step_ms": 0.0, "step_ms_per_seq": 0.0, "step_ms_per_prefill_token": 0.0}, 25),
        ({"max_model_len": 3, "max_num_seqs": 2}, 500),
        ({"max_model_len": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1}, 20),
        ({"num_kv_blocks": 20, "max_model_len": 300}, 400),
    ],
    ids=["slow", "fast", "short context", "hardly any context", "small cache"],
)
def test_measuring_takes_few_steps_on_any_engine(args: dict[str, float], max_num_steps: int) -> None:
    engine = simulated(**args)
    found = measure_rates(rehearsal(engine), Random(0))
    assert found is not None
    assert found.prefill_tokens_per_s > 0
    assert found.decode_tokens_per_s >= 0
    assert engine.num_steps <= max_num_steps
    assert engine.num_free_blocks == engine._profile.num_kv_blocks


class RefusingEngine(SimulatedEngine):
    def add_request(self, prompt: Prompt) -> None:
        raise PromptRefused("no")


class ErringEngine(SimulatedEngine):
    def step(self) -> list[Completion]:
        return [replace(done, finish_reason="error", error="broken") for done in super().step()]


@pytest.mark.parametrize("kind", [RefusingEngine, ErringEngine])
def test_an_engine_that_takes_no_such_prompts_has_no_rates(kind: type[SimulatedEngine]) -> None:
    engine = kind.from_settings(Settings(engine="simulated", model="sim", engine_args={"time_scale": 0}))
    assert measure_rates(rehearsal(engine)) is None
    assert not engine.has_unfinished()


def test_a_rehearsal_tells_of_a_prompt_that_failed() -> None:
    engine = ErringEngine.from_settings(Settings(engine="simulated", model="sim", engine_args={"time_scale": 0}))
    with pytest.raises(EngineError, match="broken"):
        rehearsal(engine).run([Prompt(prompt_id="p", token_ids=[1], sampling=Sampling(max_tokens=1))])


# --- what is told of it


def live_card(engine: SimulatedEngine, rates: Rates | None = RATES, **counters: int | None) -> LiveCard:
    warmed = Warmed(
        kv_cache=CACHE,
        rates=rates,
        num_prefixes=0,
        warmup_ms=12.0,
        counters=EngineCounters(**counters),
    )
    return LiveCard(engine, warmed)


class CompilingEngine(SimulatedEngine):
    num_compilations: int | None = 7
    num_draft_tokens = num_accepted_tokens = 0

    def counters(self) -> EngineCounters:
        return replace(
            super().counters(),
            num_compilations=self.num_compilations,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
        )


@pytest.fixture
def compiling() -> CompilingEngine:
    return CompilingEngine.from_settings(Settings(engine="simulated", model="sim", engine_args={"time_scale": 0}))


def test_a_card_counts_from_the_end_of_the_warm_up(compiling: CompilingEngine) -> None:
    card = live_card(compiling, num_preemptions=2, num_compilations=7)
    compiling.num_preemptions, compiling.num_compilations = 5, 9
    now = card()
    assert (now.num_preemptions, now.recompiles) == (3, 2)
    assert (now.kv_cache_dtype, now.num_kv_tokens, now.decode_tokens_per_s) == ("bfloat16", 16_000, 100.0)
    assert now.engine_digest == compiling.card.engine_digest


def test_a_card_says_what_speculation_is_worth_since_the_warm_up(compiling: CompilingEngine) -> None:
    card = live_card(compiling, num_compilations=7, num_draft_tokens=100, num_accepted_tokens=100)
    compiling.num_draft_tokens, compiling.num_accepted_tokens = 100, 100
    assert card().draft_acceptance is None
    compiling.num_draft_tokens, compiling.num_accepted_tokens = 300, 150
    assert card().draft_acceptance == 0.25


def test_a_card_says_what_it_can_when_the_counters_cannot_be_read(
    compiling: CompilingEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = live_card(compiling, num_compilations=7)
    compiling.num_compilations = 9
    before = card()
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "counters", lambda: 1 // 0)
        assert card() == before
        assert "counters can't be read" in caplog.text
    compiling.num_compilations = 10
    assert card().recompiles == 3


def test_a_recompile_is_logged_once(compiling: CompilingEngine, caplog: pytest.LogCaptureFixture) -> None:
    card = live_card(compiling, num_compilations=7)
    card()
    assert not caplog.records
    compiling.num_compilations = 8
    card(), card()
    assert ["compiled 1 times since it was ready" in record.getMessage() for record in caplog.records] == [True]
    compiling.num_compilations = 10
    card()
    assert len(caplog.records) == 2


def test_what_nobody_can_know_stays_open(compiling: CompilingEngine) -> None:
    compiling.num_compilations = None
    card = live_card(compiling, rates=None, num_compilations=None)()
    assert (card.recompiles, card.prefill_tokens_per_s, card.decode_tokens_per_s) == (None, None, None)


def test_a_card_of_a_former_release_says_nothing_of_this() -> None:
    former = simulated().card.model_dump(exclude={"max_num_batched_tokens", *LATER})
    card = EngineCard.model_validate({**former, "of_a_release_to_come": 1})
    assert {getattr(card, name) for name in (*LATER, "max_num_batched_tokens")} == {None}


LATER = (
    "kv_cache_dtype",
    "num_kv_tokens",
    "num_blocks",
    "block_size",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "warmup_ms",
    "recompiles",
    "draft_acceptance",
    "num_preemptions",
)
