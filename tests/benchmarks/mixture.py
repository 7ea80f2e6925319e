"""A mixture of tasks: documents whose output lengths go by their task, and that nobody is told of.

All ask for the same `max_tokens`. The tiny model of bench_feed.py has no natural end, so each document has a hidden
length: the engine is given that instead of `max_tokens`, by a wrapper behind the worker's back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from lengths import long_tailed
from passages import reference

from ingestq.producer import IngestRequest, Sampling
from ingestq.workers.pool import Ready, ReadyPool

MAX_TOKENS = 128

# Instruction -> output tokens, the median of the task's documents. Around it they are lognormal.
TASKS = {
    "Name the topic.": 3,
    "List the names that occur.": 12,
    "Summarize in three sentences.": 40,
    "Rewrite in plain words.": 96,
}
_SIGMA = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Documents, and the output tokens of each."""

    requests: list[IngestRequest]
    num_output_tokens: list[int]


def mixture(tokenizer: Any, number: int, *, model: str, prompt_tokens: tuple[int, int], seed: int) -> Mixture:
    """Documents of all tasks in random order; always the same."""
    rng = random.Random(seed)
    token_ids = tokenizer.encode(reference())
    sampling = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)
    requests, lengths = [], []
    for i in range(number):
        instruction = rng.choice(list(TASKS))
        length, start = long_tailed(rng, *prompt_tokens), rng.randrange(len(token_ids) - prompt_tokens[1])
        requests.append(
            IngestRequest(
                document_id=f"{seed}/{i}",
                text=tokenizer.decode(token_ids[start : start + length]),
                instruction=instruction,
                model=model,
                chat=False,
                sampling=sampling,
            )
        )
        lengths.append(min(MAX_TOKENS, max(1, round(TASKS[instruction] * rng.lognormvariate(0, _SIGMA)))))
    return Mixture(requests=requests, num_output_tokens=lengths)


@contextmanager
def arrival_order() -> Iterator[None]:
    """Ready prompts start in the order in which they came, whatever is expected of them."""
    put = ReadyPool.put

    def put_alike(self: ReadyPool, ready: Ready) -> None:
        put(self, replace(ready, expected_output=0.0))

    with patch.object(ReadyPool, "put", put_alike), patch.object(ReadyPool, "reorder"):
        yield
