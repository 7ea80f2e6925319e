"""`run_sections`: the acceptance run from the first engine to the last, section by section."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from redis import Redis

from ...common.engine_card import EngineCard
from .bench import AcceptanceError, Bench
from .documents import Document, gather, numbered
from .probe import Answer, ask
from .report import Section, Verdict
from .section_kv_cache import NUM_COMPARED, comparison, kv_cache_section, skipped
from .section_machine import machine_section
from .section_plan import plan_section
from .section_ramp import ramp_section, run_ramp
from .section_recovery import kill_in_flight, recovery_section
from .section_restart import Start, cache_folder, num_entries, restart_section
from .worker import Worker

Say = Callable[[str], None]


class Run:
    """One acceptance run: what its sections hand on to each other.

    Args:
        say: told what happens next; some steps take half an hour.
    """

    def __init__(self, bench: Bench, redis: Redis, say: Say) -> None:
        self._bench = bench
        self._redis = redis
        self._say = say
        self._starts: list[Start] = []

    def sections(self, paths: Sequence[str]) -> Iterator[Section]:
        """Each section as soon as it is done. One that fails doesn't keep the others from being tried.

        Raises:
            AcceptanceError: there are no documents, or the configured engine doesn't start: there is nothing to try.
        """
        documents = gather(self._bench, paths)
        self._say("the configured engine, for a start that may compile: up to half an hour on a TPU")
        configured = self._probe(documents)
        documents = [
            document
            for document, num_tokens in zip(documents, configured.prompt_tokens, strict=True)
            if num_tokens is not None
        ]
        if not documents:
            raise AcceptanceError(f"the engine takes none of the documents; the first: {configured.refusals[0]}")
        yield self._with_refusals(machine_section(configured, self._redis), configured)
        yield _tried("plan", "Plan against engine", lambda: plan_section(configured))
        yield _tried("kv_cache", "fp8 against bf16 KV cache", lambda: self._kv_cache(documents, configured))
        yield from self._workers(documents, configured)

    def _probe(self, documents: Sequence[Document]) -> Answer:
        folder = cache_folder(self._bench.environment(), "tpu")  # whose there are no entries on other devices
        before = num_entries(folder)
        answer = ask(self._bench, "configured", _as_in_the_ramp(documents), NUM_COMPARED)
        self._folder = cache_folder(self._bench.environment(), answer.card["device"])
        self._bench = replace(self._bench, model=answer.card["model"])
        self._note_start("engine alone", answer.start_seconds, before if self._folder else None)
        return answer

    def _with_refusals(self, section: Section, configured: Answer) -> Section:
        if not configured.refusals:
            return section
        told = f"{len(configured.refusals)} documents are left out, the first: {configured.refusals[0]}"
        return replace(section, notes=[*section.notes, told])

    def _kv_cache(self, documents: Sequence[Document], configured: Answer) -> Section:
        if configured.scored is None:
            return skipped(f"the {configured.card['device']} engine has no log-probabilities to compare.")
        asked = str(configured.kv_cache["asked"])
        compared = comparison(asked, configured.card["device"])
        if compared is None:
            return skipped(f"kv_cache_dtype is {asked!r} in the configuration: there is no fp8 KV cache to compare.")
        self._say(f"the same engine with {compared.labels[0]}, for comparison")
        chosen = _as_in_the_ramp(documents[:NUM_COMPARED])
        reference = ask(self._bench, "reference", chosen, NUM_COMPARED, **compared.reference)
        return kv_cache_section(compared, reference, configured)

    def _workers(self, documents: Sequence[Document], configured: Answer) -> Iterator[Section]:
        with Worker(self._bench, "first") as worker:
            card = self._start(worker, "`rq worker`")
            levels = ", ".join(map(str, self._bench.levels))
            self._say(f"the ramp: {levels} documents in flight")
            yield _tried(
                "ramp", "Ramp", lambda: ramp_section(run_ramp(self._bench, worker, self._redis, documents), card)
            )
            self._say("kill -9 of the worker while it holds documents")
            kill = kill_in_flight(self._bench, worker, self._redis, documents)
        with Worker(self._bench, "second") as worker:
            self._start(worker, "`rq worker` after the kill")
            yield restart_section(self._starts, self._folder)
            yield _tried("recovery", "Kill and recovery", lambda: recovery_section(self._bench, self._redis, kill))

    def _start(self, worker: Worker, label: str) -> EngineCard:
        self._say(f"{label}, until it is ready")
        before = num_entries(self._folder)
        card = worker.wait_until_ready(self._redis)
        self._note_start(label, worker.start_seconds, before)
        return card

    def _note_start(self, label: str, seconds: float, before: int | None) -> None:
        after = num_entries(self._folder)
        self._starts.append(Start(label=label, seconds=seconds, entries_before=before, entries_after=after))


def _as_in_the_ramp(documents: Sequence[Document]) -> list[Document]:
    """With a first line like those of the ramp: what fits here fits there, too."""
    texts = [numbered(document, "ramp-1024/2047").text for document in documents]
    return [
        Document(document_id=document.document_id, text=text) for document, text in zip(documents, texts, strict=True)
    ]


def _tried(name: str, title: str, section: Callable[[], Section]) -> Section:
    """The section, or one that says why there is none."""
    start = time.monotonic()
    try:
        return section()
    except AcceptanceError as error:
        return Section(
            name=name,
            title=title,
            verdict=Verdict.FAIL,
            reason=str(error),
            figures={"failed after, s": time.monotonic() - start},
        )
