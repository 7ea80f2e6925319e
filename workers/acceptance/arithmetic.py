"""The arithmetic behind the figures: percentiles, and how far two runs of a model agree. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` % of all don't exceed (nearest rank); nan without values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A greedy output and how sure the model was of it."""

    # Shape [num_output_tokens].
    token_ids: Sequence[int]
    # For each position: token id -> natural log of its probability, of the chosen token and the likeliest ones.
    logprobs: Sequence[Mapping[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a second model's greedy outputs agree with a first one's, over the same prompts."""

    num_documents: int
    # Documents whose outputs are the same to the last token.
    num_identical: int
    # The first one's output tokens.
    num_tokens: int
    # Tokens that both chose from the same context: up to the first that differs in each document.
    num_agreed: int
    # Contexts that both had: the agreed tokens, and the first one that differs.
    num_compared: int
    # |difference| of the log-probability that both gave the first one's token in the same context; nan without any.
    mean_logprob_difference: float
    p99_logprob_difference: float
    max_logprob_difference: float

    @property
    def token_agreement(self) -> float:
        """Share of the contexts that both had in which they chose the same token; 1 without any."""
        return self.num_agreed / self.num_compared if self.num_compared else 1.0


def agreement(first: Sequence[Scored], second: Sequence[Scored]) -> Agreement:
    """Compares outputs, position by position, as long as their contexts are the same.

    Behind the first token that differs the contexts differ, too, so nothing can be learnt from what follows. (Scoring
    one output with both would compare more, but takes prompt_logprobs, which the TPU runtime has for no multimodal
    model, Gemma 4 among them: tpu_runner.py of tpu_inference 0.32.)
    """
    pairs = list(zip(first, second, strict=True))
    agreed = [common_prefix(a.token_ids, b.token_ids) for a, b in pairs]
    compared = [min(same + 1, len(a.token_ids), len(b.token_ids)) for same, (a, b) in zip(agreed, pairs, strict=True)]
    differences = [
        abs(a.logprobs[i][a.token_ids[i]] - b.logprobs[i][a.token_ids[i]])
        for (a, b), length in zip(pairs, compared, strict=True)
        for i in range(length)
        if a.token_ids[i] in b.logprobs[i]  # else it is not among the second one's likeliest
    ]
    return Agreement(
        num_documents=len(pairs),
        num_identical=sum(list(a.token_ids) == list(b.token_ids) for a, b in pairs),
        num_tokens=sum(len(a.token_ids) for a, _ in pairs),
        num_agreed=sum(agreed),
        num_compared=sum(compared),
        mean_logprob_difference=sum(differences) / len(differences) if differences else math.nan,
        p99_logprob_difference=percentile(differences, 99),
        max_logprob_difference=max(differences, default=math.nan),
    )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
