"""A worker that writes down what its engine has, step by step: `rq worker -w support.drain_worker.DrainWorker`.

It is `BatchWorker` over real vLLM in this process. Each line of its log is an event as JSON, in the order in which they
happened:

| event | when | fields |
|---|---|---|
| begin | the engine is warm, nothing is leased yet | num_preemptions so far, num_usable_blocks |
| lease | the worker has asked a queue | queue, gate, limits, jobs; held, in_flight: the worker's after it |
| reserve | it has reserved what was counted | queue, needs, words; held: the worker's after it |
| gate | a ready prompt was looked at | gate, waiting_tokens, prompt_tokens, predicted_ttft_ms, ttft_sla_ms |
| add | the engine gets a prompt | prompt_id, prompt_tokens, waiting_tokens before it |
| step | vLLM has made a step | num_requests, tokens, num_blocks |
| hold | the engine stands still, as ordered | num_finished, margin_ms: what a prediction adds to the prefill |
| bare | the worker is done; a plain `generate` of all its prompts begins | num_preemptions so far |
| generate | that has ended | num_preemptions of it, texts |

`held` is KV tokens as Redis counts them. What "step" tells and the `waiting_tokens` of "add" are vLLM's own, from its
scheduler; `tokens` are those of all its requests, in whole blocks, as they are reserved.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redis import Redis

from ingestq.common import keys, scripts
from ingestq.workers.batch_worker import BatchWorker
from ingestq.workers.courier import Courier
from ingestq.workers.drain import DrainController, EngineLoad, StartGate
from ingestq.workers.engines.base import Completion, Engine, Prompt
from ingestq.workers.startup.warmup import Warmed

# From the environment: the file of events, and the file with the number of finished documents at which the engine is to
# stand still, between two steps and while no prompt waits for its first token, until there is a larger one.
LOG = "DRAIN_LOG"
HOLD_AT = "DRAIN_HOLD_AT"


class DrainWorker(BatchWorker):
    def _new_courier(self, engine: Engine, warmed: Warmed) -> Courier:
        """From here on: what came before was the warm-up's."""
        courier = super()._new_courier(engine, warmed)
        log, core = _Log(Path(os.environ[LOG])), _Core(engine)
        num_usable_blocks = engine.kv_cache.num_usable_blocks
        log.write("begin", num_usable_blocks=num_usable_blocks, num_preemptions=engine.counters().num_preemptions)
        scripts.lease = _leasing(scripts.lease, log)
        scripts.reserve = _reserving(scripts.reserve, log)
        with courier.controller() as controller:
            _watch_gate(controller, log)
            _Watched(engine, core, controller, log).install()
        core.watch_steps(log)
        return courier


