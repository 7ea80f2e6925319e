"""`VllmEngine`: one `vllm.LLM` behind the `Engine` protocol. The only module that imports vllm."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

from pydantic import ValidationError

from ...common.engine_card import EngineCard
from ...common.engine_config import with_model
from ...common.errors import PromptRefused, SettingsError
from ...common.planner.plan import Plan
from ...common.planner.unplanned import VARIABLES
from ...common.schema import Sampling
from ...common.settings import Settings
from ...common.tpu_sampling import unsupported_on_tpu
from ..logs import one_line
from ..startup.configure import Host, configure
from ..startup.devices import gpu_chips, tpu_chips
from .base import Completion, EngineCounters, KvCache, Prompt, StepReport
from .compilations import Compilations
from .meter import Meter

logger = logging.getLogger(__name__)

# Not part of the digest: the same weights wherever the folder is, and a secret.
_UNDIGESTED_ARGS = ("model", "hf_token")

# `max_token_bytes` of a tokenizer that drops text, so that no number of bytes has a least number of tokens.
_NO_BYTE_BOUND = 1 << 30

# Seconds for the engine's processes to end before they are killed. vLLM's own 5 s are what its core waits for its
# workers (VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS), so that the core is often killed while it cleans up.
_CLOSE_TIMEOUT = 15.0

# Likeliest tokens that `score` tells of besides the chosen one; vLLM's max_logprobs is 20.
_NUM_LOGPROBS = 5

# Runs that tokenizers are known to shrink: whitespace stripped or merged, compatibility forms and combining marks
# normalised, unknown characters fused.
_SHRINKING = (" ", "\t", "\n", "\N{MATHEMATICAL BOLD CAPITAL A}", "\N{COMBINING GRAVE ACCENT}", "\ue000")


# vLLM's metrics (vllm/v1/metrics/loggers.py) and ours, one for each engine of the process.
_COUNTED = {
    "vllm:num_preemptions": "num_preemptions",
    "vllm:prefix_cache_queries": "prefix_cache_queries",
    "vllm:prefix_cache_hits": "prefix_cache_hits",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
    "vllm:kv_cache_usage_perc": "kv_usage",
}


class VllmEngine:
    """One vLLM engine, in this process or in one of its own (INGEST_CORE)."""

    def __init__(self, llm: Any, card: EngineCard, tokenizer: Any, kv_cache: KvCache, plan: Plan | None) -> None:
        """Args:
        llm: a `vllm.LLM` that keeps statistics.
        tokenizer: a copy that `llm` doesn't use: fast tokenizers panic when two threads use one ("Already borrowed").
        plan: what `llm` was to be, if that could be told.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        self._llm = llm
        self._engine = llm.llm_engine
        self._card = card
        self._tokenizer = tokenizer
        self._kv_cache = kv_cache
        self._plan = plan
        # The core compiles, and where it is in a process of its own nobody can be asked.
        self._compilations = Compilations(card.device) if _is_in_process(llm) else None
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._step_counts = _step_counts(llm)
        self._meter = Meter()
        # vLLM's states of the prompts in the meter.
        self._prefilling: dict[str, Any] = {}
        # When the last step ended, by time.perf_counter(); None: the engine was idle since.
        self._step_ended: float | None = None
        # vLLM's own error is not a ValueError; wrong types and some values still raise Python's.
        self._refusals = (VLLMValidationError, ValueError, TypeError)

    @classmethod
    def from_settings(cls, settings: Settings) -> VllmEngine:
        """Loads the model.

        Raises:
            SettingsError: an engine argument is unknown, refused by vLLM, or doesn't fit the model or the memory.
        """
        _set_environment(settings)
        import vllm

        settings = with_model(settings)
        configured = configure(settings, _host(), _model_config)
        for warning in configured.warnings:
            logger.warning("%s", warning, extra={"action": "engine_configured"})
        args = configured.args
        try:
            llm = vllm.LLM(**args)
            tokenizer = copy.deepcopy(llm.get_tokenizer())
        except (ValueError, TypeError, OSError, NotImplementedError) as error:  # OSError: no such model
            shown = ", ".join(f"{name}={value!r}" for name, value in args.items() if name != "hf_token")
            raise SettingsError(f"vLLM refuses its settings ({shown}): {_one_line(error)}") from error
        kv_cache = _kv_cache(llm, asked=str(args.get("kv_cache_dtype", "auto")))
        return cls(llm, _card(settings, args, llm, tokenizer), tokenizer, kv_cache, plan=configured.plan)

    @property
    def card(self) -> EngineCard:
        return self._card

    @property
    def kv_cache(self) -> KvCache:
        return self._kv_cache

    @property
    def rates(self) -> None:
        """Nobody knows before it has run."""

    @property
    def plan(self) -> Plan | None:
        return self._plan

    @property
    def last_step(self) -> StepReport | None:
        """As in `Engine`. vLLM counts a preemption when the preempted sequence has its next token."""
        return self._meter.last_step

    @property
    def num_waiting_tokens(self) -> int:
        return self._meter.num_waiting_tokens

    def counters(self) -> EngineCounters:
        totals: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if name := _COUNTED.get(metric.name):
                totals[name] = totals.get(name, 0) + metric.value
        usage = totals.pop("kv_usage", 0.0)
        counted = {name: int(value) for name, value in totals.items()}
        num_compilations = self._compilations.num if self._compilations else None
        return EngineCounters(**counted, num_compilations=num_compilations, kv_usage=usage)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def encode_chat(self, system: str | None, user: str) -> list[int]:
        from jinja2 import TemplateError

        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": user})
        try:
            # return_dict: transformers 5 otherwise returns a BatchEncoding. The template brings its own BOS, and
            # tokenizing in the same call adds no second one.
            token_ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (ValueError, TemplateError) as error:  # no template; or no system role in it
            raise PromptRefused(f"the model's chat template: {_one_line(error)}") from error
        return list(token_ids)

    def add_request(self, prompt: Prompt) -> None:
        try:
            request_id = self._engine.add_request(prompt.prompt_id, _input(prompt), self._params(prompt.sampling))
        except self._refusals as error:
            # vLLM checks before it keeps anything, but its front end keeps the prompt before its core does.
            self.abort([prompt.prompt_id])
            raise PromptRefused(_one_line(error)) from error
        self._prefilling[prompt.prompt_id] = self._engine.output_processor.request_states[request_id]
        self._meter.add(prompt.prompt_id, len(prompt.token_ids))

    def abort(self, prompt_ids: Sequence[str]) -> None:
        # By the caller's ids: the ids that vLLM's add_request returns abort nothing here.
        self._engine.abort_request(list(prompt_ids))
        self._unmeter(prompt_ids)

    def has_unfinished(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[Completion]:
        if not self.has_unfinished():  # a step of an idle engine in a process of its own would never return
            return []
        counts = self._step_counts
        counts.reset()
        # A core that runs ahead (in a process of its own, or async scheduling) may have the output at once: what took
        # the time was before the call.
        started = self._step_ended or time.perf_counter()
        self._step_ended = None
        try:
            outputs = self._engine.step()
        except BaseException:  # a signal's, too; no report, but what has got its first token waits no longer
            self._unmeter(_past_prefill(self._prefilling.items()))
            raise
        ended = time.perf_counter()
        self._step_ended = ended if self.has_unfinished() else None
        finished = [output for output in outputs if output.finished]
        self._meter_first_tokens(self._with_first_token(counts.num_first_tokens))
        self._meter_first_tokens(output.request_id for output in finished)  # whatever vLLM has counted
        self._meter.stepped(
            seconds=ended - started,
            num_output_tokens=counts.num_output_tokens,
            num_preemptions=counts.num_preemptions,
            num_cached_tokens=counts.num_cached_tokens,
        )
        return [_completion(output.request_id, output) for output in finished]

    def _with_first_token(self, number: int) -> list[str]:
        """Prompts that wait no longer, found by how many they are."""
        if not number:
            return []
        # First come, first served: they are the first ones, unless one that didn't fit was passed by others.
        found = _past_prefill(islice(self._prefilling.items(), number))
        return found if len(found) == number else _past_prefill(self._prefilling.items())

    def _meter_first_tokens(self, prompt_ids: Iterable[str]) -> None:
        for prompt_id in prompt_ids:
            state = self._prefilling.pop(prompt_id, None)
            if state is None:
                continue
            if state.stats.num_generation_tokens:
                self._meter.first_token(prompt_id, state.stats.first_token_latency * 1e3)
            else:  # it failed before it had one
                self._meter.drop([prompt_id])

    def _unmeter(self, prompt_ids: Sequence[str]) -> None:
        for prompt_id in prompt_ids:
            self._prefilling.pop(prompt_id, None)
        self._meter.drop(prompt_ids)

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """As in `Engine`; not while prompts of `add_request` are unfinished."""
        completions: list[Completion | None] = []
        inputs, params = [], []
        for prompt in prompts:
            try:
                params.append(self._check(prompt))
            except PromptRefused as error:
                completions.append(Completion.refused(prompt, error))
            else:
                inputs.append(_input(prompt))
                completions.append(None)
        outputs = iter(self._generate(inputs, params) if inputs else ())
        return [
            done or _completion(prompt.prompt_id, next(outputs))
            for prompt, done in zip(prompts, completions, strict=True)
        ]

    def _generate(self, inputs: list[dict[str, Any]], params: list[Any]) -> list[Any]:
        try:
            return list(self._llm.generate(inputs, params, use_tqdm=False))
        except BaseException:  # a signal's, too: what stays behind would come first among the next wave's outputs
            self._engine.abort_request(list(self._engine.output_processor.request_states), internal=True)
            self._unmeter(list(self._prefilling))
            raise

    def score(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], list[dict[int, float]]]]:
        """Runs prompts to their end as `generate` does, with log-probabilities; for comparing engines.

        Returns:
            Of each prompt its output tokens and, for each of them, token id -> natural log of its probability: of the
            chosen token and the _NUM_LOGPROBS likeliest.

        Raises:
            PromptRefused: the engine refuses one of them.
        """
        params = [self._check(prompt) for prompt in prompts]
        for one in params:
            one.logprobs = _NUM_LOGPROBS
        outputs = self._generate([_input(prompt) for prompt in prompts], params) if prompts else []
        return [_scored(output.outputs[0]) for output in outputs]

    def devices(self) -> list[dict[str, Any]]:
        """The accelerators that this process holds: kind, bytes_in_use, bytes_limit; none on CPU or out of process."""
        if self._card.device == "tpu":
            import jax

            return [_tpu(device) for device in jax.local_devices() if device.memory_stats()]
        if self._card.device == "cuda":
            import torch

            return [_gpu(torch.cuda, i) for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)]
        return []

    def close(self) -> None:
        self._engine.engine_core.shutdown(timeout=_CLOSE_TIMEOUT)

    def _params(self, sampling: Sampling) -> Any:
        if self._card.device == "tpu" and (unsupported := unsupported_on_tpu(sampling)):
            shown = ", ".join(f"{name}={value}" for name, value in unsupported.items())
            raise PromptRefused(f"sampling: {shown} not supported by the TPU runtime; leave it out")
        given = sampling.model_dump(mode="json", exclude_none=True)  # json: vLLM asserts that `stop` is a list
        return self._sampling_params(**given, output_kind=self._final_only)

    def _check(self, prompt: Prompt) -> Any:
        """The prompt's SamplingParams, after the checks that `add_request` makes; vLLM fails a whole wave otherwise."""
        try:
            params = self._params(prompt.sampling)
            self._engine.input_processor.process_inputs(
                prompt.prompt_id, _input(prompt), params, supported_tasks=self._engine.get_supported_tasks()
            )
        except self._refusals as error:
            raise PromptRefused(_one_line(error)) from error
        return params


