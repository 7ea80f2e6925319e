"""The simulated engine schedules as vLLM does and takes its times from its profile."""

import json
import math
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestq.common.errors import PromptRefused, SettingsError
from ingestq.common.schema import Sampling
from ingestq.common.settings import Settings
from ingestq.workers.engines import load_engine
from ingestq.workers.engines.base import Prompt
from ingestq.workers.engines.simulated_engine import Profile, SimulatedEngine


def make_engine(**profile):
    """An engine whose steps take no real time."""
    return load_engine(Settings(engine="simulated", model="m", engine_args={"time_scale": 0, **profile}))


def make_prompt(name, num_tokens, **sampling):
    sampling = {"ignore_eos": True, "max_tokens": 1, **sampling}
    return Prompt(prompt_id=name, token_ids=[first_token(name), *range(1, num_tokens)], sampling=Sampling(**sampling))


def first_token(name):
    """A token that differs from name to name; `hash` differs from run to run."""
    return int.from_bytes(name.encode()[-4:], "little")


def drain(engine):
    completions = []
    while engine.has_unfinished():
        completions += engine.step()
    return completions


def test_a_step_takes_the_profiles_time():
    engine = make_engine(step_ms=20, step_ms_per_seq=0.5, step_ms_per_prefill_token=0.1)
    engine.add_request(make_prompt("a", 100, max_tokens=3))
    [done] = drain(engine)
    assert done.ttft_ms == pytest.approx(20 + 0.5 + 10)
    assert done.run_ms == pytest.approx(done.ttft_ms + 2 * 20.5)
    assert engine.num_steps == 3


def test_a_prompt_added_later_has_its_own_clock():
    engine = make_engine(step_ms=10, step_ms_per_seq=0, step_ms_per_prefill_token=0)
    engine.add_request(make_prompt("a", 10, max_tokens=5))
    engine.step()
    engine.add_request(make_prompt("b", 10, max_tokens=2))
    done = {completion.prompt_id: completion for completion in drain(engine)}
    assert (done["a"].run_ms, done["b"].ttft_ms, done["b"].run_ms) == (50, 10, 20)


def test_reading_the_kv_cache_takes_time_for_the_context_of_what_decodes():
    engine = make_engine(step_ms=10, step_ms_per_seq=0, step_ms_per_prefill_token=0, step_ms_per_kv_token=0.01)
    engine.add_request(make_prompt("a", 100, max_tokens=3))
    engine.add_request(make_prompt("b", 200, max_tokens=2))
    done = {completion.prompt_id: completion for completion in drain(engine)}
    # Prefill reads nothing; then both contexts; then a's, which is one longer.
    assert done["b"].ttft_ms == 10
    assert done["b"].run_ms == pytest.approx(10 + 13.0)
    assert done["a"].run_ms == pytest.approx(10 + 13.0 + 11.01)


def test_time_scale_makes_steps_take_real_time():
    engine = make_engine(step_ms=40, time_scale=0.5)
    started = time.monotonic()
    engine.generate([make_prompt("a", 1, max_tokens=3)])
    assert time.monotonic() - started >= 3 * 0.040 * 0.5


def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget():
    engine = make_engine(max_num_batched_tokens=40, max_num_seqs=4, max_model_len=1000)
    engine.add_request(make_prompt("long", 100))
    engine.add_request(make_prompt("short", 10))
    # 40 and 40 of the long one, then its last 20 together with the short one.
    assert [[done.prompt_id for done in engine.step()] for _ in range(3)] == [[], [], ["long", "short"]]


def test_a_long_prompt_is_reported_when_its_last_chunk_is_computed():
    engine = make_engine(max_num_batched_tokens=40, max_num_seqs=4, max_model_len=1000)
    engine.add_request(make_prompt("long", 100))
    engine.add_request(make_prompt("short", 10))
    reports = []
    while engine.has_unfinished():
        engine.step()
        reports.append(engine.last_step)
    assert [report.num_prefilled_tokens for report in reports] == [0, 0, 110]
    assert [report.num_waiting_tokens for report in reports] == [110, 110, 110]
    assert [first.num_tokens_ahead for first in reports[-1].first_tokens] == [0, 100]


def test_a_prompt_aborted_in_the_middle_of_its_prefill_waits_no_longer():
    engine = make_engine(max_num_batched_tokens=40, max_num_seqs=4, max_model_len=1000)
    engine.add_request(make_prompt("long", 100))
    engine.add_request(make_prompt("short", 10))
    engine.step()
    engine.abort(["long"])
    assert engine.num_waiting_tokens == 10
    engine.step()
    assert [first.prompt_id for first in engine.last_step.first_tokens] == ["short"]
    assert engine.num_free_blocks == engine.kv_cache.num_blocks