class _Log:
    """Whole lines, whichever thread writes them."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, event: str, **fields: Any) -> None:
        os.write(self._file, json.dumps({"event": event, **fields}).encode() + b"\n")


class _Core:
    """vLLM's engine core and its scheduler."""

    def __init__(self, engine: Engine) -> None:
        self._front: Any = engine._llm.llm_engine
        self._scheduler = self._front.engine_core.engine_core.scheduler
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._block_size = engine.kv_cache.block_size
        self._num_usable = self._pool.get_num_free_blocks()

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of requests without a first token."""
        requests = self._scheduler.requests.values()
        return sum(request.num_prompt_tokens for request in requests if not request.num_output_tokens)

    def watch_steps(self, log: _Log) -> None:
        step, size = self._front.step, self._block_size

        def watched() -> Any:
            outputs = step()
            lengths = [request.num_tokens for request in self._scheduler.requests.values()]
            log.write(
                "step",
                num_requests=len(lengths),
                tokens=sum(math.ceil(length / size) * size for length in lengths),
                num_blocks=self._num_usable - self._pool.get_num_free_blocks(),
            )
            return outputs

        self._front.step = watched


class _Watched:
    """Stands between the worker and its engine."""

    def __init__(self, engine: Engine, core: _Core, controller: DrainController, log: _Log) -> None:
        self._engine, self._core, self._controller, self._log = engine, core, controller, log
        self._add_request, self._step, self._close = engine.add_request, engine.step, engine.close
        self._prompts: list[Prompt] = []
        self._num_finished = 0

    def install(self) -> None:
        engine = self._engine
        engine.add_request, engine.step, engine.close = self.add_request, self.step, self.close

    def add_request(self, prompt: Prompt) -> None:
        self._log.write(
            "add",
            prompt_id=prompt.prompt_id,
            prompt_tokens=len(prompt.token_ids),
            waiting_tokens=self._core.waiting_tokens,
        )
        self._prompts.append(prompt)
        self._add_request(prompt)

    def step(self) -> list[Completion]:
        self._hold()
        completions = self._step()
        self._num_finished += len(completions)
        return completions

    def _hold(self) -> None:
        told = False
        # Not while a prompt waits: its time to first token would be the order's doing.
        while self._num_finished >= _hold_at() and not self._core.waiting_tokens:
            if not told:
                margin_ms = self._controller.predicted_ttft_ms(0, 0)
                self._log.write("hold", num_finished=self._num_finished, margin_ms=margin_ms)
            told = True
            time.sleep(0.02)

    def close(self) -> None:
        """First, everything that the worker has run once more, as a plain `generate` of vLLM would."""
        before = self._engine.counters().num_preemptions
        self._log.write("bare", num_preemptions=before)
        self._engine._llm.reset_prefix_cache()
        completions = self._engine.generate(self._prompts)
        self._log.write(
            "generate",
            num_preemptions=self._engine.counters().num_preemptions - before,
            texts={completion.prompt_id: completion.text for completion in completions},
        )
        self._close()


def _hold_at() -> float:
    path = Path(os.environ.get(HOLD_AT, os.devnull))
    return int(path.read_text()) if path.is_file() else math.inf


def _watch_gate(controller: DrainController, log: _Log) -> None:
    decide = controller.start_gate

    def watched(load: EngineLoad, prompt_tokens: int, num_blocks: int) -> StartGate:
        gate = decide(load, prompt_tokens, num_blocks)
        log.write(
            "gate",
            gate=gate,
            waiting_tokens=load.waiting_tokens,
            prompt_tokens=prompt_tokens,
            predicted_ttft_ms=controller.predicted_ttft_ms(load.waiting_tokens, prompt_tokens),
            ttft_sla_ms=controller.ttft_sla_ms,
        )
        return gate

    controller.start_gate = watched


def _held(connection: Redis, worker: str) -> int:
    """KV tokens that Redis counts as the worker's; only the courier's thread, which asks, changes them."""
    return int(connection.hget(keys.kv_tokens(), f"worker:{worker}") or 0)


def _leasing(lease: Callable[..., scripts.LeaseReply], log: _Log) -> Callable[..., scripts.LeaseReply]:
    def watched(connection: Redis, queue: str, **arguments: Any) -> scripts.LeaseReply:
        reply = lease(connection, queue, **arguments)
        log.write(
            "lease",
            queue=queue,
            gate=reply.gate,
            limits=asdict(reply.limits),
            held=_held(connection, arguments["worker"]),
            in_flight=connection.scard(keys.worker_executions(arguments["worker"])),
            jobs=[
                {"prompt_id": job.execution_id, "job_id": job.job_id, "tenant": job.tenant, "kv_tokens": job.kv_tokens}
                for job in reply.jobs
            ],
        )
        return reply

    return watched


def _reserving(reserve: Callable[..., list[str]], log: _Log) -> Callable[..., list[str]]:
    def watched(connection: Redis, queue: str, **arguments: Any) -> list[str]:
        words = reserve(connection, queue, **arguments)
        needs = [[need.member, need.kv_tokens] for need in arguments["needs"]]
        log.write("reserve", queue=queue, held=_held(connection, arguments["worker"]), needs=needs, words=words)
        return words

    return watched
