"""Prints what vLLM's CPU engine reports of its KV cache, as one JSON line: `python -m support.kv_report FOLDER ARGS`.

ARGS is a JSON object of `vllm.LLM`'s arguments. Weights are random and there is no tokenizer: only memory is asked for.
"""

import json
import sys

from vllm import LLM

if __name__ == "__main__":
    folder, arguments = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, **arguments)
    cache = llm.llm_engine.vllm_config.cache_config
    report = {
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "num_tokens": cache.kv_cache_size_tokens,
        "max_model_len": llm.llm_engine.model_config.max_model_len,
    }
    print(json.dumps(report), flush=True)
