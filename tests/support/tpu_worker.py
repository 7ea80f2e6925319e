"""`rq worker -w support.tpu_worker.TpuOnCpuWorker`: `BatchWorker` over the real TPU runtime, on a CPU."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ingestq.workers.batch_worker import BatchWorker
from ingestq.workers.engines.base import Completion, Engine
from support import tpu_on_cpu

# From the environment: bytes that a device says it has, and the file for what is found in the process.
HBM_BYTES = "TPU_ON_CPU_HBM_BYTES"
FINDINGS = "TPU_ON_CPU_FINDINGS"


class TpuOnCpuWorker(BatchWorker):
    """Writes what no row and no card tells to a file, after each step."""

    _found: dict[str, Any]

    def load_engine(self) -> Engine:
        tpu_on_cpu.install(int(os.environ[HBM_BYTES]))
        self._log = CompilationLog()
        engine = super().load_engine()
        # Of each run, from the first document until the engine is idle: prompts in the engine before each step.
        self._found = {**kv_arrays(engine._llm), "runs": []}
        step = engine.step

        def watched() -> list[Completion]:
            if self._found["runs"]:
                self._found["runs"][-1].append(engine._engine.get_num_unfinished_requests())
            completions = step()
            self._found["num_compilations"] = self._log.num
            _write(Path(os.environ[FINDINGS]), self._found)
            return completions

        engine.step = watched
        return engine

    def execute_job(self, *args: Any) -> Any:
        self._found.setdefault("num_compilations_at_start", self._log.num)
        self._found["runs"].append([])
        return super().execute_job(*args)


class CompilationLog(logging.Handler):
    """Counts what JAX compiles by what it says in its log, which is not where ingestq counts it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.num = 0
        logger = logging.getLogger("jax._src.dispatch")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.num += record.getMessage().startswith("Finished XLA compilation")


def kv_arrays(llm: Any) -> dict[str, Any]:
    """What the KV cache is made of, by the arrays themselves."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return {
        "kv_dtype": "/".join(sorted({str(array.dtype) for array in runner.kv_caches})),
        "kv_shapes": sorted({array.shape for array in runner.kv_caches}),
        "kv_bytes": sum(array.nbytes for array in runner.kv_caches),
        "num_layers": len(runner.kv_caches),
        "block_size": llm.llm_engine.vllm_config.cache_config.block_size,
    }


def _write(path: Path, found: dict[str, Any]) -> None:
    """At once or not at all: a test reads it meanwhile."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(found))
    draft.replace(path)
