"""What every engine promises (`ingestq.workers.engines.base.Engine`), checked on both implementations."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from random import Random

# Read once, when torch and huggingface_hub are imported: one thread makes runs comparable, and nothing is downloaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from ingestq.common.errors import PromptRefused, SettingsError
from ingestq.common.schema import Sampling
from ingestq.common.settings import Settings
from ingestq.workers.engines import load_engine, vllm_engine
from ingestq.workers.engines.base import Prompt
from ingestq.workers.startup.measure import measure_rates
from ingestq.workers.startup.rehearsal import Rehearsal

MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 4
VLLM_ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": MAX_NUM_SEQS,
    "kv_cache_memory_bytes": 64 * 1024 * 1024,
}
TEXT = "In the beginning the queue was empty, and the engine moved upon the face of the deep. "


def prompt_of(engine, name, text=TEXT, **sampling):
    sampling = {"max_tokens": 16, **sampling}
    return Prompt(prompt_id=name, token_ids=engine.encode(text), sampling=Sampling(**sampling))


def prompts_of(engine, num_prompts=12):
    """Prompts of different lengths, more than run at once."""
    return [
        prompt_of(engine, f"p{i}", f"{i}. {TEXT[: 8 + 7 * i]}", max_tokens=3 + 5 * i % 17) for i in range(num_prompts)
    ]


def drain(engine):
    completions = []
    while engine.has_unfinished():
        completions += engine.step()
    return completions


def drain_reported(engine):
    """Completions, and the report of each step."""
    completions, reports = [], []
    while engine.has_unfinished():
        completions += engine.step()
        reports.append(engine.last_step)
    return completions, reports


def first_tokens_of(reports):
    return [first for report in reports for first in report.first_tokens]


def outcome(completion):
    """What must not depend on how the engine was fed."""
    return completion.prompt_id, completion.text, list(completion.token_ids), completion.finish_reason


def outcomes(completions):
    return sorted(map(outcome, completions))


def leave_no_block_once(stepper, monkeypatch):
    """Preempts one sequence in the scheduler's own way of giving up: no block is left for those that run."""
    manager = stepper.engine_core.engine_core.scheduler.kv_cache_manager
    allocate, refused = manager.allocate_slots, []

    def none_left_once(request, *args, **kwargs):
        if request.num_output_tokens > 2 and not refused:
            refused.append(request)
            return None
        return allocate(request, *args, **kwargs)

    monkeypatch.setattr(manager, "allocate_slots", none_left_once)


