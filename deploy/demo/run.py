"""The main job on real parts, as `make demo` runs it: documents, a Redis-protocol server, the stock `rq worker`, vLLM.

Each step is a command that you can type yourself. The last line of stdout is a JSON object of what was measured.
The documents are pages of PostgreSQL's manual (licence: documents.LICENSE).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import orjson
from models import smollm2
from redis import Redis

from ingestq.common.embedded_server import EmbeddedServer
from ingestq.producer.progress import printable

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = "deploy/demo/documents"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTRUCTION = "Summarize the following document in one or two sentences."

# For vLLM on a small CPU machine.
ENGINE = {"INGEST_ENGINE_CONFIG": "deploy/engines/cpu.yaml", "OMP_NUM_THREADS": "1"}
# Nothing of this run leaves the machine.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

# Seconds for vLLM to load and run everything; it takes about one minute on two cores.
TIMEOUT = 900


def main() -> int:
    start = time.monotonic()
    model = smollm2()
    with EmbeddedServer() as server, tempfile.TemporaryDirectory(prefix="ingestq-demo-") as logs:
        settings = {"RQ_REDIS_URL": server.url, "INGEST_MODEL": str(model), "INGEST_MODEL_NAME": MODEL, **ENGINE}
        environment = {**_clean_environment(), **QUIET, **settings}
        print(f"A server runs at {server.url}.\n", flush=True)
        for name, value in settings.items():
            print(f"export {name}={shlex.quote(value)}")

        group = _output(
            ["ingestq", "enqueue", DOCUMENTS, "--instruction", INSTRUCTION, "--max-tokens", "48"], environment
        )
        worker_log = Path(logs, "worker.log")
        worker = _start_worker(environment, worker_log)
        try:
            rows, engine = _follow(group, environment, worker)
        finally:
            _end(worker)
        members = orjson.loads(_output(["ingestq", "status", group, "--json"], environment))["documents"]
        summary = _summary(rows, members, engine, server.url, time.monotonic() - start)
        all_well = summary["succeeded"] == summary["documents"] == summary["rows"] > 0
        if not all_well:
            print(f"\nThe worker's log ends so:\n{worker_log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        print(f"\n{orjson.dumps(summary).decode()}", flush=True)
        return 0 if all_well else 1


def _clean_environment() -> dict[str, str]:
    """This process's, with the virtual environment's commands in front and no settings of the user's own jobs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("INGEST_", "RQ_"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"}


def _show(command: list[str], note: str = "") -> None:
    print(f"\n$ {shlex.join(command)}{note}", flush=True)


def _output(command: list[str], environment: dict[str, str]) -> str:
    """Runs a command to its end and returns its stdout; its stderr is shown.

    Raises:
        CalledProcessError: it failed.
    """
    _show(command)
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return done.stdout.strip()


def _start_worker(environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = ["rq", "worker", "--burst", "-w", "ingestq.workers.BatchWorker", "ingest"]
    _show(command, " &")
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)


def _follow(
    group: str, environment: dict[str, str], worker: subprocess.Popen[bytes]
) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a group, shown as they come, and the engine that the worker says it has."""
    command = ["ingestq", "results", group, "--follow", "--timeout", str(TIMEOUT)]
    _show(command)
    rows: list[dict[str, Any]] = []
    engine = None
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe) as results:
        assert results.stdout and results.stderr  # noqa: PT018  they are pipes
        threading.Thread(target=_stop_if_worker_fails, args=(worker, results), daemon=True).start()
        threading.Thread(target=_show_lines, args=(results.stderr,), daemon=True).start()
        for line in results.stdout:
            engine = engine or _engine(environment)
            rows.append(orjson.loads(line))
            _show_row(rows[-1])
    return rows, engine


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Waits for a worker that ends by itself (--burst), not for ever."""
    try:
        worker.wait(timeout=30)
    except subprocess.TimeoutExpired:
        worker.kill()  # its rows, or their absence, are seen already
        worker.wait()


def _stop_if_worker_fails(worker: subprocess.Popen[bytes], results: subprocess.Popen[bytes]) -> None:
    if worker.wait() != 0:
        results.terminate()


def _show_lines(output: IO[bytes]) -> None:
    """Passes progress on line by line: a bar of the command's own would fall between the rows."""
    for line in output:
        print(line.decode(errors="replace"), end="", file=sys.stderr, flush=True)


def _engine(environment: dict[str, str]) -> str | None:
    """The engine by the worker's card, such as "vllm"; None if no worker has published one."""
    command = ["ingestq", "status", "--json"]
    status = orjson.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    return next((worker["engine"].split()[0] for worker in status["workers"]), None)


def _show_row(row: dict[str, Any]) -> None:
    tokens = f"{row['usage']['prompt_tokens']} + {row['usage']['output_tokens']} tokens"
    times = [f"{row.get(name, 0) / 1000:.1f} s" for name in ("queue_ms", "ttft_ms", "run_ms")]
    print(f"{printable(row['document_id'])}: {row['status']}, {tokens}, ", end="")
    print(f"queued {times[0]}, first token {times[1]}, run {times[2]}")
    text = " ".join((row.get("text") or row.get("error_message") or "").split())
    print(f"    {printable(text[:100])}{'...' if len(text) > 100 else ''}", flush=True)


def _summary(rows: list[dict[str, Any]], members: int, engine: str | None, url: str, seconds: float) -> dict[str, Any]:
    succeeded = sum(row["status"] == "succeeded" for row in rows)
    return {
        "documents": members,
        "succeeded": succeeded,
        "failed": len(rows) - succeeded,
        "rows": len(rows),
        "engine": engine,
        "model": ", ".join(sorted({row["model"] for row in rows if row.get("model")})),
        "server": _server_version(url),
        "seconds": round(seconds, 1),
    }


def _server_version(url: str) -> str:
    with Redis.from_url(url, decode_responses=True) as client:
        info = client.info("server")
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info['redis_version'])}"


if __name__ == "__main__":
    sys.exit(main())
