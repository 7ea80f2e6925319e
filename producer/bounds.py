"""What `enqueue` refuses by looking: texts over the bound, and documents that no live worker's engine can take."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..common.engine_card import EngineCard
from ..common.errors import RequestRefused
from ..common.schema import IngestRequest
from ..common.scripts import MAX_CALL_BYTES
from ..common.tpu_sampling import unsupported_on_tpu


def check_bytes(request: IngestRequest, json_bytes: int, max_text_bytes: int) -> None:
    """Passes if the text and the whole request are within their bounds.

    Args:
        json_bytes: length of the request's JSON. It is never shorter than the text, so that most texts pass unmeasured.

    Raises:
        RequestRefused: one of them is not.
    """
    if json_bytes > max_text_bytes and (text_bytes := len(request.text.encode())) > max_text_bytes:
        raise RequestRefused(
            request.document_id,
            f"the text has {text_bytes} bytes, the bound is {max_text_bytes}; split it or raise INGEST_MAX_TEXT_BYTES",
        )
    if json_bytes > MAX_CALL_BYTES:
        raise RequestRefused(
            request.document_id,
            f"the request has {json_bytes} bytes as JSON, the bound is {MAX_CALL_BYTES}; split the document",
        )


def check_context(request: IngestRequest, json_bytes: int, cards: Sequence[EngineCard]) -> None:
    """Passes if at least one of the engines might run the request, or there is none.

    A prompt of n bytes has at least n / max_token_bytes tokens: what is refused here can't run, what passes may still
    be refused by the worker, which counts the tokens.

    Raises:
        RequestRefused: none can run it.
    """
    if not cards or any(_fits(request, json_bytes, card) for card in cards):
        return
    prompt_bytes = _least_prompt_bytes(request)
    if any(_fits(request, prompt_bytes, card) for card in cards):
        return
    card = max(cards, key=lambda card: card.max_model_len)
    prompt, output = _tokens(request, prompt_bytes, card)
    raise RequestRefused(
        request.document_id,
        f"it needs at least {prompt + output} tokens ({prompt} of prompt, {output} of output), max_model_len is "
        f"{card.max_model_len} on the roomiest live worker that serves {request.model!r}; "
        f"split it, lower max_tokens or raise INGEST_ENGINE_MAX_MODEL_LEN",
    )


def check_sampling(request: IngestRequest, cards: Sequence[EngineCard]) -> None:
    """Passes if at least one of the engines samples as asked, or there is none.

    Raises:
        RequestRefused: none does.
    """
    if not cards or any(card.device != "tpu" for card in cards):
        return
    unsupported = unsupported_on_tpu(request.sampling)
    if unsupported:
        shown = ", ".join(f"{name}={value}" for name, value in unsupported.items())
        seed = ", and set temperature to 0 for the same output every time" if "seed" in unsupported else ""
        raise RequestRefused(
            request.document_id,
            f"sampling: {shown} not supported by the TPU runtime, and every live worker that serves "
            f"{request.model!r} is on TPU; leave it out{seed}",
        )


def _fits(request: IngestRequest, prompt_bytes: int, card: EngineCard) -> bool:
    return sum(_tokens(request, prompt_bytes, card)) <= card.max_model_len


def _tokens(request: IngestRequest, prompt_bytes: int, card: EngineCard) -> tuple[int, int]:
    """Tokens of prompt and output at least; an engine that clamps may cut the output down to one."""
    prompt = max(1, -(-prompt_bytes // card.max_token_bytes))
    return prompt, request.sampling.max_tokens if card.over_length == "refuse" else 1


def _least_prompt_bytes(request: IngestRequest) -> int:
    """Bytes of the prompt at least: templates strip white space, and some tokenizers normalize to NFKC."""
    parts = [part.strip() for part in (request.system, request.instruction, request.text) if part]
    return sum(min(len(part.encode()), len(unicodedata.normalize("NFKC", part).encode())) for part in parts)
