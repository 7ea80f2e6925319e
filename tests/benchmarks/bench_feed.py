"""The engine behind the queue against one bare `LLM.generate` call: same `vllm.LLM` object, same documents.

Modes, alternating, REPEATS times (default 3), medians:
- bare: one `LLM.generate` call over all texts;
- ours: a BatchWorker drains a queue that was filled beforehand, at most 70 documents leased, 64 running;
- waves: the same with INGEST_FEED=generate.
Then once each with 128 leased, and with 1,024 over a larger set of short documents.

At last a mixture of tasks (mixture.py), longest expected work first against the order of arrival:
`longest_first_steps` is the latter's steps over the former's, the least of all pairs, so more than 1 is a gain.
Output lengths are learned: by the documents before in the same run, and, where it says `known`, by a run of others of
these tasks on the same server before.

Everything is taken at vLLM's own `LLMEngine.step`. `step_share` is the time inside it over the time from the first
step's start to the last one's end; a worker's start and end are left out. CPU is this process's, from the first
document to the worker's end.
The model is a tiny random Gemma 4 on one thread: steps and shares carry over to other hardware, rates don't.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

from lengths import long_tailed
from mixture import arrival_order, mixture
from passages import reference
from redis import Redis
from report import conclude, print_table

from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue, IngestRequest, Sampling, iter_results
from ingestq.workers import BatchWorker
from ingestq.workers.engines.base import Completion, Prompt
from ingestq.workers.engines.vllm_engine import VllmEngine
from ingestq.workers.prompts import encode
from support.models import tiny_gemma4

REPEATS = int(os.environ.get("REPEATS", "3"))
MODEL, QUEUE = "tiny-gemma4", "ingest"
MAX_IN_FLIGHT = 70

# Of the mixture: documents, leased at most, whether the lengths of its tasks are known beforehand.
ORDERS = [(300, 128, False), (300, 1024, False), (300, 1024, True), (3_000, 128, False), (3_000, 1024, False)]
# Documents by which they are learned then.
NUM_LEARNED = 300

AT_LEAST = {"saturation_steps": 0.99, "step_share": 0.985, "identical": True}
AT_MOST = {"in_flight_max": MAX_IN_FLIGHT}

ENVIRONMENT = {
    "INGEST_MODEL_NAME": MODEL,
    "INGEST_MAX_IN_FLIGHT": str(MAX_IN_FLIGHT),
    "INGEST_ENGINE_DTYPE": "float32",
    "INGEST_ENGINE_ENFORCE_EAGER": "true",
    "INGEST_ENGINE_MAX_MODEL_LEN": "1024",
    "INGEST_ENGINE_MAX_NUM_SEQS": "64",
    "INGEST_ENGINE_ENABLE_PREFIX_CACHING": "false",  # else the later modes would be spared the prompts
}

# --- documents


def documents(
    tokenizer: Any, number: int, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int]
) -> list[IngestRequest]:
    """Real text of long-tailed lengths, each within its bounds; always the same."""
    rng = random.Random(0)
    token_ids = tokenizer.encode(reference())
    requests = []
    for i in range(number):
        length, start = long_tailed(rng, *prompt_tokens), rng.randrange(len(token_ids) - prompt_tokens[1])
        sampling = Sampling(max_tokens=long_tailed(rng, *output_tokens), ignore_eos=True)
        text = tokenizer.decode(token_ids[start : start + length])
        requests.append(IngestRequest(document_id=f"manual/{i}", text=text, model=MODEL, chat=False, sampling=sampling))
    return requests


# --- what is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One mode, once."""

    # Start and end of each step, seconds.
    steps: Sequence[tuple[float, float]]
    # Seconds of this process; a worker's from when it is ready.
    cpu: float
    # Prompt's token ids -> output's token ids.
    outputs: dict[tuple[int, ...], tuple[int, ...]]
    # Document id -> text of its row; of the bare call, of its output.
    texts: dict[str, str]
    # Leases held at any step, at most.
    in_flight_max: int = 0

    @property
    def step_share(self) -> float:
        return sum(end - start for start, end in self.steps) / (self.steps[-1][1] - self.steps[0][0])

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between steps."""
        return [(after[0] - before[1]) * 1e3 for before, after in zip(self.steps, self.steps[1:], strict=False)]


class SharedEngine:
    """The one engine of all runs: what the worker does to it passes through, and its end doesn't end it."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.llm = engine._llm
        self._step = self.llm.llm_engine.step
        self.llm.llm_engine.step = self._timed_step
        # Prompt's token ids -> output tokens, of documents that are to end before their max_tokens.
        self.hidden_lengths: dict[tuple[int, ...], int] = {}
        self.begin()

    def begin(self, at_step: Callable[[], int] = int) -> None:
        """Forgets the last run. `at_step` is asked at each step for the leases held."""
        self._at_step = at_step
        self.cpu_begun = time.process_time()
        self.steps: list[tuple[float, float]] = []
        self.in_flight_max = 0
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[tuple[int, ...], tuple[int, ...]] = {}

    def _timed_step(self) -> Any:
        start = time.perf_counter()
        outputs = self._step()
        self.steps.append((start, time.perf_counter()))
        self.in_flight_max = max(self.in_flight_max, self._at_step())
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add_request(self, prompt: Prompt) -> None:
        token_ids = tuple(prompt.token_ids)
        self.prompts[prompt.prompt_id] = token_ids
        if length := self.hidden_lengths.get(token_ids):
            prompt = replace(prompt, sampling=prompt.sampling.model_copy(update={"max_tokens": length}))
        self._engine.add_request(prompt)

    def step(self) -> list[Completion]:
        return self._noted(self._engine.step())

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        self.prompts |= {prompt.prompt_id: tuple(prompt.token_ids) for prompt in prompts}
        return self._noted(self._engine.generate(prompts))

    def _noted(self, completions: list[Completion]) -> list[Completion]:
        self.outputs |= {self.prompts[done.prompt_id]: tuple(done.token_ids) for done in completions}
        return completions

    def close(self) -> None:
        pass


