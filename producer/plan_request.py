"""From the command line, settings and documents to a plan: who has the say on what, and what is odd about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import click

from ..common.engine_config import EngineConfig, load_engine_config, with_model
from ..common.engine_names import gone
from ..common.errors import RequestRefused, SettingsError
from ..common.guard_rails import Target, choose_fp8_of_v6e
from ..common.planner.hardware import GIB, Machine, for_engine, machine
from ..common.planner.model_layout import load_layout
from ..common.planner.plan import EngineShape, Plan, Workload, make_plan
from ..common.planner.unplanned import told, unplanned
from ..common.schema import IngestRequest
from ..common.settings import Settings
from .bounds import check_bytes
from .command import say
from .documents import read_documents
from .plan_report import Findings
from .presets import PRESETS, Preset
from .progress import progress
from .token_counts import TokenCounts, count_tokens, find_counter

# Tokens that a chat template may add to a prompt, at most, for those of the shipped models (Llama 3.1's, with its
# dates, takes some 40). Kept free where max_model_len is chosen here.
_TEMPLATE_TOKENS = 64
# max_model_len is chosen in steps of this: a round figure, whole KV blocks of every runtime.
_LENGTH_STEP = 256

# What vLLM settles by itself, so that the planner chooses.
_LEFT_TO_VLLM = {"dtype": "auto", "max_model_len": -1}

# What the planner can work with; vLLM may take more.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "kv_cache_dtype": ((str,), "a name"),
    "dtype": ((str,), "a name"),
    "tensor_parallel_size": ((int,), "a whole number"),
    "max_model_len": ((int,), "a whole number"),
    "max_num_seqs": ((int,), "a whole number"),
    "max_num_batched_tokens": ((int,), "a whole number"),
    "block_size": ((int,), "a whole number"),
    "gpu_memory_utilization": ((int, float), "a number"),
    "kv_cache_memory_bytes": ((int,), "a whole number"),
}

# Of any number of tokens or sequences that is planned with: far beyond what there is, and no overflow.
MAX_TOKENS = 100_000_000
# Of others: a PiB.
_LARGEST = {"kv_cache_memory_bytes": 2**50}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What `ingestq plan` is asked, but for its documents; None: not said."""

    model: str | None
    chips: str | None
    memory: float | None
    kv_cache_memory: float | None
    preset: str | None
    engine_config: str | None
    prompt_tokens: int | None
    output_tokens: int
    shared_prefix_tokens: int | None
    documents: int | None
    system: str | None
    instruction: str | None
    tokenizer: str | None
    kv_cache_dtype: str | None
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    tensor_parallel_size: int | None
    gpu_memory_utilization: float | None
    price_per_hour: float | None
    deadline: float | None


def find(paths: Sequence[str], request: PlanRequest, settings: Settings) -> tuple[Findings, int]:
    """The plan with all that goes with it, and how many of the documents will be refused.

    Raises:
        click.UsageError: something is missing or contradicts itself.
        IngestqError: model, machine, engine configuration or tokenizer can't be used.
    """
    if request.engine_config is not None:
        settings = settings.model_copy(update={"engine_config": request.engine_config})
    config = load_engine_config(settings)
    preset = PRESETS[request.preset] if request.preset else None
    model, target = _model(request, settings), _machine(request, settings)
    layout, shape = load_layout(model), _shape(request, config, preset, target)
    target = for_engine(target, shape.tensor_parallel_size, _kv_cache_memory(request, config, target))
    if not target.hbm_bytes and target.kv_cache_bytes is None:
        raise click.UsageError(f"how much memory has the {target.name}? say --memory or --kv-cache-memory")
    counts, num_refused = None, 0
    if paths:
        counts, num_refused = _count(paths, request, settings, model, shape.max_model_len)
    if counts and shape.max_model_len is None:
        shape = replace(shape, max_model_len=_enough_for(counts, request.output_tokens))
    plan = make_plan(
        layout,
        target,
        _workload(request, preset, counts, caches_prefixes=config.args.get("enable_prefix_caching") is not False),
        shape,
        price_per_hour=request.price_per_hour,
        deadline_hours=request.deadline,
    )
    findings = Findings(
        plan=plan,
        counts=counts,
        preset=preset,
        problems=tuple(_problems(config)),
        warnings=tuple(_warnings(config, counts, num_refused, plan)),
    )
    return findings, num_refused + (counts.num_too_long if counts else 0)


# --- what is asked for


def _model(request: PlanRequest, settings: Settings) -> str:
    model = request.model or with_model(settings).model
    if model is None:
        raise click.UsageError("which model? say --model, such as gemma-4-26b-a4b or a folder with its config.json")
    return model


def _machine(request: PlanRequest, settings: Settings) -> Machine:
    chips = request.chips or settings.chips
    if chips is None:
        raise click.UsageError("on which machine? say --chips, such as v6e-4")
    return machine(chips, memory_bytes=None if request.memory is None else int(request.memory * GIB))


def _kv_cache_memory(request: PlanRequest, config: EngineConfig, target: Machine) -> int | None:
    """Bytes of each device that are set aside for the KV cache; the TPU runtime doesn't read the argument."""
    if request.kv_cache_memory is not None:
        return int(request.kv_cache_memory * GIB)
    if target.runtime == "tpu" or config.args.get("kv_cache_memory_bytes") is None:
        return None
    return int(_checked("kv_cache_memory_bytes", config))


