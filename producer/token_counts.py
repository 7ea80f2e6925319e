"""How long real documents are, in tokens: counted by the model's own tokenizer, or bounded by their bytes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from ..common.errors import TokenizerError
from ..common.schema import IngestRequest

# Texts that go to the tokenizer in one call: it uses all cores for them, and they stay a few MB.
_BATCH = 64

# ASCII bytes of a token. Of 258 pages of PostgreSQL's manual, 90 % lie between 3.2 and 5.3 and the sums between 4.2 and
# 4.5, under vocabularies of 49k (SmolLM2), 100k (cl100k) and 200k (o200k); measured 2026-11-24.
_ASCII_PER_TOKEN = 3, 5
# Other characters of a token: Chinese, Japanese, Russian, Hindi and Thai sentences took 1.0 to 4.4 under the latter
# two. A vocabulary that was not trained on a script takes more tokens than characters.
_OTHERS_PER_TOKEN = 1, 4


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How the lengths of documents are distributed, in tokens."""

    min: int
    # Half of the documents are at most that long; of `p95`, 95 of 100.
    p50: int
    p95: int
    max: int
    sum: int

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Lengths:
        """Of at least one document. A percentile is the length of a document (nearest rank)."""
        ordered = sorted(lengths)
        p50, p95 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95))
        return cls(min=ordered[0], p50=p50, p95=p95, max=ordered[-1], sum=sum(ordered))


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Documents measured: prompts without what a chat template adds (some 10 to 40 tokens each)."""

    num_documents: int
    num_bytes: int
    # The same where the count is exact.
    low: Lengths
    high: Lengths
    exact: bool
    # Of the system prompt and instruction, where all documents have the same ones; 0 otherwise.
    shared_prefix_tokens: int
    # Documents that surely are longer than was asked for.
    num_too_long: int
    # What counted them, or why they are bounds and how to get exact ones.
    method: str

    @property
    def mean(self) -> int:
        """Tokens of the average prompt, rounded up; where it is a range, its upper end."""
        return -(-self.high.sum // self.num_documents)


class Counter(Protocol):
    """Tells tokens of texts."""

    # As in `TokenCounts`.
    exact: bool
    method: str

    def count(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """For each text the fewest and the most tokens that it can have."""
        ...


class BytesCounter:
    """Bounds from bytes alone, for most texts."""

    exact = False

    def __init__(self, reason: str) -> None:
        """Args: reason: why there is no tokenizer, and what to do about it."""
        few, many = _ASCII_PER_TOKEN
        self.method = f"estimated from bytes, {few} to {many} of English a token; {reason}"

    def count(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        return [_bounds(text) for text in texts]


def _bounds(text: str) -> tuple[int, int]:
    others = len(text) - (ascii_bytes := len(text.encode("ascii", "ignore")))
    high, low = (
        -(-ascii_bytes // per_ascii) + -(-others // per_other)
        for per_ascii, per_other in zip(_ASCII_PER_TOKEN, _OTHERS_PER_TOKEN, strict=True)
    )
    return low, high


class TokenizerCounter:
    """The exact count of a tokenizer.json."""

    exact = True

    def __init__(self, path: Path) -> None:
        """Raises: TokenizerError: the file isn't one, or the package `tokenizers` is not installed."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise TokenizerError(f"{path}: needs the package tokenizers; pip install 'ingestq[tokens]'") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more special
            raise TokenizerError(f"{path} can't be read as a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.method = f"counted by {path}"

    def count(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [(len(encoding), len(encoding)) for encoding in encodings]


def find_counter(model: str, tokenizer: str | None) -> Counter:
    """The exact counter if there is a tokenizer to be had, else one that says how to get it.

    Args:
        model: as for `load_layout`; a folder or the config.json in it may have its tokenizer.json beside it.
        tokenizer: a tokenizer.json, or the folder that has one.

    Raises:
        TokenizerError: `tokenizer` can't be used.
    """
    if tokenizer is not None:
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; --tokenizer takes the model's tokenizer.json or its folder")
        return TokenizerCounter(path)
    folder = Path(model) if Path(model).is_dir() else Path(model).parent if Path(model).is_file() else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        return BytesCounter("exact with the model's tokenizer.json: --tokenizer PATH")
    try:
        return TokenizerCounter(folder / "tokenizer.json")
    except TokenizerError as error:
        return BytesCounter(str(error))


def count_tokens(
    requests: Iterable[IngestRequest],
    counter: Counter,
    *,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> TokenCounts | None:
    """The lengths of the documents, read as they come; None if there are none.

    Args:
        max_tokens: of a prompt; how many documents surely have more is counted.
        on_progress: called with the number of documents so far.
    """
    low, high = array("Q"), array("Q")
    num_bytes = 0
    prefix: str | None = None
    is_shared = True
    for batch in _batches(requests):
        heads = [_joined(request.system, request.instruction) for request in batch]
        prefix = heads[0] if prefix is None else prefix
        is_shared &= all(head == prefix for head in heads)
        texts = [_joined(head, request.text) for head, request in zip(heads, batch, strict=True)]
        num_bytes += sum(len(text.encode()) for text in texts)
        for fewest, most in counter.count(texts):
            low.append(fewest)
            high.append(most)
        on_progress(len(high))
    if not high:
        return None
    return TokenCounts(
        num_documents=len(high),
        num_bytes=num_bytes,
        low=Lengths.of(low),
        high=Lengths.of(high),
        exact=counter.exact,
        # The lower bound: the prefix cache is promised no more than it can save.
        shared_prefix_tokens=counter.count([prefix])[0][0] if prefix and is_shared else 0,
        num_too_long=sum(fewest > max_tokens for fewest in low) if max_tokens is not None else 0,
        method=counter.method,
    )


def _batches(requests: Iterable[IngestRequest]) -> Iterator[list[IngestRequest]]:
    iterator = iter(requests)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _joined(*parts: str | None) -> str:
    """As the worker joins them (or nearly so: a chat template puts its own marks between)."""
    return "\n\n".join(part for part in parts if part)
