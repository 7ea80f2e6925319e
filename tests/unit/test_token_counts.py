"""Tokens of real documents: exact with a tokenizer, honest bounds without."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ingestq.common.errors import TokenizerError
from ingestq.common.schema import IngestRequest
from ingestq.producer.token_counts import BytesCounter, Lengths, TokenizerCounter, count_tokens, find_counter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder whose tokenizer makes a token of each word."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(max_length=8)  # some shipped tokenizers cut, which no count may do
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def requests(*texts: str, **fields: str) -> list[IngestRequest]:
    return [IngestRequest(document_id=f"d{n}", text=text, model="m", **fields) for n, text in enumerate(texts)]


def test_a_tokenizer_counts_exactly_and_never_cuts(folder):
    counts = count_tokens(requests("one two", "w " * 100, "a b c"), TokenizerCounter(folder / "tokenizer.json"))
    assert counts.exact
    assert counts.low == counts.high == Lengths(min=2, p50=3, p95=100, max=100, sum=105)
    assert counts.mean == 35
    assert counts.num_bytes == 7 + 200 + 5


def test_percentiles_are_lengths_of_documents():
    lengths = Lengths.of(range(1, 101))
    assert (lengths.p50, lengths.p95) == (50, 95)
    assert Lengths.of([7]) == Lengths(min=7, p50=7, p95=7, max=7, sum=7)


@given(st.lists(st.integers(0, 10**9), min_size=1))
def test_percentiles_are_in_order(lengths):
    found = Lengths.of(lengths)
    assert found.min <= found.p50 <= found.p95 <= found.max


def test_the_prompt_is_counted_with_its_instruction_which_is_the_shared_prefix(folder):
    counter = TokenizerCounter(folder / "tokenizer.json")
    counts = count_tokens(requests("a b", "c", system="Be brief.", instruction="Sum it up."), counter)
    assert counts.shared_prefix_tokens == 5
    assert counts.low.sum == 2 * 5 + 3


def test_documents_with_different_instructions_share_no_prefix(folder):
    mixed = requests(*["a"] * 100, instruction="One.") + requests("b", instruction="Another.")
    counter = TokenizerCounter(folder / "tokenizer.json")
    assert count_tokens(mixed, counter).shared_prefix_tokens == 0
    assert count_tokens(requests("a", "b"), counter).shared_prefix_tokens == 0


def test_documents_that_are_surely_too_long_are_counted(folder):
    texts = requests("w " * 10, "w " * 11, "w " * 12)
    assert count_tokens(texts, TokenizerCounter(folder / "tokenizer.json"), max_tokens=10).num_too_long == 2
    # By bytes they have 3 to 8 tokens, 10 surely is not exceeded.
    assert count_tokens(texts, BytesCounter("no tokenizer"), max_tokens=10).num_too_long == 0


def test_no_documents_have_no_lengths():
    assert count_tokens([], BytesCounter("no tokenizer")) is None


@pytest.mark.parametrize("name", [".", "config.json"])
def test_the_tokenizer_beside_the_models_config_is_found(folder, name):
    assert find_counter(str(folder / name), None).exact


def test_a_tokenizer_can_be_named_by_file_or_folder(folder):
    for path in (folder, folder / "tokenizer.json"):
        assert find_counter("gemma-4-26b-a4b", str(path)).exact


def test_without_a_tokenizer_the_bounds_say_how_to_get_the_exact_count():
    counter = find_counter("gemma-4-26b-a4b", None)
    assert not counter.exact
    assert "--tokenizer" in counter.method


def test_a_tokenizer_that_is_asked_for_must_be_there_and_readable(tmp_path):
    with pytest.raises(TokenizerError, match="no such file; --tokenizer takes"):
        find_counter("m", str(tmp_path / "none.json"))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"can't be read as a tokenizer\.json"):
        find_counter("m", str(tmp_path))


def test_a_broken_tokenizer_that_nobody_asked_for_is_told_and_bounds_take_its_place(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[]")
    counter = find_counter(str(tmp_path), None)
    assert not counter.exact
    assert "can't be read as a tokenizer.json" in counter.method


def test_without_the_package_the_way_to_get_it_is_told(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'ingestq\[tokens\]'"):
        find_counter("gemma-4-26b-a4b", str(folder))
    assert "pip install" in find_counter(str(folder), None).method


@given(st.text(min_size=1))
def test_bounds_are_in_order_and_never_zero(text):
    [(low, high)] = BytesCounter("test").count([text])
    assert 1 <= low <= high


@given(st.text(min_size=1), st.text(min_size=1))
def test_more_text_never_has_fewer_tokens(text, more):
    counter = BytesCounter("test")
    [(low, high), (low_of_both, high_of_both)] = counter.count([text, text + more])
    assert low <= low_of_both
    assert high <= high_of_both