class SharedEngineWorker(BatchWorker):
    """A worker as it is, except that its engine is there already."""

    engine: SharedEngine

    def load_engine(self) -> SharedEngine:
        return self.engine

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        super().bootstrap(*args, **kwargs)
        self.engine.begin(lambda: self._courier.in_flight)  # the warm-up's steps are no document's


def run_bare(engine: SharedEngine, requests: Sequence[IngestRequest]) -> Run:
    from vllm import SamplingParams

    engine.begin()
    params = [SamplingParams(**request.sampling.model_dump(exclude_none=True)) for request in requests]
    done = engine.llm.generate([request.text for request in requests], params, use_tqdm=False)
    cpu = time.process_time() - engine.cpu_begun
    return Run(
        steps=list(engine.steps),
        cpu=cpu,
        outputs={tuple(output.prompt_token_ids): tuple(output.outputs[0].token_ids) for output in done},
        texts={request.document_id: output.outputs[0].text for request, output in zip(requests, done, strict=True)},
    )


def run_queue(engine: SharedEngine, requests: Sequence[IngestRequest], settings: Settings) -> Run:
    with EmbeddedServer() as server:
        return run_on(server, engine, requests, settings)


def run_on(server: EmbeddedServer, engine: SharedEngine, requests: Sequence[IngestRequest], settings: Settings) -> Run:
    with Redis.from_url(server.url) as client:
        group = IngestQueue(QUEUE, connection=client, settings=settings).enqueue_many(requests)
        assert group.num_enqueued == len(requests)
        worker = SharedEngineWorker([QUEUE], connection=client, settings=settings)
        worker.engine = engine
        worker.work(burst=True, logging_level="WARNING")
        cpu = time.process_time() - engine.cpu_begun
        return Run(
            steps=list(engine.steps),
            cpu=cpu,
            outputs=dict(engine.outputs),  # the next warm-up writes there, too
            texts={row.document_id: row.text or "" for row in iter_results(group, timeout=60)},
            in_flight_max=engine.in_flight_max,
        )


# --- the comparison


def compare(engine: SharedEngine, requests: Sequence[IngestRequest], settings: Settings) -> dict[str, Any]:
    """All modes over the long-tailed documents."""
    waves = settings.model_copy(update={"feed": "generate"})
    runs: dict[str, list[Run]] = {"bare": [], "ours": [], "waves": []}
    for _ in range(REPEATS):
        runs["bare"].append(run_bare(engine, requests))
        runs["ours"].append(run_queue(engine, requests, settings))
        runs["waves"].append(run_queue(engine, requests, waves))
    bare, ours = runs["bare"], runs["ours"]
    wider = run_queue(engine, requests, settings.model_copy(update={"max_in_flight": 128}))
    print_runs(f"{len(requests)} long-tailed documents, tiny Gemma 4, vLLM", {**runs, "ours, 128": [wider]})
    return {
        "saturation_steps": ratio(bare, ours, num_steps),
        "step_share": median(run.step_share for run in ours),
        "step_gap_p99_ms": median(p99(run.gaps) for run in ours),
        "saturation_cpu": ratio(bare, ours, lambda run: run.cpu),
        "waves_steps": ratio(bare, runs["waves"], num_steps),
        "waves_cpu": ratio(bare, runs["waves"], lambda run: run.cpu),
        "identical": identical([*bare, *ours, *runs["waves"], wider], len(requests)),
        "in_flight_max": max(run.in_flight_max for run in ours),
        "bare_step_share": median(run.step_share for run in bare),
        "saturation_steps_128": ratio(bare[-1:], [wider], num_steps),
        "step_share_128": wider.step_share,
        "in_flight_max_128": wider.in_flight_max,
    }


