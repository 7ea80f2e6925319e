"""Tokens of real pages: the bounds from their bytes against a real vocabulary."""

import logging
from pathlib import Path

import pytest

from demo.models import smollm2_gguf
from ingestq.producer.documents import read_documents
from ingestq.producer.token_counts import BytesCounter, TokenizerCounter, count_tokens

PAGES = Path(__file__).parents[2] / "deploy" / "demo" / "documents"


@pytest.fixture
def smollm2_tokenizer(tmp_path: Path) -> Path:
    """SmolLM2's, out of the file of its weights."""
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    gguf = smollm2_gguf()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(tmp_path)
    return tmp_path / "tokenizer.json"


def test_the_bounds_hold_for_real_pages_under_a_real_vocabulary(smollm2_tokenizer):
    documents = list(read_documents([str(PAGES)], model="m"))
    exact = count_tokens(documents, TokenizerCounter(smollm2_tokenizer))
    bounds = count_tokens(documents, BytesCounter("test"))
    assert bounds.low.sum < exact.low.sum < bounds.high.sum
    assert bounds.num_documents == exact.num_documents == len(documents)
