"""`Plan` and what it is made of: workload, engine shape, figures; data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import SettingsError
from .hardware import Machine
from .model_shapes import ModelLayout


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be run, as lengths: every document is taken to be as long as this one."""

    # Tokens of one document's prompt, shared prefix included.
    prompt_tokens: int
    # Tokens generated for it.
    output_tokens: int
    # How many documents; None: only rates are asked for.
    num_documents: int | None = None
    # Tokens at the head of every prompt that are the same (a task's instructions): prefilled once, then cached.
    shared_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("prompt_tokens", 1), ("output_tokens", 1), ("shared_prefix_tokens", 0)):
            if getattr(self, name) < minimum:
                raise SettingsError(f"{name}={getattr(self, name)}: it is {minimum} or more")
        if self.num_documents is not None and self.num_documents < 0:
            raise SettingsError(f"num_documents={self.num_documents}: it is 0 or more")
        if self.shared_prefix_tokens > self.prompt_tokens:
            raise SettingsError(
                f"shared_prefix_tokens={self.shared_prefix_tokens} is above prompt_tokens={self.prompt_tokens}, "
                f"which it is a part of"
            )

    @property
    def total_tokens(self) -> int:
        """Prompt and output of one document."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """The engine arguments that decide what fits, in vLLM's names; None: chosen by `make_plan`."""

    # Devices that share one model; None: all of the machine.
    tensor_parallel_size: int | None = None
    # "auto" (as dtype), "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2".
    kv_cache_dtype: str = "auto"
    # Of weights and activations.
    dtype: str = "bfloat16"
    # Prompt plus output tokens of one sequence at most; None: what the workload needs.
    max_model_len: int | None = None
    # Sequences that run at once at most.
    max_num_seqs: int | None = None
    # Tokens of one engine step at most.
    max_num_batched_tokens: int | None = None
    # Tokens of a KV cache block; None: the runtime's choice.
    block_size: int | None = None
    # Share of the device's memory that vLLM may take.
    gpu_memory_utilization: float = 0.92

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value}: it is 1 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SettingsError(f"gpu_memory_utilization={self.gpu_memory_utilization}: it is above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ResolvedShape(EngineShape):
    """An `EngineShape` with everything chosen."""

    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a plan, with how it came about."""

    # Stable: they are listed in the docstring of `make_plan`.
    name: str
    # What to plan with; None: only the range is known.
    value: float | None
    # Bounds, or None where `value` is all there is.
    low: float | None
    high: float | None
    # "bytes", "tokens", "tokens/s", ...
    unit: str
    # With the numbers filled in.
    formula: str
    # Where formula and constants come from.
    source: str
    # Whether it is arithmetic on the configuration by the runtime's own rules, not an estimate.
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fits, and the figures that say so."""

    model: ModelLayout
    machine: Machine
    workload: Workload
    # Prompt tokens to be prefilled for every document: without the shared prefix, as far as that is cached.
    fresh_tokens: int
    shape: ResolvedShape
    figures: tuple[Figure, ...]
    # Why it can't run: sentences with value, bound and way out.
    problems: tuple[str, ...] = ()
    # What runs, but not as one may expect.
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing stands in the way of a start."""
        return not self.problems

    def __getitem__(self, name: str) -> Figure:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> Mapping[str, Figure]:
        return {figure.name: figure for figure in self.figures}