def compare_1024(engine: SharedEngine, requests: Sequence[IngestRequest], settings: Settings) -> dict[str, Any]:
    """Many short documents, of which the engine runs 64 and holds the others of the 1,024 back itself."""
    bare = run_bare(engine, requests)
    ours = run_queue(engine, requests, settings.model_copy(update={"max_in_flight": 1024}))
    print_runs(f"{len(requests)} short documents", {"bare": [bare], "ours, 1,024": [ours]})
    return {
        "saturation_steps_1024": ratio([bare], [ours], num_steps),
        "step_share_1024": ours.step_share,
        "in_flight_max_1024": ours.in_flight_max,
        "identical_1024": identical([bare, ours], len(requests)),
    }


def compare_orders(engine: SharedEngine, settings: Settings) -> dict[str, Any]:
    """A mixture of tasks, longest expected work first and in the order of arrival."""
    figures: dict[str, Any] = {}
    table: dict[str, list[Run]] = {}
    same = True
    for number, max_in_flight, known in ORDERS:
        wider = settings.model_copy(update={"max_in_flight": max_in_flight})
        runs = [run_mixture(engine, number, wider, in_arrival_order=first, known=known) for first in (True, False)]
        name = f"{number}_{max_in_flight}" + ("_known" if known else "")
        figures[f"longest_first_steps_{name}"] = ratio(runs[:1], runs[1:], num_steps)
        same &= identical(runs, number)
        of = f"{number:,} documents, {max_in_flight:,} in flight" + (", lengths known" if known else "")
        table |= {f"{of}: arrival": runs[:1], f"{of}: longest first": runs[1:]}
    print_runs("A mixture of tasks", table)
    # The least that it gains: where that is below 1, it costs.
    return {"longest_first_steps": min(figures.values()), **figures, "identical_orders": same}


def run_mixture(engine: SharedEngine, number: int, settings: Settings, *, in_arrival_order: bool, known: bool) -> Run:
    tokenizer = engine.llm.get_tokenizer()
    with EmbeddedServer() as server, arrival_order() if in_arrival_order else nullcontext():
        for seed in (1, 0) if known else (0,):
            size = min(number, NUM_LEARNED) if seed else number
            documents = mixture(tokenizer, size, model=MODEL, prompt_tokens=(20, 80), seed=seed)
            engine.hidden_lengths = {
                tuple(encode(request, engine)): length
                for request, length in zip(documents.requests, documents.num_output_tokens, strict=True)
            }
            run = run_on(server, engine, documents.requests, settings)
    engine.hidden_lengths = {}
    return run


def num_steps(run: Run) -> float:
    return len(run.steps)


def ratio(bare: Sequence[Run], others: Sequence[Run], figure: Callable[[Run], float]) -> float:
    """Bare over other, the median over the repeats: 1 is as good as bare, less is worse."""
    return median(figure(a) / figure(b) for a, b in zip(bare, others, strict=True))


def identical(runs: Sequence[Run], num_documents: int) -> bool:
    """Whether every document has the same output tokens in all modes, and its row their text."""
    first = runs[0]
    same = all(run.outputs == first.outputs and run.texts == first.texts for run in runs)
    return same and len(first.texts) == num_documents


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98]


def print_runs(title: str, runs: dict[str, list[Run]]) -> None:
    print_table(
        title,
        ["mode", "steps", "step share", "gap p99 ms", "CPU s", "wall s", "in flight"],
        [
            [
                mode,
                int(median(map(num_steps, part))),
                f"{median(run.step_share for run in part):.4f}",
                median(p99(run.gaps) for run in part),
                median(run.cpu for run in part),
                median(run.steps[-1][1] - run.steps[0][0] for run in part),
                max(run.in_flight_max for run in part) or "-",
            ]
            for mode, part in runs.items()
        ],
    )


def main() -> int:
    settings = Settings.from_env({**ENVIRONMENT, "INGEST_MODEL": str(tiny_gemma4())})
    engine = SharedEngine(VllmEngine.from_settings(settings))
    tokenizer = engine.llm.get_tokenizer()
    long = documents(tokenizer, 300, prompt_tokens=(50, 600), output_tokens=(8, 256))
    short = documents(tokenizer, 1_600, prompt_tokens=(20, 80), output_tokens=(4, 24))
    run_bare(engine, long[:64])  # warm-up
    figures = {"engine": "vllm", "repeats": REPEATS, **compare(engine, long, settings)}
    figures |= compare_1024(engine, short, settings)
    figures |= compare_orders(engine, settings)
    figures["identical"] &= figures.pop("identical_1024")
    return conclude(figures, at_least=AT_LEAST, at_most=AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
