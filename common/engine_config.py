"""`EngineConfig`: the engine arguments of a YAML file (INGEST_ENGINE_CONFIG) with INGEST_ENGINE_* laid over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .engine_names import RESERVED, instead
from .errors import SettingsError
from .settings import Settings

# Bytes of a file: the shipped ones have 3,000 at most.
MAX_BYTES = 65536

# Mappings and lists inside one another: vLLM's arguments need three.
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Engine arguments in vLLM's own names, and where each is from."""

    # Of the file; `model` may be among them.
    from_file: Mapping[str, Any]
    # Of INGEST_ENGINE_*.
    from_env: Mapping[str, Any]
    # The file's name, for messages.
    file: str

    @property
    def args(self) -> dict[str, Any]:
        """The arguments; a variable overrides the file."""
        return {**self.from_file, **self.from_env}

    def origin(self, name: str) -> str:
        """How a message calls an argument."""
        return f"INGEST_ENGINE_{name.upper()}" if name in self.from_env else f"{self.file}: {name}"

    def check_names(self, known: Collection[str]) -> None:
        """Passes if every argument is vLLM's, and the user's to set.

        Args:
            known: the names of `vllm.EngineArgs`.

        Raises:
            SettingsError: names each that is not, with what to write instead.
        """
        problems = []
        for name in self.args:
            if name in RESERVED and not (name == "model" and name not in self.from_env):
                problems.append(f"{self.origin(name)}: {RESERVED[name]}")
            elif name not in known:
                problems.append(f"{self.origin(name)} is no engine argument of vLLM; {instead(name, known)}")
        if problems:
            raise SettingsError("; ".join(problems))


def load_engine_config(settings: Settings) -> EngineConfig:
    """The arguments of the settings' file and of their variables; names are not checked.

    Raises:
        SettingsError: the file can't be read or is not such a file.
    """
    path = settings.engine_config
    return EngineConfig(
        from_file=read_engine_config(path) if path is not None else {},
        from_env=settings.engine_args,
        file=Path(path).name if path is not None else "",
    )


def with_model(settings: Settings) -> Settings:
    """The settings, with the file's `model` where INGEST_MODEL names none.

    Raises:
        SettingsError: the file can't be read or is not such a file.
    """
    if settings.model is not None or settings.engine_config is None:
        return settings
    model = read_engine_config(settings.engine_config).get("model")
    return settings if model is None else settings.model_copy(update={"model": model})


def read_engine_config(path: str | Path) -> dict[str, Any]:
    """The arguments in a YAML file: one mapping of names to what JSON can say; names are not checked.

    Raises:
        SettingsError: it can't be read, is over MAX_BYTES, or is not such a mapping.
    """
    try:
        if not Path(path).is_file():
            raise SettingsError(_of(path, "there is no such file; deploy/engines has some to start from"))
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SettingsError(_of(path, str(error))) from None
    if len(raw) > MAX_BYTES:
        raise SettingsError(_of(path, f"it has more than {MAX_BYTES} bytes, the bound for engine arguments"))
    try:
        return _parsed(raw)
    except RecursionError:
        raise SettingsError(_of(path, f"it is nested more than {_MAX_DEPTH} deep")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(_of(path, " ".join(str(error).split()))) from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Refuses what only misleads here: a key written twice (the last would win), aliases (they can explode)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for name, times in Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise ValueError(f"{name} is there {times} times; leave one")
        return super().construct_mapping(node, deep)


def _parsed(raw: bytes) -> dict[str, Any]:
    """Raises: yaml.YAMLError, ValueError, RecursionError."""
    values = yaml.load(raw, _Loader)
    _check_plain(values)
    if not isinstance(values, dict):
        raise ValueError("a mapping of engine arguments is expected, such as max_num_seqs: 128")
    if not isinstance(values.get("model", ""), str):
        raise ValueError(f"model={values['model']!r}: a local folder or a hub id is expected")
    return values


def _check_plain(value: Any, depth: int = 0) -> None:
    """Passes if JSON could say it: YAML also makes dates, sets and bytes, and keys that are no names."""
    if depth > _MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is not a name; quote it if it is meant as one")
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _check_plain(inner, depth + 1)
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{value} is a {type(value).__name__}; quote it if it is meant as text")


def _of(path: str | Path, what: str) -> str:
    return f"INGEST_ENGINE_CONFIG={str(path)!r}: {what}"
