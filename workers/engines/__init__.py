"""Engines behind one protocol (`base.Engine`): vLLM, and a simulated one for scale, faults and speed."""

from __future__ import annotations

from ...common.settings import Settings
from .base import Engine


def load_engine(settings: Settings) -> Engine:
    """Builds the engine that the settings name; takes seconds to minutes, and the memory of the model.

    Raises:
        SettingsError: an engine argument is unknown or refused; the message names the nearest right one.
    """
    # Imported here because each costs what it needs: vLLM takes tens of seconds to import.
    if settings.engine == "simulated":
        from .simulated_engine import SimulatedEngine

        return SimulatedEngine.from_settings(settings)
    from .vllm_engine import VllmEngine

    return VllmEngine.from_settings(settings)
