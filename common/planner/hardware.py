"""`Machine`: what the planner has to know of an accelerator; `machine("v6e-4")` finds one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from ..errors import UnknownMachine

Runtime = Literal["tpu", "cuda", "cpu"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one kind on one host, as the runtime sees them."""

    # "v6e-4"
    name: str
    # Whose rules of allocation hold.
    runtime: Runtime
    # Devices that the runtime counts: a TPU chip each, but half a chip on v7x.
    num_devices: int
    # Memory of one device that the runtime reports as its limit; 0: not known.
    hbm_bytes: int
    # Bandwidth of that memory, bytes/s; 0: not known.
    hbm_bytes_per_s: float
    # Dense bfloat16 peak of one device, FLOP/s; 0: not known.
    bf16_flops: float
    # Whether the KV cache can be fp8 there; None: depends on the machine at hand.
    fp8_kv: bool | None
    # Where the numbers come from.
    source: str
    # Memory set aside for the KV cache alone (VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes), all devices;
    # None: what the weights leave.
    kv_cache_bytes: int | None = None


_V5E = Machine(
    name="v5e",
    runtime="tpu",
    num_devices=1,
    hbm_bytes=int(15.75 * GIB),
    hbm_bytes_per_s=819e9,
    bf16_flops=197e12,
    fp8_kv=True,
    source="Google Cloud's page on TPU v5e; memory as XLA reports it (15.75 of 16 GiB, kubernetes-engine-samples#1467)",
)
_V6E = Machine(
    name="v6e",
    runtime="tpu",
    num_devices=1,
    hbm_bytes=33_550_237_696,
    hbm_bytes_per_s=1638e9,
    bf16_flops=918e12,
    fp8_kv=True,
    source="Google Cloud's page on TPU v6e; memory as the runtime reports it (31.25 of 32 GiB, vllm#16211)",
)
# One chip is two devices: tpu_inference/utils.py halves its memory, and upstream's tpu7x-8 is four chips run at TP=8.
_V7X = Machine(
    name="v7x",
    runtime="tpu",
    num_devices=1,
    hbm_bytes=int(94.7 * GIB),
    hbm_bytes_per_s=7380e9 / 2,
    bf16_flops=2307e12 / 2,
    fp8_kv=True,
    source="Google Cloud's page on TPU7x, half a chip; memory as reported (94.7 of 96 GiB, tpu-inference#3408)",
)
_H100 = Machine(
    name="h100",
    runtime="cuda",
    num_devices=1,
    hbm_bytes=int(79.1 * GIB),
    hbm_bytes_per_s=3350e9,
    bf16_flops=989e12,
    fp8_kv=True,
    source="NVIDIA's H100 datasheet, SXM, without sparsity; memory as torch reports it of an 80 GB card (79.1 GiB)",
)
_CPU = Machine(
    name="cpu",
    runtime="cpu",
    num_devices=1,
    hbm_bytes=0,
    hbm_bytes_per_s=0.0,
    bf16_flops=0.0,
    fp8_kv=None,
    source="memory as given; rates depend on the machine at hand: the worker measures them at warm-up",
)


def _sized(device: Machine, *counts: int) -> dict[str, Machine]:
    """v6e -> v6e-1, v6e-4, ...: the number counts devices."""
    return {
        f"{device.name}-{count}": replace(device, name=f"{device.name}-{count}", num_devices=count) for count in counts
    }


# By name; each is one host or a part of one (TPU_VISIBLE_CHIPS), so one vLLM process can have all of it.
MACHINES: dict[str, Machine] = {
    **_sized(_V5E, 1, 2, 4, 8),
    **_sized(_V6E, 1, 2, 4, 8),
    **_sized(_V7X, 2, 4, 8),
    **_sized(_H100, 1, 2, 4, 8),
    "cpu": _CPU,
}

# Other spellings.
_ALIASES = {"h100": "h100-1", "v5litepod": "v5e", "tpu7x": "v7x", "tpu-v6e": "v6e", "tpu-v5e": "v5e", "tpu-v7x": "v7x"}


def machine(name: str, *, memory_bytes: int | None = None, kv_cache_bytes: int | None = None) -> Machine:
    """The machine of a name such as "v6e-4" or "cpu", whatever its case.

    Args:
        name: one of MACHINES, or such a name as clouds spell it ("v5litepod-8", "tpu7x-8").
        memory_bytes: memory of one device, in place of what is known; a CPU has none without it.
        kv_cache_bytes: memory set aside for the KV cache alone, all devices.

    Raises:
        UnknownMachine: no such name; says the nearest ones.
    """
    key = _canonical(name)
    if key not in MACHINES:
        raise UnknownMachine(f"chips {name!r} are not known; {_nearest(key)}")
    found = MACHINES[key]
    return replace(
        found,
        hbm_bytes=found.hbm_bytes if memory_bytes is None else memory_bytes,
        kv_cache_bytes=kv_cache_bytes,
    )


def for_engine(found: Machine, tensor_parallel_size: int | None, kv_cache_memory_bytes: int | None) -> Machine:
    """The machine as one engine sees it: vLLM makes as many devices of a CPU as are asked for.

    Args:
        tensor_parallel_size: None: all devices.
        kv_cache_memory_bytes: set aside for the KV cache on each device; None: what the weights leave.
    """
    size = tensor_parallel_size or found.num_devices
    return replace(
        found,
        num_devices=size if found.runtime == "cpu" else found.num_devices,
        kv_cache_bytes=None if kv_cache_memory_bytes is None else kv_cache_memory_bytes * size,
    )


def _nearest(key: str) -> str:
    """Machines of the same chip, or of one that is spelled nearly so; else all: an a100 is no h100."""
    kinds = {name.partition("-")[0] for name in MACHINES}
    chip = get_close_matches(key.partition("-")[0], kinds, n=1, cutoff=0.8)
    near = [name for name in MACHINES if [name.partition("-")[0]] == chip]
    return f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(MACHINES)}"


def _canonical(name: str) -> str:
    lower = name.strip().lower()
    if lower in MACHINES or lower in _ALIASES:
        return _ALIASES.get(lower, lower)
    chip, dash, count = lower.rpartition("-")
    return f"{_ALIASES.get(chip, chip)}{dash}{count}"
