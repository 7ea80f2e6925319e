"""Jobs per second, CPU, latency and memory of the queue, against stock RQ in the same run.

The engine does nothing: it is the simulated one, in no time, one output token. Everything else is the full path through
a real server: requests validated at both ends, limits checked, leases renewed, results written, results' rows in RQ's
own format. What is compared alternates, REPEATS times (default 3) or more, and the median of the pairs' ratios counts.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from noop import noop
from passages import passages
from redis import Redis
from report import conclude, print_table
from rq import Queue, SimpleWorker

from ingestq.common import keys, scripts
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.limits import AdmissionLimits, write_limits
from ingestq.common.settings import Settings
from ingestq.producer import IngestQueue, IngestRequest, Sampling
from ingestq.workers import BatchWorker

REPEATS = int(os.environ.get("REPEATS", "3"))
ROOT = Path(__file__).resolve().parents[2]
MODEL, QUEUE = "no-op", "ingest"
KB = 1024
# One for all documents, as `read_documents` does it.
SAMPLING = Sampling(max_tokens=1)

# Jobs of each run: enough for the slowest to take a second and a half here.
NUM_STOCK_JOBS = 300
NUM_JOBS = {1: 700, 16: 3_000, 128: 5_000, 1024: 8_000}
NUM_ENQUEUED = {KB: 3_000, 64 * KB: 200}
NUM_STORED = 10_000
QUEUED = (10_000, 100_000)
NUM_TAKEN = 5_000
NUM_IDLE_WORKERS, NUM_WAKES = 16, 200

AT_LEAST = {"speedup_128": 15, "enqueue_speedup_1k": 4, "enqueue_speedup_64k": 6}
AT_MOST = {"idle_p50_ms": 10, "growth_100k": 1.15, "bytes_queued": 1500, "bytes_finished": 2500}


def settings(max_in_flight: int) -> Settings:
    """A worker whose engine takes whatever it is given in one step, and whose leases are renewed every second."""
    return Settings.from_env(
        {
            "INGEST_ENGINE": "simulated",
            "INGEST_MODEL": MODEL,
            "INGEST_MAX_IN_FLIGHT": str(max_in_flight),
            "INGEST_LEASE_TTL": "4",
            "INGEST_ENGINE_TIME_SCALE": "0",
            "INGEST_ENGINE_MAX_NUM_SEQS": "1024",
            "INGEST_ENGINE_MAX_NUM_BATCHED_TOKENS": "1000000",
        }
    )


class Bench:
    """A server with clients, emptied before each run."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.url = server.url
        self.redis = Redis.from_url(server.url)

    def clear(self) -> None:
        self.redis.execute_command("FLUSHALL SYNC")  # the default leaves the freeing to a thread, on the next run
        # In force, but never in the way: what counts is that they are looked up.
        write_limits(self.redis, QUEUE, AdmissionLimits(max_in_flight=4096, max_in_flight_fleet=100_000))

    def enqueue(self, texts: Sequence[str]) -> None:
        """Fills our queue, requests built and validated on the way."""
        with Redis.from_url(self.url) as client:
            queue = IngestQueue(QUEUE, connection=client, settings=settings(1))
            group = queue.enqueue_many(request(i, text) for i, text in enumerate(texts))
        assert group.num_enqueued == len(texts)

    def enqueue_stock(self, payloads: Sequence[dict[str, Any]]) -> None:
        """Fills RQ's queue, all of its defaults."""
        with Redis.from_url(self.url) as client:
            Queue("stock", connection=client).enqueue_many([Queue.prepare_data(noop, (data,)) for data in payloads])

    def work(self, max_in_flight: int, max_jobs: int | None = None) -> None:
        with Redis.from_url(self.url) as client:
            worker = BatchWorker([QUEUE], connection=client, settings=settings(max_in_flight))
            worker.work(burst=True, logging_level="WARNING", max_jobs=max_jobs)

    def work_stock(self) -> None:
        with Redis.from_url(self.url) as client:
            SimpleWorker(["stock"], connection=client).work(burst=True, logging_level="WARNING")

    def job_keys(self) -> list[bytes]:
        return list(self.redis.scan_iter(keys.job("*"), count=1000))

    def used_memory(self) -> int:
        return int(self.redis.info("memory")["used_memory"])

    def redis_cpu(self) -> float:
        cpu = self.redis.info("cpu")
        return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])

    def jobs_per_second(self, num_jobs: int) -> float:
        """By the jobs' own records of when the first began and the last ended: start and end of workers don't count."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for key in self.job_keys():
                pipeline.hmget(key, "status", "started_at", "ended_at")
            records = [record for record in pipeline.execute() if record[0] == b"finished"]
        assert len(records) == num_jobs, f"{len(records)} of {num_jobs} jobs finished"
        started = min(_timestamp(record[1]) for record in records)
        return num_jobs / (max(_timestamp(record[2]) for record in records) - started)


def _timestamp(iso: bytes) -> float:
    return datetime.fromisoformat(iso.decode()).timestamp()


def request(i: int, text: str) -> IngestRequest:
    return IngestRequest(document_id=f"manual/{i}", text=text, model=MODEL, sampling=SAMPLING)


def payload(i: int, text: str) -> dict[str, Any]:
    """The same as an argument of RQ's."""
    return request(i, text).model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of CPU."""

    python: float
    redis: float

    @property
    def total(self) -> float:
        return self.python + self.redis


def cost_of(bench: Bench, run: Callable[[], None]) -> Cost:
    redis, python = bench.redis_cpu(), time.process_time()
    run()
    return Cost(python=time.process_time() - python, redis=bench.redis_cpu() - redis)


# --- throughput


def measure_throughput(bench: Bench) -> dict[str, float]:
    """Jobs per second and CPU per job, of SimpleWorker and of BatchWorker with 1 to 1,024 in flight."""
    texts = list(islice(passages(KB), max(NUM_JOBS.values())))
    stock = [payload(i, text) for i, text in enumerate(texts[:NUM_STOCK_JOBS])]
    rates: dict[int, list[float]] = {n: [] for n in (0, *NUM_JOBS)}  # 0: SimpleWorker
    costs: dict[int, list[Cost]] = {n: [] for n in rates}
    for _ in range(REPEATS):
        for n in rates:
            num_jobs = NUM_JOBS.get(n, len(stock))
            bench.clear()
            if n == 0:
                bench.enqueue_stock(stock)
                cost = cost_of(bench, bench.work_stock)
            else:
                bench.enqueue(texts[:num_jobs])
                cost = cost_of(bench, lambda n=n: bench.work(n))
            costs[n].append(Cost(python=cost.python / num_jobs * 1e6, redis=cost.redis / num_jobs * 1e6))
            rates[n].append(bench.jobs_per_second(num_jobs))
    speedup = {n: median(ours / theirs for ours, theirs in zip(rates[n], rates[0], strict=True)) for n in rates}
    python = {n: median(cost.python for cost in costs[n]) for n in rates}
    redis = {n: median(cost.redis for cost in costs[n]) for n in rates}
    print_table(
        "1 KB documents, no-op engine (simulated)",
        ["worker", "jobs/s", "speedup", "Python us/job", "Redis us/job"],
        (
            [f"BatchWorker, {n} in flight" if n else "SimpleWorker", median(rates[n]), speedup[n], python[n], redis[n]]
            for n in rates
        ),
    )
    return {
        **{f"speedup_{n}": speedup[n] for n in NUM_JOBS},
        "jobs_per_s_stock": median(rates[0]),
        **{f"jobs_per_s_{n}": median(rates[n]) for n in NUM_JOBS},
        "cpu_us_per_job_stock": python[0] + redis[0],
        **{f"cpu_us_per_job_{n}": python[n] + redis[n] for n in NUM_JOBS},
    }


# --- enqueue


def measure_enqueue(bench: Bench) -> dict[str, float]:
    """Documents per second into the queue. Ours are built and validated on the clock; RQ's arguments are ready."""
    figures = {}
    rows = []
    for num_bytes, number in NUM_ENQUEUED.items():
        texts = list(islice(passages(num_bytes), number))
        stock = [payload(i, text) for i, text in enumerate(texts)]
        ours, theirs = [], []
        for _ in range(3 * REPEATS):  # a tenth of a second each: whatever else runs shows
            theirs.append(number / _seconds(bench, lambda stock=stock: bench.enqueue_stock(stock)))
            ours.append(number / _seconds(bench, lambda texts=texts: bench.enqueue(texts)))
        name = f"{num_bytes // KB}k"
        figures[f"enqueue_speedup_{name}"] = median(a / b for a, b in zip(ours, theirs, strict=True))
        figures[f"enqueue_per_s_{name}"] = median(ours)
        rows.append([f"{num_bytes // KB} KB", median(ours), median(theirs), figures[f"enqueue_speedup_{name}"]])
    print_table("Enqueue, documents/s", ["text", "IngestQueue", "RQ's enqueue_many", "speedup"], rows)
    return figures


