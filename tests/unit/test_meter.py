"""The meter knows what waits for its first token, and reports each step."""

from hypothesis import given
from hypothesis import strategies as st

from ingestq.workers.engines.base import KvCache
from ingestq.workers.engines.meter import Meter


def stepped(meter, num_output_tokens=0, **counts):
    return meter.stepped(seconds=0.5, num_output_tokens=num_output_tokens, num_preemptions=0, **counts)


def test_a_first_token_tells_what_was_ahead_of_the_prompt_when_it_was_added():
    meter = Meter()
    meter.add("a", 100)
    meter.add("b", 30)
    meter.first_token("a", 12.5)
    report = stepped(meter, num_output_tokens=1)
    assert [(first.prompt_id, first.ttft_ms, first.num_prompt_tokens) for first in report.first_tokens] == [
        ("a", 12.5, 100)
    ]
    assert (report.num_waiting_tokens, report.num_prefilled_tokens, report.num_output_tokens) == (130, 100, 1)

    meter.add("c", 7)
    meter.first_token("b", 20.0)
    meter.first_token("c", 30.0)
    report = stepped(meter)
    assert [(first.prompt_id, first.num_tokens_ahead) for first in report.first_tokens] == [("b", 100), ("c", 30)]
    assert report.num_waiting_tokens == 37
    assert meter.num_waiting_tokens == 0


def test_tokens_from_the_prefix_cache_waited_but_were_not_computed():
    meter = Meter()
    meter.add("a", 100)
    meter.first_token("a", 1.0)
    report = stepped(meter, num_cached_tokens=64)
    assert (report.num_waiting_tokens, report.num_prefilled_tokens) == (100, 36)


def test_there_is_no_report_before_the_first_step_and_then_the_last_one():
    meter = Meter()
    assert meter.last_step is None
    report = stepped(meter)
    assert meter.last_step is report
    assert report.first_tokens == ()


def test_a_prompt_that_is_dropped_or_was_never_there_is_not_counted():
    meter = Meter()
    meter.add("a", 100)
    meter.add("b", 30)
    meter.drop(["a", "never heard of", "a"])
    meter.first_token("a", 1.0)
    assert stepped(meter).first_tokens == ()
    assert (list(meter), meter.num_waiting_tokens) == (["b"], 30)
    meter.drop(["b"])
    assert (len(meter), meter.num_waiting_tokens) == (0, 0)


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["add", "first", "drop", "step"]), st.integers(0, 5), st.integers(1, 50)), max_size=60
    )
)
def test_whatever_happens_the_waiting_tokens_are_those_of_the_waiting_prompts(events):
    meter, waiting, told = Meter(), {}, []
    for event, name, num_tokens in events:
        prompt_id = f"p{name}"
        if event == "add" and prompt_id not in waiting:
            meter.add(prompt_id, num_tokens)
            waiting[prompt_id] = num_tokens
        elif event == "first":
            meter.first_token(prompt_id, 1.0)
            told += [waiting.pop(prompt_id)] if prompt_id in waiting else []
        elif event == "drop":
            meter.drop([prompt_id])
            waiting.pop(prompt_id, None)
        elif event == "step":
            report = stepped(meter)
            assert report.num_waiting_tokens == sum(waiting.values()) + sum(told)
            assert [first.num_prompt_tokens for first in report.first_tokens] == told
            told = []
        assert meter.num_waiting_tokens == sum(waiting.values())


def cache(**fields):
    sizes = {"num_blocks": 1000, "block_size": 16, "num_tokens": 16_000}
    return KvCache(dtype="bfloat16", is_read=False, asked="auto", prefix_caching=False, **{**sizes, **fields})


def test_a_sequence_takes_whole_blocks_in_each_group():
    assert [cache().blocks_for(num_tokens, 64) for num_tokens in (1, 16, 17, 160)] == [1, 1, 2, 10]
    assert cache(groups=(None, None)).blocks_for(17, 64) == 4
    assert cache(groups=(None, None), group_block_sizes=(16, 32)).blocks_for(65, 64) == 5 + 3


def test_a_group_with_a_window_holds_no_more_than_the_window_and_the_steps_under_way():
    """(128 - 1 + 64) tokens are 12 blocks, 13 if they begin within one."""
    windowed = cache(groups=(128,))
    assert [windowed.blocks_for(num_tokens, 64) for num_tokens in (100, 208, 209, 10_000)] == [7, 13, 13, 13]
    assert cache(groups=(128,), max_concurrent_steps=2).blocks_for(10_000, 64) == 17
    assert cache(groups=(128, None)).blocks_for(1600, 64) == 13 + 100


def test_speculative_tokens_take_slots_beyond_the_sequence():
    assert cache(num_lookahead_tokens=4).blocks_for(14, 64) == 2


def test_the_null_block_is_not_for_sequences():
    assert (cache().num_usable_blocks, cache(num_null_blocks=1).num_usable_blocks) == (1000, 999)
