"""Prompts that wait for the engine: in which order they go, and that none is lost or waits for ever."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from ingestq.common.schema import Sampling
from ingestq.workers.engines.base import Prompt
from ingestq.workers.pool import Ready, ReadyPool


def ready(name: str, expected_output: float = 1.0, num_tokens: int = 10) -> Ready:
    prompt = Prompt(prompt_id=name, token_ids=[0] * num_tokens, sampling=Sampling(max_tokens=1))
    return Ready(prompt=prompt, num_blocks=1, expected_output=expected_output, kv_tokens=16)


def filled(*expected: float, max_passes: int = 100) -> ReadyPool:
    pool = ReadyPool(max_passes)
    for number, expected_output in enumerate(expected):
        pool.put(ready(str(number), expected_output))
    return pool


def names(readied: list[Ready]) -> list[str]:
    return [each.prompt.prompt_id for each in readied]


def test_the_longest_goes_first_and_equals_in_order_of_arrival() -> None:
    assert names(filled(5, 9, 5, 7).take(lambda _: True)) == ["1", "3", "0", "2"]


def test_what_does_not_pass_the_gate_is_not_overtaken() -> None:
    pool = filled(5, 9, 7)

    assert names(pool.take(lambda each: each.expected_output > 7)) == ["1"]
    assert names(pool.take(lambda each: each.expected_output < 7)) == []
    assert len(pool) == 2


def test_the_gate_is_asked_once_for_each_that_passes_and_for_the_first_that_does_not() -> None:
    asked: list[str] = []

    def gate(each: Ready) -> bool:
        asked.append(each.prompt.prompt_id)
        return len(asked) < 3

    filled(4, 3, 2, 1).take(gate)
    assert asked == ["0", "1", "2"]


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 3)), min_size=1, max_size=200), st.integers(0, 20))
def test_a_short_one_is_passed_by_no_more_than_may_pass(puts: list[tuple[int, int]], max_passes: int) -> None:
    pool, order = ReadyPool(max_passes), []
    for number, (expected, num_taken) in enumerate(puts):
        pool.put(ready(str(number), expected))
        left = iter(range(num_taken))
        order += names(pool.take(lambda _, left=left: next(left, None) is not None))
    order += names(pool.take(lambda _: True))

    for position, name in enumerate(order):
        assert sum(int(other) > int(name) for other in order[:position]) <= max_passes


def test_what_is_gone_is_not_kept() -> None:
    pool = ReadyPool(3)
    for number in range(1_000):
        pool.put(ready(str(number), 1000 - number))
        if number > 5:
            passes = iter([True, False])
            pool.take(lambda _, passes=passes: next(passes))
    assert len(pool) == 6
    assert len(pool._heap) <= 2 * 6 + 65


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=60), st.integers(1, 20))
def test_a_new_order_is_that_of_prompts_put_anew(expected: list[tuple[int, int]], max_passes: int) -> None:
    pool = filled(*(before for before, _ in expected), max_passes=max_passes)
    pool.reorder(lambda each: expected[int(each.prompt_id)][1])

    anew = filled(*(after for _, after in expected), max_passes=max_passes)
    assert pool.take(lambda _: True) == anew.take(lambda _: True)
    assert pool.num_tokens == 0


def test_drained_prompts_come_in_order_of_arrival_and_leave_nothing() -> None:
    pool = filled(5, 9, 7)

    assert names(pool.drain()) == ["0", "1", "2"]
    assert (len(pool), pool.num_tokens, pool.drain()) == (0, 0, [])


def test_dropped_prompts_are_not_started() -> None:
    pool = filled(5, 9, 7)
    pool.drop(["1", "no such"])

    assert (len(pool), pool.num_tokens) == (2, 20)
    assert names(pool.take(lambda _: True)) == ["2", "0"]


@given(
    st.lists(st.tuples(st.sampled_from(["put", "take", "drop", "drain", "reorder"]), st.integers(1, 50)), max_size=60)
)
def test_nothing_is_lost_nor_there_twice_and_tokens_add_up(calls: list[tuple[str, int]]) -> None:
    pool, inside = ReadyPool(5), {}
    for number, (call, size) in enumerate(calls):
        if call == "put":
            inside[str(number)] = size
            pool.put(ready(str(number), size, size))
        elif call == "take":
            left = iter(range(size))
            for name in names(pool.take(lambda _, left=left: next(left, None) is not None)):
                del inside[name]
        elif call == "drop":
            gone = list(inside)[:size]
            pool.drop(gone)
            for name in gone:
                del inside[name]
        elif call == "reorder":
            pool.reorder(lambda each, size=size: float(int(each.prompt_id) % size))
        else:
            assert sorted(names(pool.drain())) == sorted(inside)
            inside.clear()
        assert (len(pool), pool.num_tokens) == (len(inside), sum(inside.values()))


def test_waiting_ends_with_the_first_prompt() -> None:
    pool = ReadyPool(1)
    assert not pool.wait(0)

    putting = threading.Timer(0.01, pool.put, [ready("a")])
    putting.start()
    assert pool.wait(60)
    putting.join()
    assert pool.wait(0)
