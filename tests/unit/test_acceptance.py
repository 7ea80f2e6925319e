"""The acceptance run's arithmetic and verdicts, and its report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ingestq.workers.acceptance.arithmetic import Agreement, Scored, agreement, percentile
from ingestq.workers.acceptance.cli import _command, main
from ingestq.workers.acceptance.observer import Sample
from ingestq.workers.acceptance.probe import Answer
from ingestq.workers.acceptance.report import Report, Section, Table, Verdict
from ingestq.workers.acceptance.section_kv_cache import comparison, kv_cache_section
from ingestq.workers.acceptance.section_plan import plan_section
from ingestq.workers.acceptance.section_ramp import level_of
from ingestq.workers.acceptance.section_recovery import num_doubled
from ingestq.workers.acceptance.section_restart import Start, cache_folder, num_entries, restart_section

# --- percentiles


@pytest.mark.parametrize(
    ("percent", "value"),
    [(0, 1.0), (50, 5.0), (90, 9.0), (91, 10.0), (99, 10.0), (100, 10.0)],
)
def test_percentiles_are_those_of_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], percent) == value


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile([], 50))


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.floats(min_value=0, max_value=100))
def test_a_percentile_is_one_of_the_values_and_so_many_are_not_above_it(values: list[float], percent: float) -> None:
    found = percentile(values, percent)

    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-9


# --- agreement


def scored(*tokens: int, sure: float = -0.1, others: dict[int, float] | None = None) -> Scored:
    return Scored(token_ids=tokens, logprobs=[{**(others or {}), token: sure} for token in tokens])


def test_an_engine_agrees_with_itself() -> None:
    outputs = [scored(1, 2, 3), scored(4)]

    found = agreement(outputs, outputs)

    assert found == Agreement(
        num_documents=2,
        num_identical=2,
        num_tokens=4,
        num_agreed=4,
        num_compared=4,
        mean_logprob_difference=0.0,
        p99_logprob_difference=0.0,
        max_logprob_difference=0.0,
    )
    assert found.token_agreement == 1.0


def test_nothing_is_compared_behind_the_first_token_that_differs() -> None:
    first = scored(1, 2, 3, 4)
    second = scored(1, 9, 3, 4, others={2: -2.1})  # its second choice there was the first one's

    found = agreement([first], [second])

    assert (found.num_identical, found.num_agreed, found.num_compared, found.num_tokens) == (0, 1, 2, 4)
    assert found.token_agreement == 0.5
    assert found.max_logprob_difference == pytest.approx(2.0)
    assert found.mean_logprob_difference == pytest.approx(1.0)


def test_a_token_that_is_not_among_the_likeliest_has_no_difference() -> None:
    found = agreement([scored(1)], [scored(2)])

    assert (found.num_agreed, found.num_compared) == (0, 1)
    assert math.isnan(found.mean_logprob_difference)


def test_one_that_stops_earlier_agrees_as_far_as_it_went() -> None:
    found = agreement([scored(1, 2)], [scored(1, 2, 3)])

    assert (found.num_identical, found.num_agreed, found.num_compared) == (0, 2, 2)


outputs = st.lists(st.integers(0, 3), max_size=8).map(lambda ids: scored(*ids, others=dict.fromkeys(range(4), -1.0)))


@given(st.lists(st.tuples(outputs, outputs), max_size=6))
def test_agreement_is_the_same_both_ways(pairs: list[tuple[Scored, Scored]]) -> None:
    one = agreement([a for a, _ in pairs], [b for _, b in pairs])
    other = agreement([b for _, b in pairs], [a for a, _ in pairs])

    assert (one.num_identical, one.num_agreed, one.num_compared) == (
        other.num_identical,
        other.num_agreed,
        other.num_compared,
    )
    assert 0 <= one.num_agreed <= one.num_compared <= one.num_tokens
    assert 0.0 <= one.token_agreement <= 1.0


# --- sections


def answer(**changes: Any) -> Answer:
    card = {"model": "m", "device": "tpu", "max_model_len": 1024, "max_num_seqs": 16}
    kv_cache = {"dtype": "fp8_e5m2", "is_read": True, "asked": "fp8_e5m2", "num_blocks": 100, "block_size": 128}
    plan = {"kv_tokens": {"value": None, "low": 12_000.0, "high": 13_000.0, "unit": "tokens"}}
    defaults: dict[str, Any] = {
        "start_seconds": 1.0,
        "total_seconds": 2.0,
        "card": card,
        "kv_cache": {**kv_cache, "num_tokens": 12_800, "prefix_caching": True},
        "devices": [],
        "plan": plan,
        "wrong_dtype": None,
        "off_plan": [],
        "versions": {},
        "prompt_tokens": [],
        "refusals": [],
        "scored": [scored(1, 2, 3)],
    }
    return Answer(**{**defaults, **changes})


def test_a_kv_cache_of_another_type_or_size_than_planned_fails() -> None:
    assert plan_section(answer()).verdict is Verdict.PASS
    for section in (
        plan_section(answer(wrong_dtype="not as asked")),
        plan_section(answer(off_plan=["kv_tokens: not as asked"])),
    ):
        assert section.verdict is Verdict.FAIL
        assert "not as asked" in section.reason
    assert plan_section(answer(plan=None)).verdict is Verdict.NOT_POSSIBLE


def test_fp8_is_compared_with_the_models_own_type() -> None:
    compared = comparison("fp8_e5m2", "tpu")

    assert compared is not None
    assert compared.reference == {"INGEST_ENGINE_KV_CACHE_DTYPE": "auto"}
    assert not compared.stands_in


def test_without_fp8_there_is_nothing_to_compare_but_on_a_cpu_where_another_pair_stands_in() -> None:
    assert comparison("auto", "tpu") is None
    stand_in = comparison("auto", "cpu")
    assert stand_in is not None
    assert stand_in.stands_in


def test_fp8_that_chooses_other_tokens_fails_and_a_stand_in_never_does() -> None:
    compared = comparison("fp8_e5m2", "tpu")
    stand_in = comparison("auto", "cpu")
    assert compared
    assert stand_in
    same, other = answer(), answer(scored=[scored(9, 2, 3)])

    assert kv_cache_section(compared, same, same).verdict is Verdict.PASS
    failed = kv_cache_section(compared, same, other)
    assert failed.verdict is Verdict.FAIL
    assert "the bar is 90%" in failed.reason
    assert kv_cache_section(stand_in, same, other).verdict is Verdict.NOT_POSSIBLE


def sample(**values: Any) -> Sample:
    defaults = dict.fromkeys(Sample.__dataclass_fields__, 0) | {"step_seconds": 0.0, "kv_usage": 0.0, "at": 0.0}
    return Sample(**{**defaults, **values})


def test_a_level_counts_what_grew_since_the_queue_was_opened() -> None:
    before = sample(prompt_tokens=100, cached_tokens=10, output_tokens=50, step_seconds=1.0, num_preemptions=2)
    samples = [
        sample(max_in_flight=8, kv_usage=0.5, rss_bytes=7, prompt_tokens=150, num_preemptions=2),
        sample(
            max_in_flight=3,
            kv_usage=0.1,
            rss_bytes=5,
            prompt_tokens=300,
            cached_tokens=60,
            output_tokens=90,
            step_seconds=3.0,
            num_preemptions=3,
            num_compilations=4,
        ),
    ]
    rows = [{"status": "succeeded", "ttft_ms": 5.0}, {"status": "failed"}]

    level = level_of(8, 2, rows, before, samples)

    assert (level.prompt_tokens, level.output_tokens, level.seconds) == (150, 40, 2.0)
    assert (level.max_in_flight, level.kv_usage, level.memory_bytes, level.memory_kind) == (8, 0.5, 7, "RSS")
    assert (level.num_preemptions, level.num_recompiles) == (1, 4)
    assert not level.ok  # one of two failed
    assert replace(level, num_succeeded=2).ok
    assert not replace(level, num_succeeded=2, max_in_flight=9).ok


def test_memory_is_the_accelerators_where_it_tells() -> None:
    level = level_of(1, 0, [], None, [sample(device_bytes=9, rss_bytes=5)])

    assert (level.memory_bytes, level.memory_kind) == (9, "HBM")


def start(before: int | None, after: int | None, seconds: float = 1.0) -> Start:
    return Start(label="s", seconds=seconds, entries_before=before, entries_after=after)


@pytest.mark.parametrize(
    ("starts", "verdict", "said"),
    [
        ([start(0, 40, 1500.0), start(40, 40), start(40, 40, 60.0)], Verdict.PASS, "cold 1500 s"),
        ([start(40, 40), start(40, 40), start(40, 40)], Verdict.PASS, "warm beforehand"),
        ([start(0, 40), start(40, 40), start(40, 43)], Verdict.FAIL, "3 new entries"),
        ([start(0, 0), start(0, 0), start(0, 0)], Verdict.FAIL, "VLLM_XLA_CACHE_PATH"),
    ],
)
def test_a_restart_must_find_everything_compiled(starts: list[Start], verdict: Verdict, said: str) -> None:
    section = restart_section(starts, Path("/cache"))

    assert section.verdict is verdict
    assert said in section.reason


def test_without_a_compile_cache_there_is_nothing_to_hit() -> None:
    assert restart_section([start(None, None)] * 3, None).verdict is Verdict.NOT_POSSIBLE


def test_the_compile_cache_is_where_vllm_puts_it(tmp_path: Path) -> None:
    assert cache_folder({"VLLM_XLA_CACHE_PATH": "/data/xla"}, "tpu") == Path("/data/xla")
    assert cache_folder({"XDG_CACHE_HOME": "/home/u/.cache"}, "tpu") == Path("/home/u/.cache/vllm/xla_cache")
    assert cache_folder({"VLLM_XLA_CACHE_PATH": "/data/xla"}, "cpu") is None
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "entry").touch()
    assert num_entries(tmp_path) == 1
    assert num_entries(tmp_path / "absent") == 0
    assert num_entries(None) is None


@pytest.mark.parametrize(
    ("rows", "announced", "num_results", "doubled"),
    [
        (["a", "b"], ["a", "b"], [1, 1], 0),
        (["a", "b", "a"], ["a", "b"], [1, 1, 1], 1),
        (["a", "b"], ["a", "b", "b"], [1, 1], 1),
        (["a", "b"], ["a", "b"], [1, 2], 1),
        (["a", "a"], ["a", "a"], [2, 2], 1),
    ],
)
def test_a_document_is_doubled_if_any_book_has_it_twice(
    rows: list[str], announced: list[str], num_results: list[int], doubled: int
) -> None:
    assert num_doubled(rows, announced, num_results) == doubled


# --- report


def section(verdict: Verdict, **changes: Any) -> Section:
    defaults: dict[str, Any] = {"name": "n", "title": "T", "verdict": verdict, "reason": "why", "figures": {}}
    return Section(**{**defaults, **changes})


def report(*sections: Section) -> Report:
    return Report(started="2026-11-24T12:00:00+00:00", seconds=61.4, command="ingestq-acceptance", sections=sections)


def test_a_report_fails_only_by_what_failed() -> None:
    assert report(section(Verdict.PASS), section(Verdict.NOT_POSSIBLE)).passed
    assert not report(section(Verdict.PASS), section(Verdict.FAIL)).passed


def test_the_page_has_every_verdict_figure_and_row_and_foreign_text_breaks_no_table() -> None:
    figures = {"a figure": 1234567, "share": 0.12345, "none": None, "flag": True}
    table = Table(header=("x", "y"), rows=[(1, "a|b\nc")])

    page = report(section(Verdict.FAIL, figures=figures, table=table, notes=["So it is."])).to_markdown()

    assert "**FAILED**" in page
    assert "## T: fail" in page
    for line in ("| a figure | 1,234,567 |", "| share | 0.123 |", "| none | - |", "| flag | yes |", "| 1 | a\\|b c |"):
        assert line in page.splitlines()
    assert page.endswith("So it is.\n")


def test_the_object_has_the_same() -> None:
    told = json.loads(json.dumps(report(section(Verdict.PASS, figures={"a": 1})).to_json()))

    assert told["passed"] is True
    assert told["sections"][0]["figures"] == {"a": 1}
    assert told["sections"][0]["verdict"] == "pass"


# --- command line


def test_a_password_in_the_address_is_not_in_the_report() -> None:
    url = "redis://user:secret@host:6379/0"

    assert _command(["/bin/ingestq-acceptance", "--url", url, "-o", "a b"], url) == (
        "ingestq-acceptance --url URL -o 'a b'"
    )
    assert "secret" not in _command(["ingestq-acceptance", f"--url={url}"], url)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--in-flight", "8,x"], "numbers with commas between them"),
        (["--in-flight", "0"], "each level is 1 to 4096"),
        (["--in-flight", "5000"], "each level is 1 to 4096"),
        (["--engine-config", "/nowhere.yaml"], "does not exist"),
        (["--documents", "/nowhere"], "does not exist"),
    ],
)
def test_wrong_usage_is_said_before_anything_starts(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, arguments)

    assert done.exit_code == 2
    assert said in done.output
