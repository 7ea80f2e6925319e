"""The documents of an acceptance run: the owner's, as `ingestq enqueue` reads them, or made-up ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import orjson
from redis import Redis

from ...common import keys, payload
from .bench import AcceptanceError, Bench

# Read from the owner's folder at most: each is looked at by the engine before the ramp.
MAX_DOCUMENTS = 1024

# Made-up documents; the ramp gives each of them many ids.
_NUM_MADE_UP = 64

# Tokens of an English word in the vocabularies of today's models, roughly: lengths of made-up documents need be no
# better.
_TOKENS_PER_WORD = 1.3

_WORDS = """
the report of a survey on water levels along river says that in most years rain fell between March and June while
farmers near delta wait for harvest however new records show less snow higher up so reservoirs empty before summer
officials expect costs to rise by seven percent if pumps run at night engineers built two canals which carry about
half this volume table five lists every station with its depth flow date owner and number of days without data
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text with its name."""

    document_id: str
    text: str


def gather(bench: Bench, paths: Sequence[str]) -> list[Document]:
    """The documents under `paths` (files, folders), or made-up ones if there are no paths.

    Raises:
        AcceptanceError: there is none that `ingestq enqueue` takes.
    """
    return _from_paths(bench, paths) if paths else _made_up(bench.prompt_tokens)


def _made_up(num_tokens: int) -> list[Document]:
    """Texts of about `num_tokens` tokens; always the same ones."""
    rng, words = random.Random(0), _WORDS.split()
    num_words = max(1, round(num_tokens / _TOKENS_PER_WORD))
    texts = [" ".join(rng.choices(words, k=num_words)) for _ in range(_NUM_MADE_UP)]
    return [Document(document_id=f"made-up/{i}", text=text) for i, text in enumerate(texts)]


def _from_paths(bench: Bench, paths: Sequence[str]) -> list[Document]:
    """As the queue holds them once `ingestq enqueue` has read them; nothing stays behind in it."""
    aside = f"{bench.queue}.documents"
    found = [str(Path(path).resolve()) for path in paths]
    command = ("ingestq", "enqueue", *found, "--queue", aside, "--model", bench.model)
    # 1: some were refused; it has said so, and the others are there.
    group_id = bench.run(*command, timeout=bench.timeout, allowed=(0, 1)).strip()
    with closing(Redis.from_url(bench.url)) as redis:
        documents = list(islice(_queued(redis, aside), MAX_DOCUMENTS))
    bench.run("ingestq", "cancel", group_id, "--queue", aside, timeout=bench.timeout)
    if not documents:
        raise AcceptanceError(f"no documents under {', '.join(paths)} that `ingestq enqueue` takes")
    return documents


def _queued(redis: Redis, queue: str) -> Iterator[Document]:
    for job_id in cast(list[bytes], redis.lrange(keys.queue(queue), 0, MAX_DOCUMENTS - 1)):
        data = cast(bytes, redis.hget(keys.job(job_id.decode()), "data"))
        request = payload.argument(data)
        yield Document(document_id=request["document_id"], text=request["text"])


def numbered(document: Document, label: str) -> Document:
    """The same text under another id, and as new to the prefix cache: its first line is another."""
    return Document(document_id=label, text=f"Document {label}.\n\n{document.text}")


def enqueue(bench: Bench, group_id: str, documents: Sequence[Document]) -> None:
    """Puts documents into the queue with `ingestq enqueue`."""
    path = bench.folder / f"{group_id}.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"document_id": d.document_id, "text": d.text}) + b"\n" for d in documents))
    options = ["--group", group_id, "--model", bench.model, "--max-tokens", str(bench.output_tokens)]
    options += [] if bench.chat else ["--no-chat"]
    bench.run("ingestq", "enqueue", str(path), "--queue", bench.queue, *options, timeout=bench.timeout)


def follow(bench: Bench, group_id: str) -> list[dict[str, object]]:
    """The rows of a group, once each of its documents has one (`ingestq results --follow`)."""
    options = ["--follow", "--timeout", f"{bench.timeout:g}", "--queue", bench.queue]
    # 1: some documents failed; their rows say why. 3: some have no row yet; the caller counts.
    rows = bench.run("ingestq", "results", group_id, *options, timeout=bench.timeout + 60, allowed=(0, 1, 3))
    return [orjson.loads(line) for line in rows.splitlines()]
