"""`python -m support.tpu_generate TASK FOUND`: one bare `LLM.generate` call on the real TPU runtime, without ingestq.

A process of its own for each engine that generates: a second one in a process fails at its first step (bfloat16 after
fp8, tpu-inference 0.32). Its KV cache can be looked at all the same.

TASK, JSON: hbm_bytes, engine_args, prompts, max_tokens (of each), and look_at, a list of engine_args. FOUND, JSON:
token_ids and texts (of each), num_steps, what `kv_arrays` finds, and in looked_at what it finds of the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import tpu_on_cpu
from support.tpu_worker import kv_arrays


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    tpu_on_cpu.install(task["hbm_bytes"])
    from vllm import LLM, SamplingParams

    llm = LLM(**task["engine_args"])
    counted = Counted(llm.llm_engine.step)
    llm.llm_engine.step = counted
    params = [SamplingParams(max_tokens=number, temperature=0, ignore_eos=True) for number in task["max_tokens"]]
    outputs = [output.outputs[0] for output in llm.generate(task["prompts"], params, use_tqdm=False)]
    found = {
        "token_ids": [list(output.token_ids) for output in outputs],
        "texts": [output.text for output in outputs],
        "num_steps": counted.num_calls,
        **kv_arrays(llm),
        "looked_at": [kv_arrays(LLM(**args)) for args in task["look_at"]],
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.num_calls = 0

    def __call__(self) -> Any:
        self.num_calls += 1
        return self._function()


if __name__ == "__main__":
    main()
