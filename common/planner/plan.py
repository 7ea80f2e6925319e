"""`make_plan`: what fits on a machine, at what rate and at what price, before anything runs; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..settings import MAX_IN_FLIGHT
from ..sizes import byte_size
from . import checks, rates
from .capacity import (
    TPU_RESIDENT_SHARE,
    dtype_bytes,
    ideal_kv_bytes_per_sequence,
    ideal_kv_bytes_per_token,
    layer_bytes_per_token,
    padded_expert_width,
    request_buckets,
    token_buckets,
    window_of,
)
from .hardware import Machine
from .model_shapes import ModelLayout
from .records import EngineShape, Figure, Plan, ResolvedShape, Workload
from .sizing import Sizing, resolve

__all__ = ["EngineShape", "Figure", "Plan", "ResolvedShape", "Workload", "make_plan"]

_TPU_KV = (
    "tpu_inference 0.32.0: runner/kv_cache_manager.py:480-600, kernels/ragged_paged_attention/v3 get_kv_cache_shape"
)
_VLLM_KV = "vllm 0.32.0: v1/core/kv_cache_utils.py, v1/kv_cache_interface.py"
_PALM = "two FLOPs a parameter, four a query head, dimension and position (Chowdhery et al., PaLM, appendix B)"


def make_plan(
    layout: ModelLayout,
    machine: Machine,
    workload: Workload,
    shape: EngineShape,
    *,
    price_per_hour: float | None = None,
    deadline_hours: float | None = None,
) -> Plan:
    """What one engine on the machine can do with the workload.

    Args:
        layout: from `model_layout.load_layout` or `read_layout`.
        machine: from `hardware.machine`.
        price_per_hour: of the whole machine, in any currency; None: no figure `cost`.
        deadline_hours: None: no figure `meets_deadline`.

    Returns:
        A plan with these figures, in this order. Of memory: weights_bytes, kv_bytes_per_token_ideal,
        kv_bytes_per_sequence_ideal, kv_bytes_per_token, kv_pool_bytes, kv_tokens, block_size, resident_sequences,
        resident_sequences_ideal, compiled_shapes (TPU only). Of rates, where the machine's are known:
        prefill_flops_per_token, prefill_ceiling_tokens_per_s, prefill_tokens_per_s, and where the workload fits,
        decode_ceiling_tokens_per_s, decode_tokens_per_s, ttft_at_limit_ms. Suggestions: max_num_seqs,
        max_num_batched_tokens, max_in_flight. Of the whole work: documents_per_hour; with num_documents hours, cost
        and meets_deadline (1: even at the low rate, 0: not even at the high one, else 0 to 1).

    Raises:
        SettingsError: a dtype that isn't planned for.
    """
    resolved, sizing = resolve(layout, machine, workload, shape)
    figures = _Figures(layout=layout, machine=machine, workload=workload, shape=resolved, sizing=sizing)
    return Plan(
        model=layout,
        machine=machine,
        workload=workload,
        fresh_tokens=figures.fresh_tokens,
        shape=resolved,
        figures=(
            *figures.memory(),
            *figures.rates(),
            *figures.suggestions(),
            *figures.work(price_per_hour, deadline_hours),
        ),
        problems=tuple(checks.problems(layout, machine, workload, resolved, sizing)),
        warnings=tuple(checks.warnings(layout, machine, workload, resolved, sizing)),
    )


def _exact(name: str, value: float, unit: str, formula: str, source: str) -> Figure:
    return Figure(name=name, value=value, low=None, high=None, unit=unit, formula=formula, source=source, exact=True)


def _estimate(name: str, value: float, unit: str, formula: str, source: str) -> Figure:
    return Figure(name=name, value=value, low=None, high=None, unit=unit, formula=formula, source=source, exact=False)


def _range(name: str, bounds: tuple[float, float], unit: str, formula: str, source: str) -> Figure:
    low, high = sorted(bounds)
    return Figure(name=name, value=None, low=low, high=high, unit=unit, formula=formula, source=source, exact=False)


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """The figures of one plan, by what they are about."""

    layout: ModelLayout
    machine: Machine
    workload: Workload
    shape: ResolvedShape
    sizing: Sizing

    @property
    def fresh_tokens(self) -> int:
        """Prompt tokens to be prefilled for every document: all but the cached blocks, and always the last token."""
        shared = min(self.workload.shared_prefix_tokens, self.workload.prompt_tokens - 1)
        step = self.sizing.kv_cache.cached_tokens
        return self.workload.prompt_tokens - shared // step * step

    def memory(self) -> Iterator[Figure]:
        """What fits."""
        yield self._weights()
        yield self._kv_ideal_token()
        yield self._kv_ideal_sequence()
        yield self._kv_token()
        yield self._kv_pool()
        yield self._kv_tokens()
        yield self._block_size()
        yield from self._resident()
        if self.machine.runtime == "tpu":
            yield self._compiled_shapes()

    def rates(self) -> Iterator[Figure]:
        """How fast, of a machine whose peaks are known."""
        if not self._has_rates:
            return
        yield self._flops()
        yield self._prefill_ceiling()
        share = rates.prefill_share(self.layout)
        low, high = self._prefill
        yield _range(
            "prefill_tokens_per_s",
            self._prefill,
            "tokens/s",
            f"{share.low:.0%} to {share.high:.0%} of the ceiling, nothing cached",
            share.source,
        )
        if self.sizing.resident_sequences == 0:
            return
        yield from self._decode_rates()
        waits = [self._mean_ttft_ms(rate) for rate in (low, high)]
        yield _range(
            "ttft_at_limit_ms",
            (waits[0], waits[1]),
            "ms",
            f"{self._max_in_flight} prompts at once x {self.fresh_tokens:,} tokens / prefill rate / 2 (mean)",
            "first come, first served: tokens that wait to be prefilled / prefill rate",
        )

    def suggestions(self) -> Iterator[Figure]:
        """What to write into the engine's configuration and the limits."""
        shape = self.shape
        yield _exact(
            "max_num_seqs",
            shape.max_num_seqs,
            "sequences",
            "as given, or resident_sequences and at most 1024",
            "more than fit are preempted and computed again",
        )
        yield _exact(
            "max_num_batched_tokens",
            shape.max_num_batched_tokens,
            "tokens",
            "as given, or vLLM's default for LLM",
            "vllm 0.32.0: engine/arg_utils.py; upstream's Gemma 4 jobs on TPU use 4096",
        )
        if self.sizing.resident_sequences:
            yield _exact(
                "max_in_flight",
                self._max_in_flight,
                "documents",
                f"{self._batch} running + {self._prompts_per_step} that one step prefills, at most {MAX_IN_FLIGHT}",
                "enough that a step never lacks prompts, no more than that waits in the engine",
            )

    def work(self, price_per_hour: float | None, deadline_hours: float | None) -> Iterator[Figure]:
        """How long and for how much."""
        if not self._has_rates or self.sizing.resident_sequences == 0:
            return
        low, high = self._documents_per_hour
        yield _range(
            "documents_per_hour",
            (low, high),
            "documents/h",
            f"3600 / ({self.fresh_tokens:,} / prefill rate + {self.workload.output_tokens:,} / decode rate)",
            "prefill and decode share the engine",
        )
        if self.workload.num_documents is None:
            return
        hours = (self.workload.num_documents / high, self.workload.num_documents / low)
        documents = f"{self.workload.num_documents:,} documents"
        yield _range("hours", hours, "h", f"{documents} / documents_per_hour", "one engine, without its start")
        if price_per_hour is not None:
            costs = (hours[0] * price_per_hour, hours[1] * price_per_hour)
            yield _range("cost", costs, "currency", f"hours x {price_per_hour:g} an hour", "the price given")
        if deadline_hours is not None:
            yield _deadline(hours, deadline_hours)

    def _weights(self) -> Figure:
        layout, size = self.layout, self.shape.tensor_parallel_size
        padding = ""
        if layout.experts and self.machine.runtime == "tpu":
            padded = padded_expert_width(layout.experts.width, size)
            padding = f", experts' gate and up projections padded from {layout.experts.width} to {padded} wide"
        return _exact(
            "weights_bytes",
            self.sizing.weight_bytes,
            "bytes",
            f"{layout.num_parameters:,} parameters x {dtype_bytes('dtype', self.shape.dtype)} bytes{padding}",
            "config.json; tpu_inference 0.32.0: layers/common/process_weights/moe_weights.py"
            if padding
            else "config.json",
        )

    def _kv_ideal_token(self) -> Figure:
        layers = [layer for layer in self.layout.kv_layers if layer.sliding_window is None]
        return _exact(
            "kv_bytes_per_token_ideal",
            ideal_kv_bytes_per_token(self.layout, self.sizing.value_bytes),
            "bytes/token",
            f"2 x KV heads x head size x {self.sizing.value_bytes} bytes of {len(layers)} layers that see everything",
            "config.json",
        )

    def _kv_ideal_sequence(self) -> Figure:
        layers = [layer for layer in self.layout.kv_layers if layer.sliding_window is not None]
        tokens = self.workload.total_tokens
        return _exact(
            "kv_bytes_per_sequence_ideal",
            ideal_kv_bytes_per_sequence(self.layout, self.sizing.value_bytes, tokens),
            "bytes/sequence",
            f"2 x KV heads x head size x {self.sizing.value_bytes} bytes x window, of {len(layers)} layers with one",
            "config.json",
        )

    def _kv_token(self) -> Figure:
        growing = [layer for layer in self.layout.kv_layers if window_of(self.machine, self.layout, layer) is None]
        size = self.shape.tensor_parallel_size
        value = sum(layer_bytes_per_token(self.machine, layer, size, self.sizing.value_bytes) for layer in growing)
        tpu = self.machine.runtime == "tpu"
        return _exact(
            "kv_bytes_per_token",
            value,
            "bytes/token",
            f"{len(growing)} of {len(self.layout.kv_layers)} layers grow with the sequence, over {size} device(s); "
            f"heads copied, padded and packed as the runtime does",
            _TPU_KV if tpu else _VLLM_KV,
        )

    def _kv_pool(self) -> Figure:
        sizing, machine = self.sizing, self.machine
        if machine.kv_cache_bytes is not None:
            return _exact("kv_pool_bytes", sizing.pool_bytes, "bytes", "set aside for the KV cache", "as given")
        sources = {
            "tpu": f"worker/tpu_worker.py:512; {TPU_RESIDENT_SHARE} x weights are resident: measured 63.3 GiB of "
            "Gemma 4 26B-A4B on v6e-8, where this arithmetic gives 60.96",
            "cuda": "vllm 0.32.0: v1/worker/gpu_worker.py; what it profiles is a planning value",
            "cpu": "vllm 0.32.0: v1/worker/cpu_worker.py",
        }
        return _estimate(
            "kv_pool_bytes",
            max(0, sizing.pool_bytes),
            "bytes",
            f"{self.shape.tensor_parallel_size} x {byte_size(machine.hbm_bytes)} x {self.shape.gpu_memory_utilization} "
            f"- {byte_size(sizing.weight_bytes)} weights - {byte_size(sizing.overhead_bytes)} beside them",
            f"{sources[machine.runtime]}; {machine.source}",
        )

    def _kv_tokens(self) -> Figure:
        cache, length = self.sizing.kv_cache, self.shape.max_model_len
        return _estimate(
            "kv_tokens",
            cache.num_tokens(self.sizing.pool_bytes, length),
            "tokens",
            f"{cache.num_blocks(self.sizing.pool_bytes):,} blocks / {cache.blocks_per_sequence(length)} blocks of a "
            f"sequence of max_model_len x {length:,}",
            "as vLLM logs it: v1/core/kv_cache_utils.py get_kv_cache_capacity",
        )

    def _block_size(self) -> Figure:
        return _exact(
            "block_size",
            self.sizing.block_size,
            "tokens",
            "as given"
            if self.shape.block_size
            else f"from max_model_len={self.shape.max_model_len} and max_num_seqs={self.shape.max_num_seqs}",
            "tpu_inference 0.32.0: layers/vllm/backends/flash_attn.py get_page_size, get_min_page_size"
            if self.machine.runtime == "tpu"
            else "vllm 0.32.0: platforms/cpu.py:293, config/cache.py",
        )

    def _resident(self) -> Iterator[Figure]:
        cache, tokens = self.sizing.kv_cache, self.workload.total_tokens
        yield _estimate(
            "resident_sequences",
            self.sizing.resident_sequences,
            "sequences",
            f"{cache.num_blocks(self.sizing.pool_bytes):,} blocks, one kept by vLLM, / "
            f"{cache.blocks_per_sequence(tokens)} of a sequence of {tokens:,} tokens",
            _TPU_KV if self.machine.runtime == "tpu" else _VLLM_KV,
        )
        yield _estimate(
            "resident_sequences_ideal",
            self.sizing.resident_sequences_ideal,
            "sequences",
            f"the pool / (kv_bytes_per_token_ideal x {tokens:,} + kv_bytes_per_sequence_ideal)",
            "config.json",
        )

    def _compiled_shapes(self) -> Figure:
        tokens, requests = token_buckets(self.shape.max_num_batched_tokens), request_buckets(self.shape.max_num_seqs)
        return _exact(
            "compiled_shapes",
            len(tokens),
            "shapes",
            f"the model once for each of {tokens[0]} to {tokens[-1]} tokens (prompt length is none); sampling and "
            f"logits for {len(requests)} sequence counts come on top",
            "tpu_inference 0.32.0: runner/utils.py build_token_paddings, runner/compilation_manager.py",
        )

    @property
    def _has_rates(self) -> bool:
        return self.machine.bf16_flops > 0 and self.machine.hbm_bytes_per_s > 0

    @property
    def _peak_flops(self) -> float:
        return self.machine.bf16_flops * self.shape.tensor_parallel_size

    @cached_property
    def _flops_per_token(self) -> tuple[float, float]:
        """With and without the output projection for every token."""
        prompt, cached = self.workload.prompt_tokens, self.workload.prompt_tokens - self.fresh_tokens
        return (
            rates.prefill_flops_per_token(self.layout, prompt, cached),
            rates.prefill_flops_per_token(self.layout, prompt, cached, output_projection=False),
        )

    def _flops(self) -> Figure:
        usual, least = self._flops_per_token
        attention = usual - 2.0 * self.layout.active_parameters
        return Figure(
            name="prefill_flops_per_token",
            value=usual,
            low=least,
            high=usual,
            unit="FLOP/token",
            formula=f"2 x {self.layout.active_parameters:,} active parameters + {attention / 1e9:.2f} G of attention "
            f"at {self.workload.prompt_tokens:,} tokens; low: without the output projection, which only the last needs",
            source=_PALM,
            exact=True,
        )

    def _prefill_ceiling(self) -> Figure:
        usual, least = self._flops_per_token
        return Figure(
            name="prefill_ceiling_tokens_per_s",
            value=self._peak_flops / usual,
            low=self._peak_flops / usual,
            high=self._peak_flops / least,
            unit="tokens/s",
            formula=f"{self.shape.tensor_parallel_size} x {self.machine.bf16_flops / 1e12:g} TFLOP/s / "
            f"{usual / 1e9:.2f} GFLOP; high: {least / 1e9:.2f} GFLOP, without the output projection",
            source=self.machine.source,
            exact=True,
        )

    @cached_property
    def _prefill(self) -> tuple[float, float]:
        ceiling = self._peak_flops / self._flops_per_token[0]
        share = rates.prefill_share(self.layout)
        return share.low * ceiling, share.high * ceiling

    @property
    def _batch(self) -> int:
        """Sequences that decode together."""
        return min(self.shape.max_num_seqs, self.sizing.resident_sequences)

    @property
    def _context(self) -> int:
        """Tokens before a generated one, halfway through the output."""
        return self.workload.prompt_tokens + self.workload.output_tokens // 2

    @cached_property
    def _bytes_per_step(self) -> tuple[float, float]:
        """Of weights, and of all sequences' KV cache."""
        size = self.shape.tensor_parallel_size
        weights = rates.weight_bytes_read(
            self.layout, self.machine, size, dtype_bytes("dtype", self.shape.dtype), self._batch
        )
        cache = rates.kv_bytes_read(self.layout, self.machine, size, self.sizing.value_bytes, self._context)
        return weights, float(cache * self._batch)

    @cached_property
    def _decode_ceiling(self) -> float:
        seconds = rates.decode_step_seconds(
            bytes_read=sum(self._bytes_per_step),
            flops=self._batch * rates.decode_flops_per_token(self.layout, self._context),
            bytes_per_s=self.machine.hbm_bytes_per_s * self.shape.tensor_parallel_size,
            flops_per_s=self._peak_flops,
        )
        return self._batch / seconds

    @property
    def _decode(self) -> tuple[float, float]:
        share = rates.decode_share()
        return share.low * self._decode_ceiling, share.high * self._decode_ceiling

    def _decode_rates(self) -> Iterator[Figure]:
        weights, cache = self._bytes_per_step
        yield _estimate(
            "decode_ceiling_tokens_per_s",
            self._decode_ceiling,
            "tokens/s",
            f"{self._batch} sequences / ({byte_size(weights)} of weights + {byte_size(cache)} of KV cache a step / "
            f"{self.shape.tensor_parallel_size} x {self.machine.hbm_bytes_per_s / 1e9:g} GB/s)",
            f"roofline, experts evenly used; {self.machine.source}",
        )
        share = rates.decode_share()
        yield _range(
            "decode_tokens_per_s",
            self._decode,
            "tokens/s",
            f"{share.low:.0%} to {share.high:.0%} of the ceiling",
            share.source,
        )

    @property
    def _prompts_per_step(self) -> int:
        """A step starts no more than there are places to run in."""
        return min(-(-self.shape.max_num_batched_tokens // self.fresh_tokens), self._batch)

    @property
    def _max_in_flight(self) -> int:
        return min(self._batch + self._prompts_per_step, MAX_IN_FLIGHT)

    def _mean_ttft_ms(self, prefill_tokens_per_s: float) -> float:
        seconds = rates.mean_ttft_seconds(self._max_in_flight, self.fresh_tokens, prefill_tokens_per_s)
        return 1000.0 * seconds

    @property
    def _documents_per_hour(self) -> tuple[float, float]:
        low, high = (
            3600.0
            / rates.document_seconds(
                fresh_tokens=self.fresh_tokens,
                output_tokens=self.workload.output_tokens,
                prefill_tokens_per_s=prefill,
                decode_tokens_per_s=decode,
            )
            for prefill, decode in zip(self._prefill, self._decode, strict=True)
        )
        return low, high


def _deadline(hours: tuple[float, float], deadline_hours: float) -> Figure:
    low, high = hours
    return Figure(
        name="meets_deadline",
        value=1.0 if high <= deadline_hours else 0.0 if low > deadline_hours else None,
        low=float(high <= deadline_hours),
        high=float(low <= deadline_hours),
        unit="1 is yes",
        formula=f"{low:.2f} to {high:.2f} h against {deadline_hours:g} h",
        source="the deadline given",
        exact=False,
    )