class EngineContract:
    @pytest.fixture(autouse=True)
    def _nothing_is_left_behind(self, engine):
        yield
        assert not engine.has_unfinished()
        before = engine.last_step
        assert engine.step() == []
        assert engine.last_step is before
        assert engine.num_waiting_tokens == 0

    def test_every_added_prompt_completes_exactly_once(self, engine):
        prompts = prompts_of(engine)
        for prompt in prompts:
            engine.add_request(prompt)
        assert sorted(done.prompt_id for done in drain(engine)) == sorted(prompt.prompt_id for prompt in prompts)

    def test_continuous_feeding_gives_the_outputs_of_generate(self, engine):
        prompts = prompts_of(engine)
        expected = engine.generate(prompts)
        assert [done.prompt_id for done in expected] == [prompt.prompt_id for prompt in prompts]
        waiting, in_flight, completions = list(prompts), 0, []
        while waiting or in_flight:
            while waiting and in_flight < MAX_NUM_SEQS + 1:
                engine.add_request(waiting.pop())
                in_flight += 1
            finished = engine.step()
            in_flight -= len(finished)
            completions += finished
        assert outcomes(completions) == outcomes(expected)

    def test_usage_and_times_are_reported(self, engine):
        prompts = prompts_of(engine)
        for done, prompt in zip(engine.generate(prompts), prompts, strict=True):
            assert done.num_prompt_tokens == len(prompt.token_ids)
            assert 0 <= done.num_cached_tokens < done.num_prompt_tokens
            assert 0 < done.ttft_ms <= done.run_ms
            assert done.error is None

    def test_the_reports_of_the_steps_add_up(self, engine):
        prompts = [prompt_of(engine, f"p{i}", f"{i} {TEXT}", max_tokens=3 + i, ignore_eos=True) for i in range(10)]
        for prompt in prompts:
            engine.add_request(prompt)
        assert engine.num_waiting_tokens == sum(len(prompt.token_ids) for prompt in prompts)
        completions, reports = drain_reported(engine)
        assert sum(report.num_prefilled_tokens for report in reports) == sum(
            done.num_prompt_tokens - done.num_cached_tokens for done in completions
        )
        assert sum(report.num_output_tokens for report in reports) == sum(len(done.token_ids) for done in completions)
        assert reports[0].num_waiting_tokens == sum(len(prompt.token_ids) for prompt in prompts)
        assert sum(report.num_preemptions for report in reports) == 0
        assert engine.num_waiting_tokens == reports[-1].num_waiting_tokens == 0

    def test_every_prompt_has_one_first_token_with_the_time_of_its_completion(self, engine):
        prompts = prompts_of(engine)
        for prompt in prompts:
            engine.add_request(prompt)
        completions, reports = drain_reported(engine)
        first_tokens = first_tokens_of(reports)
        assert sorted((first.prompt_id, first.ttft_ms, first.num_prompt_tokens) for first in first_tokens) == sorted(
            (done.prompt_id, done.ttft_ms, done.num_prompt_tokens) for done in completions
        )
        ahead, added = {}, 0
        for prompt in prompts:
            ahead[prompt.prompt_id] = added
            added += len(prompt.token_ids)
        assert {first.prompt_id: first.num_tokens_ahead for first in first_tokens} == ahead

    def test_a_prompt_that_finishes_with_its_first_token_is_reported_in_that_step(self, engine):
        engine.add_request(prompt_of(engine, "p", max_tokens=1))
        [done], reports = drain_reported(engine)
        assert [(first.prompt_id, first.ttft_ms) for first in reports[-1].first_tokens] == [("p", done.ttft_ms)]
        assert reports[-1].num_output_tokens == 1

    def test_what_is_aborted_waits_no_longer_and_has_no_first_token(self, engine):
        prompts = prompts_of(engine, 10)
        for prompt in prompts:
            engine.add_request(prompt)
        engine.step()
        reports = [engine.last_step]
        started = {first.prompt_id for first in first_tokens_of(reports)}
        assert "p9" not in started
        engine.abort(["p9", "p8"])
        waiting = [prompt for prompt in prompts[:8] if prompt.prompt_id not in started]
        assert engine.num_waiting_tokens == sum(len(prompt.token_ids) for prompt in waiting)
        reports += drain_reported(engine)[1]
        assert sorted(first.prompt_id for first in first_tokens_of(reports)) == [f"p{i}" for i in range(8)]

    def test_an_aborted_id_can_be_used_again_and_has_a_new_clock(self, engine):
        engine.add_request(prompt_of(engine, "p", TEXT * 3))
        engine.abort(["p"])
        engine.add_request(prompt_of(engine, "p"))
        [done], reports = drain_reported(engine)
        [first] = first_tokens_of(reports)
        assert (first.ttft_ms, first.num_prompt_tokens, first.num_tokens_ahead) == (
            done.ttft_ms,
            done.num_prompt_tokens,
            0,
        )

    def test_waves_are_not_reported(self, engine):
        engine.add_request(prompt_of(engine, "p"))
        drain(engine)
        before = engine.last_step
        engine.generate(prompts_of(engine))
        assert engine.last_step is before
        engine.add_request(prompt_of(engine, "q", max_tokens=2, ignore_eos=True))
        _, reports = drain_reported(engine)
        assert [first.prompt_id for first in first_tokens_of(reports)] == ["q"]
        assert sum(report.num_output_tokens for report in reports) == 2

    def test_what_waits_is_known_in_another_thread_while_the_engine_steps(self, engine):
        prompts = prompts_of(engine)
        total = sum(len(prompt.token_ids) for prompt in prompts)
        seen, done = [], threading.Event()

        def read():
            while not done.is_set():
                seen.append(engine.num_waiting_tokens)

        reader = threading.Thread(target=read)
        for prompt in prompts:
            engine.add_request(prompt)
        reader.start()
        drain(engine)
        done.set()
        reader.join()
        assert all(0 <= num_tokens <= total for num_tokens in seen)
        assert seen == sorted(seen, reverse=True)

    def test_max_tokens_ends_a_prompt_with_length(self, engine):
        [done] = engine.generate([prompt_of(engine, "p", max_tokens=7, ignore_eos=True)])
        assert len(done.token_ids) == 7
        assert done.finish_reason == "length"

    def test_output_is_cut_at_max_model_len(self, engine):
        token_ids = (engine.encode(TEXT) * 100)[: MAX_MODEL_LEN - 2]
        sampling = Sampling(max_tokens=50, ignore_eos=True)
        [done] = engine.generate([Prompt(prompt_id="p", token_ids=token_ids, sampling=sampling)])
        assert len(done.token_ids) == 2
        assert done.finish_reason == "length"

    def test_a_stop_string_ends_the_output_before_it(self, engine):
        [whole] = engine.generate([prompt_of(engine, "p", ignore_eos=True)])
        stop = whole.text[len(whole.text) // 2 :][:5]
        [done] = engine.generate([prompt_of(engine, "p", ignore_eos=True, stop=[stop])])
        assert done.finish_reason == "stop"
        assert done.text == whole.text[: whole.text.index(stop)]
        assert len(done.token_ids) < len(whole.token_ids)

    @pytest.mark.parametrize(
        ("num_tokens", "sampling"),
        [(0, {}), (MAX_MODEL_LEN, {}), (MAX_MODEL_LEN + 1, {}), (5, {"min_tokens": 9, "max_tokens": 8})],
        ids=["empty", "no room for output", "too long", "bad sampling"],
    )
    def test_a_prompt_that_cannot_run_is_refused_alone(self, engine, num_tokens, sampling):
        token_ids = (engine.encode(TEXT) * 100)[:num_tokens]
        bad = Prompt(prompt_id="bad", token_ids=token_ids, sampling=Sampling(**sampling))
        with pytest.raises(PromptRefused) as refusal:
            engine.add_request(bad)
        assert "\n" not in str(refusal.value)
        assert not engine.has_unfinished()
        assert engine.num_waiting_tokens == 0

        first, refused, last = engine.generate([prompt_of(engine, "first"), bad, prompt_of(engine, "last")])
        assert (refused.prompt_id, refused.finish_reason, refused.error) == ("bad", "error", str(refusal.value))
        assert (first.prompt_id, last.prompt_id) == ("first", "last")
        assert first.text == last.text != ""

    def test_a_token_outside_the_vocabulary_is_refused(self, engine):
        for token in (-1, 2**32):
            with pytest.raises(PromptRefused):
                engine.add_request(Prompt(prompt_id="bad", token_ids=[token], sampling=Sampling()))

    def test_aborted_prompts_have_no_completion_and_the_others_do(self, engine):
        prompts = prompts_of(engine, 10)
        for prompt in prompts:
            engine.add_request(prompt)
        completions = engine.step()
        # One that runs and one that waits.
        engine.abort(["p2", "p9"])
        completions += drain(engine)
        assert sorted(done.prompt_id for done in completions) == [f"p{i}" for i in range(9) if i != 2]

    def test_aborting_all_leaves_the_engine_idle_and_usable(self, engine):
        for prompt in prompts_of(engine):
            engine.add_request(prompt)
        engine.step()
        engine.abort([f"p{i}" for i in range(12)])
        assert not engine.has_unfinished()
        [done] = engine.generate([prompt_of(engine, "p0")])
        assert done.finish_reason != "error"

    def test_a_wave_that_is_interrupted_leaves_nothing_for_the_next(self, engine, stepper, monkeypatch):
        prompts = prompts_of(engine)
        expected = [outcome(done) for done in engine.generate(prompts)]
        step, steps = stepper.step, iter(range(3))

        def interrupted():
            if next(steps) == 2:
                raise KeyboardInterrupt
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(stepper, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(prompts)
        assert not engine.has_unfinished()
        assert [outcome(done) for done in engine.generate(prompts)] == expected

    def test_aborting_an_unknown_prompt_does_nothing(self, engine):
        engine.abort(["never heard of"])
        engine.add_request(prompt_of(engine, "p"))
        engine.abort(["never heard of"])
        assert [done.prompt_id for done in drain(engine)] == ["p"]

    def test_a_finished_id_can_be_used_again(self, engine):
        texts = []
        for _ in range(2):
            engine.add_request(prompt_of(engine, "p"))
            texts += [done.text for done in drain(engine)]
        assert texts[0] == texts[1]

    def test_texts_are_encoded_in_another_thread_while_the_engine_steps(self, engine):
        expected = engine.encode(TEXT), engine.encode_chat("Be brief.", TEXT)
        baseline = outcomes(engine.generate(prompts_of(engine)))
        done, seen = threading.Event(), []

        def encode():
            while not done.is_set():
                seen.append((engine.encode(TEXT), engine.encode_chat("Be brief.", TEXT)) == expected)

        thread = threading.Thread(target=encode)
        for prompt in prompts_of(engine):
            engine.add_request(prompt)
        thread.start()
        completions = drain(engine)
        done.set()
        thread.join()
        assert outcomes(completions) == baseline
        assert seen
        assert all(seen)

    def test_a_conversation_is_encoded_with_its_system_prompt(self, engine):
        short, long = engine.encode_chat(None, TEXT), engine.encode_chat("Be brief.", TEXT)
        assert all(isinstance(token, int) for token in long)
        assert len(engine.encode(TEXT)) < len(short) < MAX_MODEL_LEN
        assert short != long

    @pytest.mark.parametrize("text", [TEXT, " " * 3000, "\n\n\t" * 900, "ﷺ" * 300, "=" * 3000, "<|im_start|>" * 200])
    def test_a_text_has_no_fewer_tokens_than_its_bytes_over_max_token_bytes(self, engine, text):
        assert len(engine.encode(text)) * engine.card.max_token_bytes >= len(text.encode())

    def test_the_kv_cache_is_known_by_its_size(self, engine):
        cache = engine.kv_cache
        assert cache.dtype
        assert cache.num_blocks > 0
        assert cache.block_size > 0
        assert cache.num_tokens >= MAX_MODEL_LEN
        assert cache.asked == "auto"

    def test_the_kv_cache_holds_the_longest_sequence_by_its_blocks(self, engine):
        cache, max_num_tokens = engine.kv_cache, engine.card.max_num_batched_tokens
        assert len(cache.group_block_sizes) in (0, len(cache.groups))
        assert 0 < cache.blocks_for(MAX_MODEL_LEN, max_num_tokens) <= cache.num_usable_blocks <= cache.num_blocks
        assert cache.blocks_for(1, max_num_tokens) == len(cache.groups)

    def test_counters_count_up_and_the_kv_cache_is_empty_when_the_engine_is_idle(self, engine):
        before = engine.counters()
        engine.generate(prompts_of(engine))
        after = engine.counters()
        assert after.num_preemptions >= before.num_preemptions
        assert after.num_compilations == before.num_compilations == 0  # eager
        assert after.kv_usage == 0

    def test_the_kv_cache_is_in_use_while_prompts_run(self, engine):
        for prompt in prompts_of(engine, 3):
            engine.add_request(prompt)
        engine.step()
        engine.step()
        assert 0 < engine.counters().kv_usage <= 1
        drain(engine)

    def test_counters_are_read_in_another_thread_while_the_engine_steps(self, engine):
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(engine.counters() for _ in range(20)))
        for prompt in prompts_of(engine):
            engine.add_request(prompt)
        reader.start()
        drain(engine)
        reader.join()
        assert len(seen) == 20

    def test_rates_are_measured_with_prompts_that_leave_nothing_behind(self, engine):
        before = engine.counters()
        rates = measure_rates(Rehearsal(engine, before_step=lambda: None))
        assert rates.prefill_tokens_per_s > 0
        assert rates.decode_tokens_per_s > 0
        assert rates.decode_num_seqs == MAX_NUM_SEQS
        assert engine.counters().prefix_cache_hits == before.prefix_cache_hits
        assert not engine.has_unfinished()

    def test_a_rehearsal_that_is_interrupted_leaves_nothing_behind(self, engine):
        def interrupt():
            if next(steps) == 2:
                raise KeyboardInterrupt

        steps = iter(range(3))
        with pytest.raises(KeyboardInterrupt):
            Rehearsal(engine, interrupt).run(prompts_of(engine))
        assert not engine.has_unfinished()

    def test_the_card_says_what_the_engine_is(self, engine):
        card = engine.card
        assert (card.model, card.max_model_len, card.max_num_seqs) == ("tiny", MAX_MODEL_LEN, MAX_NUM_SEQS)
        assert card.over_length == "clamp"
        assert card.max_num_batched_tokens >= MAX_NUM_SEQS
        assert card.tokenizer_digest
        assert card.engine_digest


class TestSimulatedEngine(EngineContract):
    @pytest.fixture
    def stepper(self, engine):
        return engine

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        engine = load_engine(
            Settings(
                engine="simulated",
                model="tiny",
                over_length="clamp",
                engine_args={"time_scale": 0, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS},
            )
        )
        yield engine
        engine.close()


@pytest.mark.vllm
class TestVllmEngine(EngineContract):
    @pytest.fixture
    def stepper(self, engine):
        return engine._llm.llm_engine

    @pytest.fixture(scope="class")
    @classmethod
    def vllm_settings(cls):
        pytest.importorskip("vllm")
        from support.models import tiny_gemma4

        return Settings(model=str(tiny_gemma4()), model_name="tiny", over_length="clamp", engine_args=VLLM_ARGS)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, vllm_settings):
        engine = load_engine(vllm_settings)
        yield engine
        engine.close()

    def test_unknown_arguments_are_refused_with_the_nearest_right_one(self, engine, vllm_settings):
        wrong = vllm_settings.model_copy(update={"engine_args": {"max_num_seq": 4, "kv_cache_dtyp": "fp8"}})
        with pytest.raises(SettingsError) as refusal:
            load_engine(wrong)
        assert "INGEST_ENGINE_MAX_NUM_SEQ " in str(refusal.value)
        assert "did you mean max_num_seqs?" in str(refusal.value)
        assert "did you mean kv_cache_dtype?" in str(refusal.value)

    def test_an_argument_that_vllm_refuses_is_reported_in_one_line(self, engine, vllm_settings):
        wrong = vllm_settings.model_copy(update={"engine_args": {"max_num_seqs": 8, "max_num_active_seqs": 64}})
        with pytest.raises(SettingsError, match=r"max_num_active_seqs \(64\) cannot be greater") as refusal:
            load_engine(wrong)
        assert "\n" not in str(refusal.value)

    def test_a_model_without_a_chat_template_refuses_conversations(self, engine, vllm_settings, monkeypatch):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(vllm_settings.model)
        tokenizer.chat_template = None
        monkeypatch.setattr(engine, "_tokenizer", tokenizer)
        with pytest.raises(PromptRefused, match="chat template"):
            engine.encode_chat(None, TEXT)

    def test_the_card_tells_how_many_sequences_run_though_shapes_for_more_are_compiled(
        self, engine, stepper, vllm_settings, monkeypatch
    ):
        monkeypatch.setattr(stepper.vllm_config.scheduler_config, "max_num_active_seqs", 2)
        assert vllm_engine._card(vllm_settings, {}, engine._llm, engine._tokenizer).max_num_seqs == 2

    @pytest.mark.parametrize("sampling", [{"presence_penalty": 0.5}, {"temperature": 0.7, "seed": 7}])
    def test_what_the_tpu_runtime_would_ignore_is_refused_there(self, engine, monkeypatch, sampling):
        """Documents get past `enqueue` while no worker is there, or another one is."""
        on_tpu = engine.card.model_copy(update={"device": "tpu"})
        monkeypatch.setattr(engine, "_card", on_tpu)
        bad = prompt_of(engine, "bad", **sampling)
        with pytest.raises(PromptRefused, match="not supported by the TPU runtime"):
            engine.add_request(bad)
        refused, done = engine.generate([bad, prompt_of(engine, "good")])
        assert "not supported by the TPU runtime" in refused.error
        assert done.finish_reason != "error"

    def test_the_kv_cache_is_as_vllm_allocated_it(self, engine, stepper):
        [dtypes] = stepper.collective_rpc(lambda worker: {str(array.dtype) for array in worker.model_runner.kv_caches})
        cache, config = engine.kv_cache, stepper.vllm_config.cache_config
        assert (cache.dtype, cache.is_read, dtypes) == ("float32", True, {"torch.float32"})
        assert (cache.num_blocks, cache.block_size) == (config.num_gpu_blocks, config.block_size)
        assert cache.num_tokens == config.kv_cache_size_tokens
        assert cache.prefix_caching

    def test_the_kv_cache_is_as_large_as_planned(self, engine):
        assert engine.plan["kv_tokens"].value == engine.kv_cache.num_tokens
        assert engine.plan["block_size"].value == engine.kv_cache.block_size

    def test_a_preemption_is_counted(self, engine, stepper, monkeypatch):
        before = engine.counters().num_preemptions
        leave_no_block_once(stepper, monkeypatch)
        engine.generate(prompts_of(engine, 4))
        assert engine.counters().num_preemptions - before == 1

    def test_a_preemption_is_reported_when_the_sequence_goes_on(self, engine, stepper, monkeypatch):
        leave_no_block_once(stepper, monkeypatch)
        for prompt in prompts_of(engine, 4):
            engine.add_request(prompt)
        completions, reports = drain_reported(engine)
        assert sum(report.num_preemptions for report in reports) == 1
        assert sorted(first.prompt_id for first in first_tokens_of(reports)) == sorted(
            done.prompt_id for done in completions
        )

    def test_a_step_that_raises_leaves_nothing_in_the_books(self, engine, stepper, monkeypatch):
        step = stepper.step

        def interrupted():
            step()
            raise KeyboardInterrupt

        prompts = prompts_of(engine, 6)
        for prompt in prompts:
            engine.add_request(prompt)
        before = engine.last_step
        with monkeypatch.context() as patch:
            patch.setattr(stepper, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert engine.last_step is before
        # Four run, and have their first token.
        assert engine.num_waiting_tokens == sum(len(prompt.token_ids) for prompt in prompts[MAX_NUM_SEQS:])
        _, reports = drain_reported(engine)
        assert [first.prompt_id for first in first_tokens_of(reports)] == ["p4", "p5"]
        assert engine._prefilling == {}

    def test_first_tokens_out_of_order_are_found(self, engine):
        """By looking at all that wait, where the first ones are not those that got theirs."""
        for prompt in prompts_of(engine, 3):
            engine.add_request(prompt)
        engine._prefilling = dict(reversed(engine._prefilling.items()))
        engine._prefilling = {"never run": type("State", (), {"is_prefilling": True}), **engine._prefilling}
        try:
            completions, reports = drain_reported(engine)
        finally:
            engine._prefilling.pop("never run", None)
        assert sorted(first.prompt_id for first in first_tokens_of(reports)) == ["p0", "p1", "p2"]
        assert len(completions) == 3

    def test_scoring_leaves_nothing_in_the_books(self, engine):
        before = engine.last_step
        engine.score(prompts_of(engine, 3))
        assert engine.last_step is before
        assert engine.num_waiting_tokens == 0

    def test_the_groups_of_the_kv_cache_are_those_of_the_core(self, engine, stepper):
        """Three layers with a window of 128 and a whole one: blocks are equally large, so each is a group."""
        managers = stepper.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
        cache = engine.kv_cache
        assert sorted(cache.groups, key=str) == [128, 128, 128, None]
        assert cache.group_block_sizes == tuple(manager.block_size for manager in managers)
        assert (cache.num_null_blocks, cache.max_concurrent_steps, cache.num_lookahead_tokens) == (1, 1, 0)

    def test_groups_that_the_core_does_not_tell_are_guessed_large_enough(self, engine, monkeypatch, caplog):
        def gone():
            raise AttributeError("get_kv_cache_group_metadata")

        cache, max_num_tokens = engine.kv_cache, engine.card.max_num_batched_tokens
        core = engine._llm.llm_engine.engine_core.engine_core
        monkeypatch.setattr(core, "get_kv_cache_group_metadata", gone)
        guessed = vllm_engine._kv_cache(engine._llm, asked="auto")
        assert "the groups of the KV cache can't be read" in caplog.text
        assert guessed.blocks_for(MAX_MODEL_LEN, max_num_tokens) >= cache.blocks_for(MAX_MODEL_LEN, max_num_tokens)

    def test_a_compilation_is_counted(self, engine):
        import torch

        before = engine.counters().num_compilations
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
        assert engine.counters().num_compilations - before == 1
        torch._dynamo.utils.counters.clear()

    def test_the_prefix_cache_shows_in_the_usage(self, engine):
        # Blocks are 128 tokens on CPU.
        token_ids = (engine.encode(TEXT) * 100)[:300]
        sampling = Sampling(max_tokens=2)
        cached = []
        for name in ("cold", "warm"):
            [done] = engine.generate([Prompt(prompt_id=name, token_ids=token_ids, sampling=sampling)])
            cached.append(done.num_cached_tokens)
        assert cached[1] >= 128
        assert engine.counters().prefix_cache_hits >= 128

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # three processes import vLLM, one after the other: minutes on a busy machine
    def test_an_engine_in_its_own_process_gives_the_same_and_leaves_no_process(self, engine, vllm_settings, tmp_path):
        script = tmp_path / "own_process.py"
        script.write_text(OWN_PROCESS)
        settings = vllm_settings.model_copy(update={"core": "own-process"})
        returncode, output, errors = run_alone([sys.executable, script, settings.model_dump_json()])
        assert returncode == 0, errors
        report = json.loads(output.splitlines()[-1])
        assert report["engine_processes"]
        assert report["engine_processes_after_close"] == []
        prompts = prompts_of(engine)
        expected = [list(outcome(done)) for done in engine.generate(prompts)]
        assert report["generated"] == expected
        assert sorted(report["fed"]) == sorted(expected)
        cache = engine.kv_cache
        assert report["kv_cache"] == [cache.dtype, cache.num_blocks, cache.block_size, cache.num_tokens]
        assert report["kv_groups"] == [list(cache.groups), list(cache.group_block_sizes)]
        assert report["counters"] == [None, 0]
        assert sorted(report["first_tokens"]) == sorted(prompt.prompt_id for prompt in prompts)
        assert report["prefilled"] == sum(len(prompt.token_ids) for prompt in prompts)
        assert report["waiting"] == 0


BOUND_MAX_MODEL_LEN = 448
BOUND_SEQS = 6
FIRST_TOKENS = itertools.count(1000)


@pytest.mark.vllm
class TestKvBoundOfVllm:
    """What `KvCache.blocks_for` allows never preempts, with blocks for six of the longest sequences and no more."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        pytest.importorskip("vllm")
        from support.models import tiny_gemma4

        # Of the longest: 14 blocks, and in each of three groups with a window of 128 (127 + 64) / 32 and one more: 7.
        args = {
            **VLLM_ARGS,
            "max_model_len": BOUND_MAX_MODEL_LEN,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 64,
            "block_size": 32,
            "num_gpu_blocks_override": BOUND_SEQS * (14 + 3 * 7) + 1,
        }
        engine = load_engine(Settings(model=str(tiny_gemma4()), model_name="tiny", engine_args=args))
        yield engine
        engine.close()

    def blocks_for(self, engine, num_tokens):
        return engine.kv_cache.blocks_for(num_tokens, engine.card.max_num_batched_tokens)

    def prompts(self, engine, sequences):
        """Of (prompt tokens, output tokens); none begins like another one of any test: none shares its blocks."""
        text = engine.encode(TEXT) * 30
        return [
            Prompt(
                prompt_id=f"p{i}",
                token_ids=[next(FIRST_TOKENS), *text[: num_prompt - 1]],
                sampling=Sampling(max_tokens=num_output, ignore_eos=True),
            )
            for i, (num_prompt, num_output) in enumerate(sequences)
        ]

    def run(self, engine, sequences):
        """Runs sequences as a controller would: one starts when all may become as long as they want.

        Returns preemptions, and the most blocks in use at once, both by the engine's own count.
        """
        waiting = self.prompts(engine, sequences)
        blocks, num_preemptions, most = {}, 0, 0.0
        while waiting or engine.has_unfinished():
            while waiting:
                prompt = waiting[0]
                needed = self.blocks_for(engine, len(prompt.token_ids) + prompt.sampling.max_tokens)
                if sum(blocks.values()) + needed > engine.kv_cache.num_usable_blocks:
                    break
                blocks[prompt.prompt_id] = needed
                engine.add_request(waiting.pop(0))
            for done in engine.step():
                del blocks[done.prompt_id]
            num_preemptions += engine.last_step.num_preemptions
            most = max(most, engine.counters().kv_usage)
        return num_preemptions, round(most * engine.kv_cache.num_usable_blocks)

    def overload(self, engine, sequences):
        """Preemptions of the same, all at once."""
        before = engine.counters().num_preemptions
        for prompt in self.prompts(engine, sequences):
            engine.add_request(prompt)
        _, reports = drain_reported(engine)
        num_preemptions = sum(report.num_preemptions for report in reports)
        assert engine.counters().num_preemptions - before == num_preemptions
        return num_preemptions

    def test_the_cache_holds_six_of_the_longest(self, engine):
        assert self.blocks_for(engine, BOUND_MAX_MODEL_LEN) * BOUND_SEQS == engine.kv_cache.num_usable_blocks

    def test_short_sequences_up_to_the_bound_fill_the_cache_and_one_more_preempts(self, engine):
        """Shorter than the window, the bound is what they come to hold."""
        num_tokens = 128
        num_seqs = engine.kv_cache.num_usable_blocks // self.blocks_for(engine, num_tokens)
        sequences = [(16, num_tokens - 16)] * num_seqs
        assert self.run(engine, sequences) == (0, num_seqs * self.blocks_for(engine, num_tokens))
        assert self.overload(engine, [*sequences, sequences[0]]) > 0

    def test_the_longest_sequences_up_to_the_bound_are_never_preempted_and_twice_as_many_are(self, engine):
        sequences = [(BOUND_MAX_MODEL_LEN - 48, 48)] * BOUND_SEQS
        assert self.run(engine, sequences)[0] == 0
        assert self.overload(engine, [(96, BOUND_MAX_MODEL_LEN - 96)] * (2 * BOUND_SEQS)) > 0

    def test_a_mixture_fed_up_to_the_bound_is_never_preempted(self, engine):
        random = Random(0)
        sequences = [(random.randint(8, 380), random.randint(1, 60)) for _ in range(30)]
        assert self.run(engine, sequences)[0] == 0

    def test_a_prompt_aborted_in_the_middle_of_its_prefill_waits_no_longer(self, engine):
        token_ids = (engine.encode(TEXT) * 30)[:300]
        for name in ("long", "short"):
            sampling = Sampling(max_tokens=2, ignore_eos=True)
            engine.add_request(
                Prompt(prompt_id=name, token_ids=token_ids if name == "long" else token_ids[:20], sampling=sampling)
            )
        engine.step()
        assert engine.last_step.first_tokens == ()
        assert engine.num_waiting_tokens == engine.last_step.num_waiting_tokens == 320
        engine.abort(["long"])
        assert engine.num_waiting_tokens == 20
        completions, reports = drain_reported(engine)
        assert [done.prompt_id for done in completions] == ["short"]
        assert [first.prompt_id for first in first_tokens_of(reports)] == ["short"]
        assert engine.num_waiting_tokens == 0


def run_alone(command):
    """Runs a command to its end: exit code, output, errors. No process of it is left, whatever becomes of the test."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate()
    finally:
        with suppress(ProcessLookupError):  # an engine doesn't notice that its parent was killed
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


# Its engine processes import it again: hence the guard.
OWN_PROCESS = f"""
import json, sys
sys.path[:0] = {[path for path in sys.path if path.endswith("tests")]!r}

def main():
    import psutil
    from ingestq.common.settings import Settings
    from ingestq.workers.engines import load_engine, vllm_engine
    from integration.test_engine_contract import drain_reported, first_tokens_of, outcome, prompts_of

    engine = load_engine(Settings.model_validate_json(sys.argv[1]))
    children = psutil.Process().children(recursive=True)
    processes = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    names = [child.name() for child in processes]
    prompts = prompts_of(engine)
    generated = engine.generate(prompts)
    for prompt in prompts:
        engine.add_request(prompt)
    fed, reports = drain_reported(engine)
    cache, counters = engine.kv_cache, engine.counters()
    engine.close()
    print(json.dumps({{
        "engine_processes": names,
        "engine_processes_after_close": [child.pid for child in processes if child.is_running()],
        "generated": [outcome(done) for done in generated],
        "fed": [outcome(done) for done in fed],
        "kv_cache": [cache.dtype, cache.num_blocks, cache.block_size, cache.num_tokens],
        "kv_groups": [cache.groups, cache.group_block_sizes],
        "first_tokens": [first.prompt_id for first in first_tokens_of(reports)],
        "prefilled": sum(report.num_prefilled_tokens for report in reports),
        "waiting": engine.num_waiting_tokens,
        "counters": [counters.num_compilations, counters.num_preemptions],
    }}))

if __name__ == "__main__":
    main()
"""
