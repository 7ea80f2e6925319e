"""Guard rails: what an engine is not started with, what is changed for it, and what is only said.

Each rail is one small function of the arguments and of the target. It returns the arguments to go on with and the lines
to log, or raises. Names and values are checked against vLLM 0.32; what only vLLM can know is left to vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SettingsError
from .schema import Sampling

Args = Mapping[str, Any]
# The arguments to go on with, and lines to log.
Outcome = tuple[Args, list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the engine is to run on, and what kind of model."""

    # vLLM's platform: "tpu", "cuda", "cpu", ...
    device: str
    # Chips and their number, such as "v6e-4"; "" if unknown.
    chips: str = ""
    # Whether the model also takes images or sound, by its config.json.
    is_multimodal: bool = False

    @property
    def is_v6e(self) -> bool:
        return self.device == "tpu" and self.chips.startswith("v6e")


# Tokens of output in a request that does not say.
_DEFAULT_OUTPUT = Sampling().max_tokens

# Tokens kept free for output where the context is a round number: the article's advice (32768 -> 33280).
_HEADROOM = 512

# Of tpu_inference 0.32 (utils.to_jax_dtype): the others of vLLM fail there late, with a traceback of numpy's.
_TPU_KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")

# Arguments that are numbers of things.
_COUNTS = ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "kv_cache_memory_bytes", "block_size")

# Formats that both weights and KV cache can have.
_UNQUANTIZED = ("bfloat16", "float16", "float32")

# Methods of speculation for which vLLM 0.32 turns async scheduling off (config/vllm.py, VllmConfig.__post_init__).
_SYNCHRONOUS_METHODS = ("ngram", "[ngram]", "suffix", "medusa", "mlp_speculator", "custom_class")


def apply_guard_rails(args: Args, target: Target) -> tuple[dict[str, Any], list[str]]:
    """The arguments to start the engine with, and lines to log about them.

    Args:
        args: in vLLM's own names, which have been checked.

    Raises:
        SettingsError: says everything that is wrong, each with key, value, bound and way out.
    """
    lines: list[str] = []
    problems: list[str] = []
    for rail in RAILS:
        try:
            args, said = rail(args, target)
        except SettingsError as error:
            problems.append(str(error))
        else:
            lines += said
    if problems:
        raise SettingsError("; ".join(problems))
    return dict(args), lines


def check_numbers(args: Args, target: Target) -> Outcome:
    """Counts are whole numbers of one or more, and the share of memory is a share: vLLM says so late, or not at all.

    Raises:
        SettingsError: one is not.
    """
    for name in _COUNTS:
        value = args.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise SettingsError(f"{name}={value!r}: a whole number of 1 or more is expected")
    length = args.get("max_model_len")
    if length is not None and (type(length) is not int or (length < 1 and length != -1)):
        raise SettingsError(f"max_model_len={length!r}: a whole number of tokens is expected (-1: as many as fit)")
    share = args.get("gpu_memory_utilization")
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        raise SettingsError(
            f"gpu_memory_utilization={share!r}: a share of the memory is expected, over 0 and at most 1; write 0.9"
        )
    return args, []


def leave_room_for_output(args: Args, target: Target) -> Outcome:
    """The exact-boundary trap: max_model_len is prompt and output together.

    A context of exactly the documents' length (32768 for 32k documents) fails every document that fills it.

    Raises:
        SettingsError: there is no room for a prompt and one token of output.
    """
    length = args.get("max_model_len")
    if type(length) is not int or length < 1:
        return args, []
    if length == 1:
        raise SettingsError(
            f"max_model_len={length}: prompt and output share it, so at least 2; write the longest prompt + {_HEADROOM}"
        )
    if length <= _DEFAULT_OUTPUT:
        return args, [
            f"max_model_len={length}: prompt and output share it, and a request asks for {_DEFAULT_OUTPUT} tokens of "
            f"output unless it says otherwise, so that only those with less max_tokens fit; write the longest prompt "
            f"+ {_HEADROOM}"
        ]
    if length < 1024 or length & (length - 1):
        return args, []
    return args, [
        f"max_model_len={length} is prompt and output together: with {_DEFAULT_OUTPUT} tokens of output, prompts of up "
        f"to {length - _DEFAULT_OUTPUT} tokens fit. If documents of {length} tokens are to fit, write "
        f"{length + _HEADROOM}"
    ]


def check_step(args: Args, target: Target) -> Outcome:
    """A step holds at least one token of every running sequence.

    Raises:
        SettingsError: it does not; vLLM would say so after loading its configuration.
    """
    tokens, seqs = args.get("max_num_batched_tokens"), args.get("max_num_seqs")
    if type(tokens) is int and type(seqs) is int and tokens < seqs:
        raise SettingsError(
            f"max_num_batched_tokens={tokens}: a step decodes one token of each sequence, and max_num_seqs is {seqs}; "
            f"write at least {seqs} (a batch wants 4096 or more), or lower max_num_seqs"
        )
    return args, []


def say_default_of_seqs(args: Args, target: Target) -> Outcome:
    """On TPU, max_num_seqs is a compiled shape and the limit of what runs at once: not to be left to chance."""
    if target.device != "tpu" or args.get("max_num_seqs") is not None:
        return args, []
    return args, [
        "max_num_seqs is not set: vLLM's default on TPU is 256, more documents than that wait inside the engine; "
        "`ingestq plan` says how many fit"
    ]