def test_a_step_reports_its_simulated_seconds():
    engine = make_engine(step_ms=20, step_ms_per_seq=0, step_ms_per_prefill_token=0.1)
    engine.add_request(make_prompt("a", 100, max_tokens=2))
    engine.step()
    assert engine.last_step.seconds == pytest.approx(0.030)
    engine.step()
    assert engine.last_step.seconds == pytest.approx(0.020)


def test_a_step_that_a_signal_interrupts_has_not_happened(monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    engine = make_engine(time_scale=1e-6, max_num_batched_tokens=40, max_num_seqs=4, max_model_len=1000)
    for i in range(3):
        engine.add_request(make_prompt(f"p{i}", 15, max_tokens=5))
    completions = engine.step()
    before, free = engine.last_step, engine.num_free_blocks
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.last_step is before
    assert engine.num_free_blocks >= free
    completions += drain(engine)
    assert sorted(done.prompt_id for done in completions) == ["p0", "p1", "p2"]
    assert engine.num_free_blocks == engine.kv_cache.num_blocks


def test_at_most_max_num_seqs_run_at_once():
    engine = make_engine(max_num_seqs=3)
    for i in range(8):
        engine.add_request(make_prompt(f"p{i}", 5))
    assert [len(engine.step()) for _ in range(3)] == [3, 3, 2]


def test_prompts_of_one_output_token_finish_in_the_next_step():
    engine = make_engine(max_num_seqs=500)
    prompts = [make_prompt(f"p{i}", 3) for i in range(500)]
    assert len(engine.generate(prompts)) == 500
    assert engine.num_steps == 1


def test_sequences_that_outgrow_the_kv_cache_are_preempted_and_complete_all_the_same():
    prompts = [make_prompt(f"p{i}", 20, max_tokens=60) for i in range(6)]
    roomy = make_engine(max_model_len=100)
    # Room for all the prompts, but not for all that they become.
    tight = make_engine(max_model_len=100, num_kv_blocks=20, block_size=8)
    expected = [(done.token_ids, done.finish_reason) for done in roomy.generate(prompts)]
    assert [(done.token_ids, done.finish_reason) for done in tight.generate(prompts)] == expected
    assert roomy.num_preemptions == 0
    assert tight.num_preemptions > 0
    assert tight.num_steps > roomy.num_steps
    assert tight.num_free_blocks == 20


def test_a_preempted_sequence_starts_over_but_keeps_its_first_token():
    engine = make_engine(step_ms=10, step_ms_per_seq=0, step_ms_per_prefill_token=0, max_model_len=32, num_kv_blocks=4)
    # One of four blocks each at first, two each at the end.
    engine.add_request(make_prompt("first", 15, max_tokens=17))
    engine.add_request(make_prompt("last", 16, max_tokens=16))
    engine.add_request(make_prompt("lost", 16, max_tokens=16))
    done = {completion.prompt_id: completion for completion in drain(engine)}
    assert engine.num_preemptions > 0
    assert done["lost"].ttft_ms == 10
    assert len(done["lost"].token_ids) == 16


def test_preemptions_are_reported_in_their_steps_and_no_first_token_twice():
    engine = make_engine(max_model_len=100, num_kv_blocks=20, block_size=8)
    for i in range(6):
        engine.add_request(make_prompt(f"p{i}", 20, max_tokens=60))
    num_preemptions, first_tokens, num_output_tokens = 0, [], 0
    while engine.has_unfinished():
        engine.step()
        num_preemptions += engine.last_step.num_preemptions
        first_tokens += [first.prompt_id for first in engine.last_step.first_tokens]
        num_output_tokens += engine.last_step.num_output_tokens
    assert num_preemptions == engine.num_preemptions > 0
    assert sorted(first_tokens) == [f"p{i}" for i in range(6)]
    assert num_output_tokens == 6 * 60


def test_sequences_whose_blocks_fit_the_cache_are_never_preempted():
    engine = make_engine(max_model_len=100, num_kv_blocks=40, block_size=8)
    num_seqs = engine.kv_cache.num_usable_blocks // engine.kv_cache.blocks_for(80, 8192)
    assert num_seqs == 4
    for num_prompts in (num_seqs, num_seqs + 1):
        assert (engine.num_preemptions, engine.has_unfinished()) == (0, False)
        for i in range(num_prompts):
            engine.add_request(make_prompt(f"p{i}", 20, max_tokens=60))
        drain(engine)
    assert engine.num_preemptions > 0


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(8, 64),
    num_kv_blocks=st.integers(13, 40),
    aborted=st.sets(st.integers(0, 24), max_size=3),
)
@settings(deadline=None, max_examples=150)
def test_whatever_the_load_every_prompt_ends_once_and_no_block_is_lost(
    lengths, max_num_seqs, max_num_batched_tokens, num_kv_blocks, aborted
):
    engine = make_engine(
        max_model_len=100,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_kv_blocks=num_kv_blocks,
        block_size=8,
    )
    for i, (num_tokens, max_tokens) in enumerate(lengths):
        engine.add_request(make_prompt(f"p{i}", num_tokens, max_tokens=max_tokens))
    completions = engine.step()
    finished = {done.prompt_id for done in completions}
    engine.abort([f"p{i}" for i in aborted])
    completions += drain(engine)
    expected = {f"p{i}" for i in range(len(lengths)) if i not in aborted} | finished
    assert sorted(done.prompt_id for done in completions) == sorted(expected)
    assert all(len(done.token_ids) == lengths[int(done.prompt_id[1:])][1] for done in completions)
    assert engine.num_free_blocks == num_kv_blocks
    assert engine.num_waiting_tokens == 0


