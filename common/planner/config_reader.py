"""`ConfigReader`: a model's config.json, each value checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnknownLayout

# Above any model's number; keeps arithmetic on a hostile file small.
_MAX_INTEGER = 2**40


class ConfigReader:
    """One mapping of a config.json. Keys without a default are required; None counts as missing."""

    def __init__(self, values: Mapping[str, Any], name: str, path: str = "") -> None:
        self.values = values
        self.name = name
        self._path = path

    def unknown(self, reason: str) -> UnknownLayout:
        """The error to raise: `reason` says what isn't understood and what to do."""
        return UnknownLayout(self.name, f"{self._path}{reason}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number from `minimum` up."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= _MAX_INTEGER:
            raise self.unknown(f"{key}={value!r} is not a whole number from {minimum} to {_MAX_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number from 1 up."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1 <= value <= _MAX_INTEGER:
            raise self.unknown(f"{key}={value!r} is not a number from 1 to {_MAX_INTEGER}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number, or None where the key is missing or null."""
        return None if self.values.get(key) is None else self.integer(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.unknown(f"{key}={value!r} is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.unknown(f"{key}={value!r} is not a text")
        return value

    def integers(self, key: str, default: list[int] | None = None) -> list[int]:
        """A list of whole numbers from 0 up."""
        value = self._get(key, default)
        if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
            raise self.unknown(f"{key}={value!r} is not a list of whole numbers")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of texts, or None where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.unknown(f"{key}={value!r} is not a list of texts")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """A mapping within this one, or None where the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.unknown(f"{key}={value!r} is not a mapping")
        return ConfigReader(value, self.name, f"{self._path}{key}: ")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.unknown(f"{key} is missing; give the model's complete config.json")
        return value