def check_kv_cache_dtype(args: Args, target: Target) -> Outcome:
    """No KV cache in int8, on TPU none of the formats that only GPUs have, on a CPU none unlike the weights.

    Raises:
        SettingsError: the format is not one that runs there.
    """
    dtype = args.get("kv_cache_dtype")
    if dtype is None:
        return args, []
    if not isinstance(dtype, str):
        raise SettingsError(f"kv_cache_dtype={dtype!r}: a name is expected, such as auto, bfloat16 or fp8")
    fp8 = "fp8_e5m2" if target.is_v6e else "fp8"
    if dtype == "int8":
        raise SettingsError(f"kv_cache_dtype='int8': vLLM has no such KV cache; write {fp8}, or auto for that of dtype")
    if target.device == "tpu" and dtype not in _TPU_KV_DTYPES:
        raise SettingsError(
            f"kv_cache_dtype={dtype!r}: the TPU runtime has {', '.join(_TPU_KV_DTYPES)}; write {fp8}, or auto"
        )
    weights = args.get("dtype", "auto")
    if target.device == "cpu" and dtype in _UNQUANTIZED and weights in _UNQUANTIZED and dtype != weights:
        raise SettingsError(
            f"kv_cache_dtype={dtype!r} with dtype={weights!r}: vLLM's CPU engine (0.32) takes both and generates "
            f"nonsense; write auto, or dtype: {dtype}"
        )
    return args, []


def choose_fp8_of_v6e(args: Args, target: Target) -> Outcome:
    """On v6e, `fp8` means e5m2: e4m3, which it stands for in vLLM, is far slower there (tpu-inference#1112)."""
    dtype = args.get("kv_cache_dtype")
    if dtype not in ("fp8", "fp8_e4m3") or not target.is_v6e:
        return args, []
    if dtype == "fp8_e4m3":
        return args, ["kv_cache_dtype=fp8_e4m3 is far slower than fp8_e5m2 on v6e (tpu-inference#1112); taken as asked"]
    return {**args, "kv_cache_dtype": "fp8_e5m2"}, [
        "kv_cache_dtype=fp8 becomes fp8_e5m2: on v6e e4m3, which fp8 stands for, is far slower (tpu-inference#1112); "
        "write fp8_e4m3 to have it all the same"
    ]


def keep_weights(args: Args, target: Target) -> Outcome:
    """An fp8 KV cache asks for no fp8 weights: those change which experts a token is routed to.

    Raises:
        SettingsError: `dtype` is a format of quantized values.
    """
    dtype = args.get("dtype")
    if isinstance(dtype, str) and dtype.startswith(("fp8", "float8", "int8", "int4", "fp4")):
        raise SettingsError(
            f"dtype={dtype!r}: weights and activations are bfloat16, float16, float32 or auto; write bfloat16, and "
            f"kv_cache_dtype for the KV cache (quantized weights are asked for by quantization)"
        )
    method, kv_dtype = args.get("quantization"), args.get("kv_cache_dtype")
    if method is None or kv_dtype is None or not str(kv_dtype).startswith("fp8"):
        return args, []
    return args, [
        f"quantization={method} quantizes the weights beside a KV cache in {kv_dtype}: as asked. The KV cache does not "
        f"need it, and experts are chosen less exactly; leave it out to keep the weights as they are"
    ]


def ask_for_speculation(args: Args, target: Target) -> Outcome:
    """In a batch, no ngram speculation unless its price is accepted by name.

    It proposes what the prompt said before; vLLM turns async scheduling off for it, which every step then lacks,
    whatever is accepted. The article's 15-20 % fewer steps are unsupported.

    Raises:
        SettingsError: it is configured without `async_scheduling: false`.
    """
    method = args.get("spec_method") or _method_of(args.get("speculative_config"))
    if method not in _SYNCHRONOUS_METHODS:
        return args, []
    key = "spec_method" if args.get("spec_method") else "speculative_config"
    if args.get("async_scheduling") is not False:
        raise SettingsError(
            f"{key}: method {method!r} turns async scheduling off, for every step; leave it out, or ask for it by "
            f"async_scheduling: false beside it, and keep it only if over 60 % of its tokens are accepted"
        )
    return args, [
        f"{key}: method {method!r} runs without async scheduling, as asked; drop it if under 60 % of its tokens are "
        f"accepted (`ingestq status` says how many are)"
    ]


def _method_of(config: Any) -> Any:
    """The method of a speculative_config; vLLM also takes it from `model: ngram`."""
    return (config.get("method") or config.get("model")) if isinstance(config, Mapping) else None


def keep_images_whole(args: Args, target: Target) -> Outcome:
    """The TPU runtime can't cut an image into pieces of a prefill (its platform warns of "execution failures")."""
    if target.device != "tpu" or not target.is_multimodal or args.get("disable_chunked_mm_input"):
        return args, []
    return {**args, "disable_chunked_mm_input": True}, [
        "disable_chunked_mm_input becomes true: the model is multimodal, and the TPU runtime fails without it; "
        "write it into the configuration"
    ]


RAILS: tuple[Callable[[Args, Target], Outcome], ...] = (
    check_numbers,
    leave_room_for_output,
    check_step,
    say_default_of_seqs,
    check_kv_cache_dtype,
    choose_fp8_of_v6e,
    keep_weights,
    ask_for_speculation,
    keep_images_whole,
)
