"""What the queue knows of a document before anybody has tokenized it: its task, and about how long it is."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import orjson

from .schema import IngestRequest, Sampling

# 64 bits: a queue has a handful of tasks, and two that were confused would share their expected output, no more.
_TASK_ID_LENGTH = 16

# UTF-8 bytes of a prompt token. English runs at 4.2 to 4.5 (sums over 258 pages of PostgreSQL's manual; 90 % of the
# pages lie between 3.2 and 5.3), Chinese, Japanese, Russian, Hindi and Thai sentences at 3 to 9 (1.0 to 4.4
# characters), under vocabularies of 49k to 200k; see producer/token_counts.py. Rather too many tokens than too few:
# what was reserved too much is given back when the worker has counted, for want of more a document may be handed back.
_BYTES_PER_TOKEN = 4

# Tokens that a chat template adds, some 10 to 40.
_TEMPLATE_TOKENS = 24


def task_id(request: IngestRequest) -> str:
    """The task of a request: documents with the same one are run alike, so that their outputs are about as long.

    16 hexadecimal characters: a digest of model, system prompt, instruction, chat and sampling, seed left out.
    """
    return _digest(request.model, request.system, request.instruction, request.chat, request.sampling)


# Documents come by the thousand, their tasks don't; a remembered one takes a quarter of the time.
@lru_cache(maxsize=64)
def _digest(model: str, system: str | None, instruction: str | None, chat: bool, sampling: Sampling) -> str:
    alike = (model, system, instruction, chat, sampling.model_dump(exclude={"seed"}, exclude_none=True))
    return sha256(orjson.dumps(alike, option=orjson.OPT_SORT_KEYS)).hexdigest()[:_TASK_ID_LENGTH]


def estimated_tokens(request: IngestRequest) -> int:
    """About how many tokens the prompt will have, at least 1. The worker counts; this only helps to choose."""
    num_bytes = sum(_utf8_bytes(part) for part in (request.system, request.instruction, request.text) if part)
    return -(-num_bytes // _BYTES_PER_TOKEN) + (_TEMPLATE_TOKENS if request.chat else 0) or 1


def _utf8_bytes(text: str) -> int:
    # Python knows whether a text is ASCII; encoding 64 KB only to count it would cost more than the rest.
    return len(text) if text.isascii() else len(text.encode())