def _set_environment(settings: Settings) -> None:
    """vLLM's own variables, before it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if settings.core == "own-process" else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A forked engine would inherit our connections and pipes and keep them open after we died.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _host() -> Host:
    import vllm
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    return Host(
        known_args=[field.name for field in dataclasses.fields(vllm.EngineArgs)],
        device=device,
        chips=_chips(current_platform),
        memory_bytes=current_platform.get_device_total_memory() if device in ("cpu", "cuda") else None,
        kv_cache_bytes=(vllm.envs.VLLM_CPU_KVCACHE_SPACE or 0) * 2**30 or None if device == "cpu" else None,
        compile_cache=vllm.envs.VLLM_XLA_CACHE_PATH,
        variables={name: os.environ[name] for name in VARIABLES if device == "tpu" and name in os.environ},
    )


def _chips(platform: Any) -> str | None:
    """The machine's accelerators, such as "v6e-4"; None if they are not known."""
    if platform.device_type == "tpu":
        return tpu_chips(os.environ.get("TPU_VISIBLE_CHIPS"))
    if platform.device_type == "cuda":
        return gpu_chips(platform.get_device_name(), platform.device_count())
    return str(platform.device_type)


def _model_config(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's config.json, also from the hub; None where it can't be had."""
    from transformers import PretrainedConfig
    from vllm.transformers_utils.config import file_or_path_exists

    model, revision = args.get("hf_config_path") or args["model"], args.get("revision")
    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision, token=args.get("hf_token"))
        # Where ModelOpt up to 0.29 says that the weights are quantized; vLLM looks there, too.
        if config and file_or_path_exists(model, "hf_quant_config.json", revision):
            config = {"quantization_config": {"quant_method": "modelopt"}, **config}
    except Exception:  # the hub's errors have no common base; vLLM meets the same, and says so
        return None
    return dict(config) or None


def _card(settings: Settings, args: dict[str, Any], llm: Any, tokenizer: Any) -> EngineCard:
    import vllm
    from vllm.platforms import current_platform

    engine = f"vllm {vllm.__version__}"
    digested = {name: value for name, value in args.items() if name not in _UNDIGESTED_ARGS}
    vocabulary = tokenizer.get_vocab()
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    return EngineCard(
        model=settings.served_model,
        tokenizer_digest=_digest(sorted(vocabulary.items())),
        max_token_bytes=_max_token_bytes(tokenizer, vocabulary),
        max_model_len=llm.llm_engine.model_config.max_model_len,
        max_num_seqs=scheduler.max_num_active_seqs or scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        device=current_platform.device_type,
        engine=engine,
        engine_digest=_digest([engine, settings.served_model, digested]),
        over_length=settings.over_length,
    )


def _step_counts(llm: Any) -> Any:
    """What vLLM counts in a step, collected from now on; it has no other way to it than its stat loggers.

    Returns:
        An object with `reset()` and num_first_tokens, num_output_tokens, num_preemptions and num_cached_tokens (of the
        prompts that got their first token) since then.
    """
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    class StepCounts(AggregateStatLoggerBase):  # type: ignore[misc]  # vLLM has no types here
        def __init__(self) -> None:
            self.reset()

        def reset(self) -> None:
            self.num_first_tokens = 0
            self.num_output_tokens = 0
            self.num_preemptions = 0
            self.num_cached_tokens = 0

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if iteration_stats is None:  # a step without outputs, such as the first half of a long prompt
                return
            self.num_first_tokens += len(iteration_stats.time_to_first_tokens_iter)
            self.num_output_tokens += iteration_stats.num_generation_tokens
            self.num_preemptions += iteration_stats.num_preempted_reqs
            self.num_cached_tokens += iteration_stats.prompt_token_stats.cached_tokens

        def log_engine_initialized(self) -> None:
            pass

    counts = StepCounts()
    llm.llm_engine.logger_manager.stat_loggers.append(counts)
    return counts


def _is_in_process(llm: Any) -> bool:
    """Whether vLLM's core can be looked into (INGEST_CORE=in-process)."""
    return hasattr(llm.llm_engine.engine_core, "engine_core")


def _kv_cache(llm: Any, *, asked: str) -> KvCache:
    """The cache that was allocated: its size as vLLM's core reports it, its type from the arrays, if in reach."""
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    dtypes = _read_kv_dtypes(llm)
    settled = str(config.model_config.dtype) if cache.cache_dtype == "auto" else cache.cache_dtype
    groups = _kv_groups(llm)
    return KvCache(
        dtype=", ".join(kv_dtype_name(dtype, settled) for dtype in dtypes or [settled]),
        is_read=bool(dtypes),
        asked=asked,
        num_blocks=cache.num_gpu_blocks or 0,
        block_size=cache.block_size,
        num_tokens=cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size,
        prefix_caching=cache.enable_prefix_caching,
        groups=tuple(window for window, _ in groups),
        group_block_sizes=tuple(block_size for _, block_size in groups),
        max_concurrent_steps=config.max_concurrent_batches,
        # The step's own speculative tokens, and those that a draft model writes ahead.
        num_lookahead_tokens=config.num_speculative_tokens + config.num_lookahead_tokens,
        num_null_blocks=1,
    )


def _kv_groups(llm: Any) -> list[tuple[int | None, int]]:
    """Window and block size of each group of layers, from the core; a guess that is large enough where it can't say."""
    client = llm.llm_engine.engine_core
    try:
        # Kept by vLLM for others who ask from outside, and called by name as they do.
        told = (
            client.engine_core.get_kv_cache_group_metadata()
            if _is_in_process(llm)
            else client.call_utility("get_kv_cache_group_metadata")
        )
        # A layer of another kind may have a window and keep everything all the same.
        groups = [
            (group["sliding_window"] if group["kind"] == "sliding_window" else None, int(group["block_size"]))
            for group in told
        ]
    except Exception as error:
        logger.warning("the groups of the KV cache can't be read: %s", one_line(str(error)))
        groups = []
    return groups or _guessed_kv_groups(llm)


def _guessed_kv_groups(llm: Any) -> list[tuple[int | None, int]]:
    """As many groups without a window as the blocks of the longest sequence stand for."""
    cache = llm.llm_engine.vllm_config.cache_config
    num_blocks, num_tokens = cache.num_gpu_blocks or 0, cache.kv_cache_size_tokens or 0
    num_groups = -(-num_blocks * cache.block_size // num_tokens) if num_tokens else 1
    return [(None, cache.block_size)] * max(1, num_groups)


def _read_kv_dtypes(llm: Any) -> list[str]:
    """The types of the KV arrays; none where they are out of reach, which must not keep the engine from working."""
    if not _is_in_process(llm):  # a core elsewhere calls only methods that its workers have
        return []
    try:
        of_workers = llm.llm_engine.collective_rpc(_kv_array_dtypes)
    except Exception as error:
        logger.warning("the type of the KV cache can't be read: %s", one_line(str(error)))
        return []
    return sorted({dtype for of_worker in of_workers for dtype in of_worker})


def _kv_array_dtypes(worker: Any) -> list[str]:
    """Runs in each of vLLM's workers: the types of its KV arrays; torch's or JAX's, for some layers a list of them."""
    layers = getattr(worker.model_runner, "kv_caches", ())
    arrays = [array for layer in layers for array in (layer if isinstance(layer, (list, tuple)) else [layer])]
    return sorted({str(array.dtype) for array in arrays})


def kv_dtype_name(dtype: str, settled: str) -> str:
    """A type in vLLM's spelling.

    Args:
        dtype: torch's or JAX's name of it, such as "torch.uint8" or "float8_e5m2".
        settled: the `cache_dtype` that vLLM has settled on: on GPUs it stores 8-bit floats as plain bytes
            (STR_DTYPE_TO_TORCH_DTYPE in vllm/utils/torch_utils.py), which only this gives a meaning.
    """
    name = dtype.removeprefix("torch.")
    name = settled if name == "uint8" else name
    return {"fp8": "fp8_e4m3", "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}.get(name, name)


def _max_token_bytes(tokenizer: Any, vocabulary: dict[str, int]) -> int:
    """Bytes of text behind one token at most, or `_NO_BYTE_BOUND`.

    A token's own UTF-8 length is an upper bound: byte-level BPE writes each byte as a character of one or two bytes,
    SentencePiece writes a space as one of three, byte fallback writes a byte as "<0x0A>". Special tokens count, as
    they are recognised in text too. What a tokenizer drops or merges beforehand is not seen there, but tried out.
    """
    longest = max(len(token.encode(errors="replace")) for token in vocabulary)
    for character in _SHRINKING:
        text = character * 1000
        if len(text.encode()) > longest * len(tokenizer.encode(text, add_special_tokens=False)):
            return _NO_BYTE_BOUND
    return longest


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _input(prompt: Prompt) -> dict[str, Any]:
    """vLLM's EngineInput: nothing is left to tokenize or render."""
    return {"type": "token", "prompt_token_ids": list(prompt.token_ids)}


def _completion(prompt_id: str, output: Any) -> Completion:
    """A finished `vllm.RequestOutput` of ours, which has one sequence and statistics."""
    sequence, metrics = output.outputs[0], output.metrics
    reason = sequence.finish_reason
    failed = reason not in ("stop", "length")
    ttft = metrics.first_token_latency  # seconds from add_request
    return Completion(
        prompt_id=prompt_id,
        text=sequence.text,
        token_ids=list(sequence.token_ids),
        finish_reason="error" if failed else reason,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_cached_tokens=output.num_cached_tokens or 0,
        ttft_ms=ttft * 1e3,
        run_ms=(ttft + metrics.last_token_ts - metrics.first_token_ts) * 1e3,
        error=f"vLLM ended the prompt with finish_reason {reason!r}" if failed else None,
    )


def _past_prefill(states: Iterable[tuple[str, Any]]) -> list[str]:
    """Of prompts and vLLM's states of them, those that have been prefilled, or ended without it."""
    return [prompt_id for prompt_id, state in states if not state.is_prefilling]


def _scored(sequence: Any) -> tuple[list[int], list[dict[int, float]]]:
    logprobs = [{token: entry.logprob for token, entry in position.items()} for position in sequence.logprobs]
    return list(sequence.token_ids), logprobs


def _tpu(device: Any) -> dict[str, Any]:
    """Of a jax.Device, whose runtime tells of its HBM."""
    stats = device.memory_stats()
    return {"kind": device.device_kind, "bytes_in_use": stats["bytes_in_use"], "bytes_limit": stats["bytes_limit"]}


def _gpu(cuda: Any, index: int) -> dict[str, Any]:
    """Of all processes on the GPU: torch's own figures leave out what it doesn't allocate itself."""
    free, total = cuda.mem_get_info(index)
    return {"kind": cuda.get_device_name(index), "bytes_in_use": total - free, "bytes_limit": total}


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
    return " ".join(str(error).split())
