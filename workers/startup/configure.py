"""`configure`: from the settings to the arguments that an engine is built with, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...common.engine_config import load_engine_config
from ...common.errors import SettingsError, UnknownMachine
from ...common.guard_rails import Target, apply_guard_rails
from ...common.planner.hardware import Machine, for_engine, machine
from ...common.planner.plan import Plan
from ...common.settings import Settings
from .compile_cache import compile_cache_warnings
from .fit import check_fit

# What ingestq sets where the settings don't. The statistics carry the time to first token; their cost is lost in the
# noise (64 prompts of a tiny Gemma 4 in 208 steps on one CPU core: 3.3 to 3.5 CPU-s with them, 3.3 to 4.0 without).
_DEFAULT_ARGS: dict[str, Any] = {"disable_log_stats": False, "use_tqdm_on_load": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the engine finds on this machine."""

    # Names of `vllm.EngineArgs`.
    known_args: Collection[str]
    # vLLM's platform: "tpu", "cuda", "cpu", ...
    device: str
    # Detected, such as "v6e-4"; None: not known.
    chips: str | None
    # Of one device: a GPU's, or the RAM that a CPU's engine may use; None: not asked.
    memory_bytes: int | None
    # VLLM_CPU_KVCACHE_SPACE, for an engine on a CPU; None: not set.
    kv_cache_bytes: int | None
    # Where compiled steps are kept (VLLM_XLA_CACHE_PATH).
    compile_cache: str
    # Those of `unplanned.VARIABLES` that are set.
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """An engine that may be built."""

    # Of `vllm.LLM`.
    args: dict[str, Any]
    # What it should come to; None: the planner does not know the model or the machine.
    plan: Plan | None
    # What there is to say about it.
    warnings: list[str]


def configure(
    settings: Settings, host: Host, read_config: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
) -> Configured:
    """The engine that the settings ask for.

    Args:
        settings: those of `engine_config.with_model`.
        read_config: takes the arguments, returns the model's config.json, or None where it can't be had: vLLM will say
            why.

    Raises:
        SettingsError: no model; an argument that is not vLLM's or can't be; or it can't fit (INGEST_MISFIT).
    """
    config = load_engine_config(settings)
    config.check_names(host.known_args)
    if settings.model is None:
        raise SettingsError("INGEST_MODEL is not set; set it to a local folder or a hub id")
    args: dict[str, Any] = {**_DEFAULT_ARGS, **config.args, "model": settings.model}
    model_config = read_config(args)
    args, warnings = apply_guard_rails(args, _target(settings, host, model_config or {}))
    if host.device == "tpu":
        warnings += compile_cache_warnings(host.compile_cache)
    plan = None
    if model_config is not None and (chips := settings.chips or host.chips):
        plan, said = _checked_fit(settings, host, args, model_config, chips)
        warnings += said
    return Configured(args=args, plan=plan, warnings=warnings)


def _target(settings: Settings, host: Host, model_config: Mapping[str, Any]) -> Target:
    return Target(
        device=host.device,
        chips=(settings.chips or host.chips or "").lower(),
        is_multimodal=any(model_config.get(name) is not None for name in ("vision_config", "audio_config")),
    )


def _checked_fit(
    settings: Settings, host: Host, args: Mapping[str, Any], model_config: Mapping[str, Any], chips: str
) -> tuple[Plan | None, list[str]]:
    try:
        known = _machine(chips, host, args)
    except UnknownMachine as error:
        if settings.chips:
            raise SettingsError(f"INGEST_CHIPS={chips!r}: {error}") from None
        return None, [f"whether the engine fits is not checked: {error} (INGEST_CHIPS names the machine)"]
    return check_fit(model_config, {**args, **host.variables}, known, misfit=settings.misfit)


def _machine(chips: str, host: Host, args: Mapping[str, Any]) -> Machine:
    """Raises: UnknownMachine."""
    # What is here is more certain than what is known of such machines; one that is named may be another.
    found = machine(chips, memory_bytes=host.memory_bytes if host.chips == chips.lower() else None)
    # The variable has the last word (vllm/platforms/cpu.py), and the TPU runtime reads neither (worker/tpu_worker.py).
    kv_cache_bytes = host.kv_cache_bytes or (None if host.device == "tpu" else args.get("kv_cache_memory_bytes"))
    return for_engine(found, args.get("tensor_parallel_size") or 1, kv_cache_bytes)