def _shape(request: PlanRequest, config: EngineConfig, preset: Preset | None, target: Machine) -> EngineShape:
    """Each argument from the first that has it: option, variable, file, preset; else `make_plan` chooses.

    As for a worker, `fp8` becomes what it had better be on the machine.
    """
    chosen: dict[str, Any] = {}
    if preset:
        chosen = {"max_num_seqs": preset.max_num_seqs, "max_model_len": preset.max_model_len}
        chosen["kv_cache_dtype"] = preset.kv_cache_dtype if target.fp8_kv else "auto"
    for name in (field.name for field in fields(EngineShape)):
        if (value := getattr(request, name, None)) is not None:
            chosen[name] = value
        elif config.args.get(name) not in (None, _LEFT_TO_VLLM.get(name)):
            chosen[name] = _checked(name, config)
    args, _ = choose_fp8_of_v6e(chosen, Target(device=target.runtime, chips=target.name))
    return EngineShape(**args)


def _checked(name: str, config: EngineConfig) -> Any:
    """Raises: SettingsError: the value of file or variable is none that the planner can work with."""
    value: Any = config.args[name]
    kinds, kind = _KINDS[name]
    largest = _LARGEST.get(name, MAX_TOKENS)
    if type(value) not in kinds:  # True is no number
        reason = f"the planner needs {kind}"
    elif not isinstance(value, str) and not 0 < value <= largest:
        reason = f"must be more than 0 and at most {largest:,}"
    else:
        return value
    raise SettingsError(f"{config.origin(name)}={value!r}: {reason}; mend it, or override it here")


def _workload(
    request: PlanRequest, preset: Preset | None, counts: TokenCounts | None, *, caches_prefixes: bool
) -> Workload:
    given = request.prompt_tokens or (preset.prompt_tokens if preset else None)
    if counts and request.prompt_tokens:
        raise click.UsageError("the documents say how long they are; leave out --prompt-tokens")
    prompt = counts.mean if counts else given
    if prompt is None:
        raise click.UsageError("how long is a document? name some files, or say --prompt-tokens")
    prefix = request.shared_prefix_tokens
    if prefix is None:
        prefix = counts.shared_prefix_tokens if counts else 0
    if prefix >= prompt:
        raise click.UsageError(f"--shared-prefix-tokens {prefix} leaves nothing of a prompt of {prompt} tokens")
    num_documents = request.documents or (counts.num_documents if counts else None)
    if num_documents is None and (request.price_per_hour is not None or request.deadline is not None):
        raise click.UsageError("how many documents? --price-per-hour and --deadline need --documents N")
    return Workload(
        prompt_tokens=prompt,
        output_tokens=request.output_tokens,
        num_documents=num_documents,
        shared_prefix_tokens=prefix if caches_prefixes else 0,
    )


# --- the documents


def _count(
    paths: Sequence[str], request: PlanRequest, settings: Settings, model: str, max_model_len: int | None
) -> tuple[TokenCounts, int]:
    """The documents' lengths, and how many of them `enqueue` would refuse: those are named and not counted."""
    counter = find_counter(model, request.tokenizer)
    num_refused = 0

    def on_refused(refusal: RequestRefused) -> None:
        nonlocal num_refused
        num_refused += 1
        say(f"refused: {refusal}")

    def accepted() -> Iterator[IngestRequest]:
        for document in read_documents(
            paths, model="any", system=request.system, instruction=request.instruction, on_refused=on_refused
        ):
            try:
                check_bytes(document, len(document.to_json()), settings.max_text_bytes)
            except RequestRefused as refusal:
                on_refused(refusal)
            except UnicodeError as error:
                on_refused(RequestRefused(document.document_id, str(error)))
            else:
                yield document

    room = None if max_model_len is None else max(max_model_len - request.output_tokens, 0)
    with progress("count") as report:
        counts = count_tokens(accepted(), counter, max_tokens=room, on_progress=lambda done: report(done, None))
    if counts is None:
        raise click.UsageError(f"no document to plan for: {num_refused} refused")
    return counts, num_refused


def _enough_for(counts: TokenCounts, output_tokens: int) -> int:
    """max_model_len for the longest document."""
    needed = counts.high.max + output_tokens + _TEMPLATE_TOKENS
    return -(-needed // _LENGTH_STEP) * _LENGTH_STEP


# --- what is odd


def _problems(config: EngineConfig) -> Iterator[str]:
    names = gone()
    for name in config.args:
        if name in names:
            yield f"{config.origin(name)} is no engine argument of vLLM; {names[name]}"


def _warnings(config: EngineConfig, counts: TokenCounts | None, num_refused: int, plan: Plan) -> Iterator[str]:
    asked = unplanned(config.args) | {name: config.args[name] for name in ("hf_overrides",) if config.args.get(name)}
    if asked:
        yield f"planned without {told(asked)}, which the planner doesn't know and which changes what fits"
    if num_refused:
        yield f"{num_refused:,} documents are refused at enqueue, for the reasons above; they are not in the plan"
    if counts and counts.num_too_long:
        yield (
            f"{counts.num_too_long:,} of {counts.num_documents:,} documents leave no room for their output in "
            f"max_model_len {plan.shape.max_model_len:,} (the longest has {counts.high.max:,} tokens) and will fail; "
            f"split them, or raise --max-model-len"
        )
