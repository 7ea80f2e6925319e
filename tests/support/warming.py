"""A faulty worker whose engine has a prefix cache to fill and rates to measure, which the simulated one has not:
`rq worker -w support.warming.WarmingWorker`.

Before each step of the warm-up there is a point for orders: "proof-step", "trial-step", "prefix-step"; and before a
prefix is encoded: "prefix-encode"; and when the engine is closed: "close".
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from ingestq.workers.engines.base import Completion, KvCache, Prompt
from support.faulty import FaultyEngine, FaultyWorker, obey

# From the environment. Fields of the engine's KvCache, as JSON.
KV_CACHE = "WARMING_KV_CACHE"
# The file to which a line goes for each prompt: its id and its text, as JSON.
PROMPTS = "WARMING_PROMPTS"


class WarmingEngine(FaultyEngine):
    @property
    def kv_cache(self) -> KvCache:
        return replace(super().kv_cache, prefix_caching=True, **json.loads(os.environ.get(KV_CACHE, "{}")))

    @property
    def rates(self) -> None:
        return None

    def encode(self, text: str) -> list[int]:
        if text.endswith(("\n\na", "\n\n7")):  # what stands for a document's text
            obey("prefix-encode")
        return super().encode(text)

    def add_request(self, prompt: Prompt) -> None:
        if path := os.environ.get(PROMPTS):
            text = b"".join(token.to_bytes(4, "little") for token in prompt.token_ids).rstrip(b"\0")
            with Path(path).open("a") as file:
                file.write(json.dumps([prompt.prompt_id, text.decode(errors="replace")]) + "\n")
        super().add_request(prompt)

    def step(self) -> list[Completion]:
        for seq in [*self._running, *self._waiting][:1]:
            obey(f"{seq.prompt.prompt_id.partition('-')[0]}-step")
        return super().step()

    def close(self) -> None:
        obey("close")
        super().close()
        print("the engine is closed", flush=True)


class WarmingWorker(FaultyWorker):
    engine_class = WarmingEngine
