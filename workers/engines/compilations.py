"""`Compilations`: how many graphs this process has compiled. After the warm-up there should be no more of them."""

from __future__ import annotations

import threading
from typing import Any

# What JAX reports for each executable that XLA compiles or takes from its cache on disk (jax/_src/dispatch.py,
# BACKEND_COMPILE_EVENT; jax 0.11.2). A shape that is known in this process makes none.
_JAX_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts compilations in this process, from now on (JAX) or from its start (torch)."""

    def __init__(self, device: str) -> None:
        """Args:
        device: vLLM's `device_type`; "tpu" is JAX, everything else torch.
        """
        self._lock = threading.Lock()
        self._num_jax = 0
        self._is_jax = device == "tpu"
        if self._is_jax:
            from jax import monitoring

            monitoring.register_event_duration_secs_listener(self._on_jax_event)

    def _on_jax_event(self, event: str, duration: float, **kwargs: Any) -> None:
        if event == _JAX_COMPILED:
            with self._lock:
                self._num_jax += 1

    @property
    def num(self) -> int:
        """Graphs so far. Of torch, those that Dynamo traced; kernels that Triton compiles by itself are not seen."""
        if self._is_jax:
            return self._num_jax
        from torch._dynamo.utils import counters

        return int(counters.get("stats", {}).get("unique_graphs", 0))