def _seconds(bench: Bench, run: Callable[[], None]) -> float:
    bench.clear()
    start = time.monotonic()
    run()
    return time.monotonic() - start


# --- idle workers


def measure_idle(bench: Bench) -> dict[str, float]:
    """Milliseconds from before the call of `enqueue` to the lease (Redis' clock, this machine's), workers idle."""
    bench.clear()
    texts = list(islice(passages(KB), NUM_WAKES))
    rng = random.Random(0)
    sent: dict[str, float] = {}
    queue = IngestQueue(QUEUE, connection=bench.redis, settings=settings(1))
    with idle_workers(bench):
        queue.enqueue(request(len(texts), texts[0] + "warm-up"))
        for i, text in enumerate(texts):
            time.sleep(rng.uniform(0.03, 0.06))  # far longer than one takes: all are idle again
            wanted = request(i, text)
            before = time.time()
            sent[queue.enqueue(wanted).job_id] = before
        wait_until(lambda: bench.redis.zcard(keys.finished(QUEUE)) == len(texts) + 1)
    waits = sorted((leased_at(bench.redis, job_id) - before) * 1e3 for job_id, before in sent.items())
    figures = {"idle_p50_ms": median(waits), "idle_p99_ms": quantiles(waits, n=100)[98]}
    print_table(
        f"{NUM_IDLE_WORKERS} idle workers, enqueue to lease, {len(waits)} documents (simulated engine)",
        ["p50 ms", "p99 ms"],
        [list(figures.values())],
    )
    return figures


