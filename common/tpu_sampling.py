"""What of `Sampling` the TPU runtime doesn't do: refused by `enqueue`, and by a worker on TPU all the same."""

from __future__ import annotations

from .schema import Sampling


def unsupported_on_tpu(sampling: Sampling) -> dict[str, float]:
    """What would change the output, and does not on TPU (tpu_inference 0.32).

    A seed is refused there, document by document (tpu_platform.py: "JAX does not support per-request seed"); at
    temperature 0 it means nothing anywhere. The others are ignored without a word (sampling_metadata.py has
    temperature, top_k and top_p alone; input_batch.py keeps min_tokens, and nothing reads it).
    """
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        neutral["min_p"] = 0.0
    if not sampling.ignore_eos:
        neutral["min_tokens"] = 0
    asked = {
        name: value for name, without in neutral.items() if (value := getattr(sampling, name)) not in (None, without)
    }
    if sampling.temperature > 0 and sampling.seed is not None:
        asked["seed"] = sampling.seed
    return asked