def outputs(engine, num_prompts=400, **sampling):
    sampling = {"max_tokens": 4096, "ignore_eos": None, **sampling}
    return engine.generate([make_prompt(f"p{i}", 30, **sampling) for i in range(num_prompts)])


def test_output_lengths_are_the_profiles_lognormal():
    lengths = [len(done.token_ids) for done in outputs(make_engine(output_tokens_median=80, output_tokens_sigma=0.5))]
    assert statistics.median(lengths) == pytest.approx(80, rel=0.1)
    assert statistics.stdev(math.log(length) for length in lengths) == pytest.approx(0.5, rel=0.15)


def test_outputs_depend_on_the_prompt_and_the_seed_alone():
    first, again, other = (
        [(done.text, done.token_ids) for done in outputs(make_engine(seed=seed, **profile), 20)]
        for seed, profile in ((1, {}), (1, {"max_num_seqs": 2, "step_ms": 1}), (2, {}))
    )
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
    assert len({text for text, _ in first}) == 20


def test_every_output_says_that_it_is_simulated():
    assert all(done.text.startswith("simulated") for done in outputs(make_engine(), 20))
    card = make_engine().card
    assert (card.device, card.engine) == ("simulated", "simulated")


def test_a_model_that_stops_by_itself_gives_stop_and_one_that_is_cut_gives_length():
    done = outputs(make_engine(output_tokens_median=50), max_tokens=50)
    assert {completion.finish_reason for completion in done} == {"stop", "length"}
    assert all(len(c.token_ids) == 50 for c in done if c.finish_reason == "length")


def test_min_tokens_postpones_the_natural_end():
    assert all(len(done.token_ids) >= 40 for done in outputs(make_engine(output_tokens_median=5), 20, min_tokens=40))


def test_stop_strings_are_looked_for_after_min_tokens():
    for done in outputs(make_engine(), 20, ignore_eos=True, max_tokens=80, min_tokens=40, stop=["simulated", " "]):
        assert (len(done.token_ids), done.finish_reason) == (41, "stop")


def test_tokens_are_four_bytes_each_and_texts_stay_apart():
    engine = make_engine()
    assert len(engine.encode("abcd")) == 1
    assert len(engine.encode("abcde")) == 2
    assert len(engine.encode("ääää€")) == 3
    assert engine.encode("") == []
    assert engine.encode("abcde") != engine.encode("abcdf")


def test_a_token_outside_the_vocabulary_is_refused():
    engine = make_engine()
    for token in (-1, 2**32, "a"):
        with pytest.raises(PromptRefused):
            engine.add_request(Prompt(prompt_id="p", token_ids=[token], sampling=Sampling()))
    assert not engine.has_unfinished()


def test_a_profile_file_is_read_and_engine_arguments_override_it(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"max_num_seqs": 7, "step_ms": 1.5}))
    profile = Profile.from_settings(
        Settings(engine="simulated", simulated_profile=str(path), engine_args={"max_num_seqs": 9})
    )
    assert (profile.max_num_seqs, profile.step_ms) == (9, 1.5)


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"max_num_seq": 3}, "did you mean max_num_seqs"),
        ({"step_ms": -1}, "step_ms=-1"),
        ({"max_model_len": 10**6, "num_kv_blocks": 10}, "doesn't fit"),
        ({"max_num_batched_tokens": 8}, "less than max_num_seqs"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_field(engine_args, message):
    with pytest.raises(SettingsError, match=message):
        SimulatedEngine.from_settings(Settings(engine="simulated", model="m", engine_args=engine_args))


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_an_unreadable_profile_file_is_refused_with_its_setting(tmp_path, content):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match="INGEST_SIMULATED_PROFILE"):
        Profile.from_settings(Settings(engine="simulated", simulated_profile=str(path)))


def test_engines_of_different_profiles_have_different_digests():
    digests = {make_engine(step_ms=step_ms).card.engine_digest for step_ms in (1, 1, 2)}
    assert len(digests) == 2