@contextmanager
def idle_workers(bench: Bench) -> Iterator[None]:
    """Processes that have all published their engine's card; forked, which spares each its imports."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_serve, args=(bench.url,)) for _ in range(NUM_IDLE_WORKERS)]
    for worker in workers:
        worker.start()
    try:
        wait_until(lambda: bench.redis.hlen(keys.engines(QUEUE)) == NUM_IDLE_WORKERS)
        yield
    finally:
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
        for worker in workers:
            worker.join()


def _serve(url: str) -> None:
    with Redis.from_url(url) as client:
        BatchWorker([QUEUE], connection=client, settings=settings(16)).work(logging_level="WARNING")


def leased_at(redis: Redis, job_id: str) -> float:
    """Seconds since the epoch by Redis' clock, to the microsecond: an execution id begins with them."""
    [(_, fields)] = redis.xrevrange(keys.results(job_id), count=1)
    return int(fields[b"execution_id"][:14], 16) / 1e6


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not within 60 s"
        time.sleep(0.05)


# --- memory


def measure_memory(bench: Bench) -> dict[str, float]:
    """Bytes of Redis memory of a 1 KB job beyond its payload, and of a finished one beyond its row, group included."""
    bench.clear()
    empty = bench.used_memory()
    bench.enqueue(list(islice(passages(KB), NUM_STORED)))
    queued = (bench.used_memory() - empty) / NUM_STORED
    with bench.redis.pipeline(transaction=False) as pipeline:
        for key in bench.job_keys():
            pipeline.hstrlen(key, "data")
        payload_bytes = sum(pipeline.execute()) / NUM_STORED
    bench.work(128)
    finished = (bench.used_memory() - empty) / NUM_STORED
    job_ids = [key.removeprefix(keys.job_prefix().encode()).decode() for key in bench.job_keys()]
    row_bytes = sum(len(job.return_value or b"") for job in scripts.fetch(bench.redis, job_ids)) / NUM_STORED
    figures = {"bytes_queued": queued - payload_bytes, "bytes_finished": finished - row_bytes}
    print_table(
        f"Redis memory, bytes/job of {NUM_STORED:,} (simulated engine)",
        ["state", "all", "payload or row", "beyond it"],
        [
            ["queued", queued, payload_bytes, figures["bytes_queued"]],
            ["finished", finished, row_bytes, figures["bytes_finished"]],
        ],
    )
    return figures


