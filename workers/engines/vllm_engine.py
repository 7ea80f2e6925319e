"""`VllmEngine`: one `vllm.LLM` behind the `Engine` protocol. The only module that imports vllm."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from pydantic import ValidationError

from ...common.engine_card import EngineCard
from ...common.errors import PromptRefused, SettingsError
from ...common.schema import Sampling
from ...common.settings import Settings, nearest
from .base import Completion, Prompt

# What ingestq sets where the settings don't. The statistics carry the time to first token; their cost is lost in the
# noise (64 prompts of a tiny Gemma 4 in 208 steps on one CPU core: 3.3 to 3.5 CPU-s with them, 3.3 to 4.0 without).
_DEFAULT_ARGS: dict[str, Any] = {"disable_log_stats": False, "use_tqdm_on_load": False}

# Arguments that are ours to set, with what to do instead.
_RESERVED_ARGS = {
    "model": "set INGEST_MODEL",
    "disable_log_stats": "leave it out: the time to first token comes from vLLM's statistics",
}

# Not part of the digest: the same weights wherever the folder is, and a secret.
_UNDIGESTED_ARGS = ("model", "hf_token")

# `max_token_bytes` of a tokenizer that drops text, so that no number of bytes has a least number of tokens.
_NO_BYTE_BOUND = 1 << 30

# Seconds for the engine's processes to end before they are killed. vLLM's own 5 s are what its core waits for its
# workers (VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS), so that the core is often killed while it cleans up.
_CLOSE_TIMEOUT = 15.0

# Runs that tokenizers are known to shrink: whitespace stripped or merged, compatibility forms and combining marks
# normalised, unknown characters fused.
_SHRINKING = (" ", "\t", "\n", "\N{MATHEMATICAL BOLD CAPITAL A}", "\N{COMBINING GRAVE ACCENT}", "\ue000")


class VllmEngine:
    """One vLLM engine, in this process or in one of its own (INGEST_CORE)."""

    def __init__(self, llm: Any, card: EngineCard, tokenizer: Any) -> None:
        """Args:
        llm: a `vllm.LLM` that keeps statistics.
        tokenizer: a copy that `llm` doesn't use: fast tokenizers panic when two threads use one ("Already borrowed").
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        self._llm = llm
        self._engine = llm.llm_engine
        self._card = card
        self._tokenizer = tokenizer
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
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

        args = _engine_args(settings, [field.name for field in dataclasses.fields(vllm.EngineArgs)])
        try:
            llm = vllm.LLM(**args)
            tokenizer = copy.deepcopy(llm.get_tokenizer())
        except (ValueError, TypeError, OSError, NotImplementedError) as error:  # OSError: no such model
            shown = ", ".join(f"{name}={value!r}" for name, value in args.items() if name != "hf_token")
            raise SettingsError(f"vLLM refuses its settings ({shown}): {_one_line(error)}") from error
        return cls(llm, _card(settings, args, llm, tokenizer), tokenizer)

    @property
    def card(self) -> EngineCard:
        return self._card

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
            self._engine.add_request(prompt.prompt_id, _input(prompt), self._params(prompt.sampling))
        except self._refusals as error:
            # vLLM checks before it keeps anything, but its front end keeps the prompt before its core does.
            self.abort([prompt.prompt_id])
            raise PromptRefused(_one_line(error)) from error

    def abort(self, prompt_ids: Sequence[str]) -> None:
        # By the caller's ids: the ids that vLLM's add_request returns abort nothing here.
        self._engine.abort_request(list(prompt_ids))

    def has_unfinished(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[Completion]:
        if not self.has_unfinished():  # a step of an idle engine in a process of its own would never return
            return []
        return [_completion(output.request_id, output) for output in self._engine.step() if output.finished]

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
            raise

    def close(self) -> None:
        self._engine.engine_core.shutdown(timeout=_CLOSE_TIMEOUT)

    def _params(self, sampling: Sampling) -> Any:
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


def _engine_args(settings: Settings, known: list[str]) -> dict[str, Any]:
    """The arguments of `vllm.LLM`.

    Raises:
        SettingsError: no model, or arguments that are not vLLM's or not the user's to set; names each.
    """
    problems = []
    for name in settings.engine_args:
        variable = f"INGEST_ENGINE_{name.upper()}"
        if name in _RESERVED_ARGS:
            problems.append(f"{variable}: {_RESERVED_ARGS[name]}")
        elif name not in known:
            problems.append(f"{variable} is no engine argument of vLLM; {nearest(name, known)}")
    if settings.model is None:
        problems.append("INGEST_MODEL is not set; set it to a local folder or a hub id")
    if problems:
        raise SettingsError("; ".join(problems))
    return {**_DEFAULT_ARGS, **settings.engine_args, "model": settings.model}


def _card(settings: Settings, args: dict[str, Any], llm: Any, tokenizer: Any) -> EngineCard:
    import vllm
    from vllm.platforms import current_platform

    engine = f"vllm {vllm.__version__}"
    digested = {name: value for name, value in args.items() if name not in _UNDIGESTED_ARGS}
    vocabulary = tokenizer.get_vocab()
    return EngineCard(
        model=settings.served_model,
        tokenizer_digest=_digest(sorted(vocabulary.items())),
        max_token_bytes=_max_token_bytes(tokenizer, vocabulary),
        max_model_len=llm.llm_engine.model_config.max_model_len,
        max_num_seqs=llm.llm_engine.vllm_config.scheduler_config.max_num_seqs,
        device=current_platform.device_type,
        engine=engine,
        engine_digest=_digest([engine, settings.served_model, digested]),
        over_length=settings.over_length,
    )


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


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
    return " ".join(str(error).split())
