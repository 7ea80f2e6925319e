"""The article's claims against the planner: each verdict follows from computed numbers."""

import re
from pathlib import Path

import pytest

from ingestq.producer import article
from ingestq.producer.article import Verdict, Word, judge, render


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    return {verdict.claim: verdict for verdict in judge()}


def about(verdicts: dict[str, Verdict], words: str) -> Verdict:
    [found] = [verdict for claim, verdict in verdicts.items() if words in claim]
    return found


@pytest.mark.parametrize(
    ("claim", "word", "numbers"),
    [
        ("BF16: 16.7M tokens", Word.IMPOSSIBLE, ["2,000 bytes", "20,480", "245,760"]),
        ("FP8: 16.7M tokens", Word.IMPOSSIBLE, ["1,000 bytes", "10,240", "143,360"]),
        ("475,552", Word.IMPOSSIBLE, ["122%", "391k"]),
        ("~256 users stable", Word.PARTLY, ["13 are resident"]),
        ("1024 users stable", Word.PARTLY, ["23 are resident", "201 in the ideal"]),
        ("BF16: TTFT", Word.TRUE, ["11.3 s"]),
        ("FP8: TTFT", Word.TRUE, ["17.6 s"]),
        ("64 users: TTFT", Word.TRUE, ["2.46 s"]),
        ("doubles capacity", Word.PARTLY, ["1.71 times", "2.00 times"]),
        ("runs out of memory", Word.FALSE, ["51.7 GiB"]),
        ("exactly max_model_len", Word.TRUE, ["32769"]),
        ("N-gram", Word.UNSUPPORTED, []),
        ("128 GB", Word.TRUE, ["125 GiB"]),
        ("configuration template", Word.FALSE, ["speculative_decoding_method", "swap_space", "compile_cache_max_size"]),
    ],
)
def test_a_claim_is_judged_by_the_planners_numbers(verdicts, claim, word, numbers):
    verdict = about(verdicts, claim)
    assert verdict.word is word, verdict.because
    for number in numbers:
        assert number in verdict.because


def test_every_row_of_the_articles_table_is_judged(verdicts):
    for number in (
        "~256 users",
        "~185,000 tok/s",
        "~33.4 GB",
        "~14.8 s",
        "1024 users",
        "475,552",
        "~16.7 GB",
        "~19.2 s",
    ):
        assert any(number in claim for claim in verdicts), number


def test_the_verdicts_numbers_are_computed_not_typed():
    """What the planner says stands nowhere in the source."""
    source = Path(article.__file__).read_text()
    claims = " ".join(verdict.claim for verdict in judge())
    for verdict in judge():
        for number in re.findall(r"\d[\d,]*\.?\d+", verdict.because):
            assert number not in source or number in claims or number in str(article.TEMPLATE), (number, verdict)


def test_a_better_machine_changes_the_verdict(monkeypatch):
    before = {verdict.claim: verdict.word for verdict in judge()}
    monkeypatch.setattr(article, "CHIPS", "v6e-8")
    after = {verdict.claim: verdict.word for verdict in judge()}
    assert before["FP8: peak prefill 475,552 tok/s"] is Word.IMPOSSIBLE
    assert after["FP8: peak prefill 475,552 tok/s"] is not Word.IMPOSSIBLE


def test_the_text_has_every_verdict(verdicts):
    text = " ".join(render(list(verdicts.values()), 100).split())
    for verdict in verdicts.values():
        assert f"{verdict.word.upper()} {verdict.claim} {verdict.because}" in text