# --- growth


def measure_growth(small: Bench, large: Bench) -> dict[str, float]:
    """CPU of a job taken from a long queue over that of one from a short queue, each on a server of its own."""
    benches = dict(zip(QUEUED, (small, large), strict=True))
    texts = passages(KB)
    for num_queued, bench in benches.items():
        bench.clear()
        bench.enqueue(list(islice(texts, num_queued)))
    costs: dict[int, list[float]] = {num_queued: [] for num_queued in QUEUED}
    for _ in range(REPEATS + 2):  # a second each
        for num_queued, bench in benches.items():
            cost = cost_of(bench, lambda bench=bench: bench.work(128, max_jobs=NUM_TAKEN))
            costs[num_queued].append(cost.total / NUM_TAKEN * 1e6)
            bench.enqueue(list(islice(texts, NUM_TAKEN)))
            assert bench.redis.llen(keys.queue(QUEUE)) == num_queued
    few, many = (costs[num_queued] for num_queued in QUEUED)
    growth = median(b / a for a, b in zip(few, many, strict=True))
    print_table(
        "Growth, 128 in flight (simulated engine)",
        ["queued", "CPU us/job"],
        [[num_queued, median(costs[num_queued])] for num_queued in QUEUED],
    )
    return {"growth_100k": growth}


# --- the import


def measure_import() -> dict[str, float]:
    """CPU seconds of the producer's import, in an environment with nothing but ingestq's own dependencies.

    Nothing is measured, and that is said, where such an environment can't be made.
    """
    code = (
        "import time; start = time.process_time(); from ingestq.producer import IngestQueue, iter_results; "
        "print(time.process_time() - start)"
    )
    with tempfile.TemporaryDirectory(prefix="ingestq-import-") as folder:
        try:
            python = core_environment(Path(folder, "venv"))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"\nimport_cpu_s left out: {error}", file=sys.stderr)
            return {}
        packages = Path(folder, "packages", "ingestq")
        packages.mkdir(parents=True)
        for name in ("common", "producer"):
            shutil.copytree(ROOT / name, packages / name)
        seconds = [
            float(subprocess.check_output([python, "-c", code], cwd=folder, env={"PYTHONPATH": str(packages.parent)}))
            for _ in range(1 + REPEATS)  # the first compiles
        ]
    figures = {"import_cpu_s": median(seconds[1:])}
    print_table("Import of the producer, core dependencies alone", ["CPU s"], [list(figures.values())])
    return figures


def core_environment(folder: Path) -> Path:
    """The Python of a new virtual environment in `folder`, with the dependencies that no extra adds to.

    Raises:
        OSError, CalledProcessError: there is no uv, or it can't get them.
    """
    uv = str(Path(sys.executable).with_name("uv"))
    python = folder / "bin" / "python"
    wanted = ["--constraint", "deploy/constraints.txt", "--requirements", "pyproject.toml"]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], cwd=ROOT, check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *wanted], cwd=ROOT, check=True)
    return python


def main() -> int:
    with EmbeddedServer() as server, EmbeddedServer() as second:
        bench = Bench(server)
        figures = {
            **measure_idle(bench),  # first: the smallest process to fork
            **measure_enqueue(bench),
            **measure_throughput(bench),
            **measure_memory(bench),
            **measure_growth(bench, Bench(second)),
            **measure_import(),
        }
    return conclude({"engine": "simulated", "repeats": REPEATS, **figures}, at_least=AT_LEAST, at_most=AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
