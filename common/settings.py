"""Every setting, read from the environment in one place.

`INGEST_<NAME>` sets the field `<name>` of `Settings`. Any other `INGEST_ENGINE_<NAME>` is handed to the engine as its
own argument `<name>`; the worker checks those against the engine. Any other `INGEST_*` variable stops the process.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from .errors import SettingsError
from .presets import TIERS

_PREFIX = "INGEST_"
_ENGINE_PREFIX = "INGEST_ENGINE_"

# Seconds: ten years. Redis would refuse some 292 million, in the middle of a script.
_MAX_TTL = 10 * 365 * 86400

# Documents that one worker may hold: one call of a script leases them all.
MAX_IN_FLIGHT = 4096

# Tokens and documents that are counted in Redis, over a fleet: what a Lua number and a C long hold on every machine.
MAX_COUNT = 2**31 - 1

# Milliseconds to a first token: one day. What lies beyond is none.
MAX_TTFT_MS = 86400e3

# Of queues, groups and tenants; "@" is what joins the two.
_NAME = r"^[A-Za-z0-9_.:-]+$"
_MAX_NAME_LENGTH = 128


class Settings(BaseModel):
    """All settings of producer and worker; one environment variable each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # --- both sides
    # Redis or Valkey. RQ's own variable, so that `rq` and `ingestq` agree.
    redis_url: str = "redis://localhost:6379/0"
    # The RQ queue.
    queue: str = Field(default="ingest", pattern=_NAME, max_length=_MAX_NAME_LENGTH)
    # Local folder or hub id of the model that the worker loads.
    model: str | None = None
    # The name by which requests ask for that model; default: `model` itself.
    model_name: str | None = None

    # --- producer
    # In whose turn documents run, unless `enqueue` says otherwise; None: in nobody's.
    tenant: str | None = Field(default=None, pattern=_NAME, max_length=_MAX_NAME_LENGTH)
    # What `enqueue` waits for: memory (the server has it), aof (its disk has it), replica (a replica has it).
    durability: Literal["memory", "aof", "replica"] = "memory"
    # UTF-8 bytes of one document's text. A 64 KB text costs 97 KB in Redis (measured, notes on RQ).
    max_text_bytes: int = Field(default=65536, ge=1, le=16 * 1024 * 1024)
    # Seconds that a finished row is kept: 7 days.
    result_ttl: int = Field(default=7 * 86400, ge=1, le=_MAX_TTL)
    # Seconds that a failed document is kept: one year, as in RQ.
    failure_ttl: int = Field(default=365 * 86400, ge=1, le=_MAX_TTL)
    # Seconds that a group's membership outlives its last change: 30 days.
    group_ttl: int = Field(default=30 * 86400, ge=60, le=_MAX_TTL)

    # --- worker
    engine: Literal["vllm", "simulated"] = "vllm"
    # A YAML file of vLLM's own argument names, such as those in deploy/engines; INGEST_ENGINE_* overrides its lines.
    engine_config: str | None = None
    # Whether a configuration that can't fit its machine stops the worker, or is only warned about.
    misfit: Literal["refuse", "warn"] = "refuse"
    # The machine that the engine runs on, such as v6e-4; default: what is found.
    chips: str | None = None
    # A profile file of the simulated engine (JSON); default: its built-in profile.
    simulated_profile: str | None = None
    # continuous: top the engine up while it steps. generate: plain waves of `LLM.generate`.
    feed: Literal["continuous", "generate"] = "continuous"
    # Where vLLM's engine core runs. The default was chosen by measurement (README, "Measured").
    core: Literal["in-process", "own-process"] = "in-process"
    # The tier of service (common/presets.py): what the four settings below are where they aren't set.
    preset: Literal["interactive", "standard", "batch", "long-context"] = "batch"
    # Documents that this worker may hold leases on. 0: the preset's ceiling, but no more than a tenth above the
    # engine's max_num_seqs, so that a free sequence always has a successor at hand.
    max_in_flight: int = Field(default=0, ge=0, le=MAX_IN_FLIGHT)
    # What the limit on documents in flight doesn't give way below, after preemptions and errors. 0: the preset's floor.
    min_in_flight: int = Field(default=0, ge=0, le=MAX_IN_FLIGHT)
    # Documents leased over all workers of the queue. 0: no bound.
    max_in_flight_fleet: int = Field(default=0, ge=0, le=MAX_COUNT)
    # KV tokens (of prompt and expected output) that this worker may have reserved. 0: what the engine's KV cache holds,
    # and a tenth more for those that wait for it.
    max_kv_tokens: int = Field(default=0, ge=0, le=MAX_COUNT)
    # KV tokens reserved over all workers of the queue. 0: no bound.
    max_kv_tokens_fleet: int = Field(default=0, ge=0, le=MAX_COUNT)
    # Milliseconds from the engine's add_request to the first token. None: the preset's; 0: no bound.
    ttft_sla_ms: float | None = Field(default=None, ge=0, le=MAX_TTFT_MS, allow_inf_nan=False)
    # Of the documents, the share for which that is to hold.
    ttft_percentile: float = Field(default=0.95, ge=0.5, le=0.999)
    # Of the tokens that a worker of several queues leases, the share of all but the first while they have documents.
    lower_share: float = Field(default=0.0, ge=0, lt=1)
    # Seconds after which the lease of a lost worker is taken over.
    lease_ttl: float = Field(default=60.0, ge=1.0, le=3600.0)
    # Workers that a document may take down with it, or lose, before it is failed.
    max_crashes: int = Field(default=3, ge=1, le=100)
    # Seconds that one engine step may take before the guardian kills the worker: a recompile takes minutes.
    step_timeout: float = Field(default=600.0, ge=1.0, le=86400.0)
    # Seconds from lease to result; a document that takes longer is aborted and failed (RQ's Retry applies).
    document_timeout: float = Field(default=3600.0, ge=1.0, le=7 * 86400.0)
    # Where the machine says that it is about to be preempted, in the form of Google's metadata server. Default: that
    # server on a Google machine, nothing elsewhere.
    preemption_url: str | None = None
    # Failures to start the engine, in a row, after which this machine's workers take no work.
    max_failures: int = Field(default=5, ge=1, le=1000)
    # What to do when prompt + max_tokens exceeds max_model_len: fail the document, or lower max_tokens to what fits.
    over_length: Literal["refuse", "clamp"] = "refuse"

    # `INGEST_ENGINE_*`, in the engine's own argument names.
    engine_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("min_in_flight")
    @classmethod
    def _floor_is_below_ceiling(cls, floor: int, info: ValidationInfo) -> int:
        # Fields are validated in their order: what is wrong already is missing here, and said by itself.
        if {"preset", "max_in_flight"} <= info.data.keys():
            tier = TIERS[info.data["preset"]]
            ceiling, whose = info.data["max_in_flight"], "INGEST_MAX_IN_FLIGHT"
            if not ceiling:
                ceiling, whose = tier.ceiling, f"the ceiling of INGEST_PRESET={tier.name}"
            if floor > ceiling:
                told = {"ceiling": ceiling, "whose": whose}
                raise PydanticCustomError("floor", "{whose} is {ceiling}; lower the one or raise the other", told)
        return floor

    @property
    def served_model(self) -> str:
        """The model name that requests carry.

        Raises:
            SettingsError: neither INGEST_MODEL nor INGEST_MODEL_NAME is set.
        """
        name = self.model_name or self.model
        if name is None:
            raise SettingsError("INGEST_MODEL is not set; set it to a local folder or a hub id")
        return name

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from `environ` (default: the process's environment).

        Raises:
            SettingsError: a variable is unknown (the nearest right one is named) or its value is malformed.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {"engine_args": {}}
        if "RQ_REDIS_URL" in environ:
            values["redis_url"] = environ["RQ_REDIS_URL"]
        for variable in sorted(name for name in environ if name.startswith(_PREFIX)):
            if variable.startswith(_ENGINE_PREFIX) and variable not in variables():
                values["engine_args"][variable.removeprefix(_ENGINE_PREFIX).lower()] = _scalar(environ[variable])
            else:
                values[_field_of(variable)] = environ[variable]
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("; ".join(_describe(item) for item in error.errors())) from None


def variables() -> dict[str, str]:
    """Every `INGEST_*` variable with its field name."""
    return {
        f"{_PREFIX}{name.upper()}": name for name in Settings.model_fields if name not in ("redis_url", "engine_args")
    }


def is_name(name: str) -> bool:
    """Whether a queue, a group or a tenant may be called that."""
    return len(name) <= _MAX_NAME_LENGTH and re.fullmatch(_NAME, name) is not None


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or where to look."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "the README lists every setting"


def _field_of(variable: str) -> str:
    known = variables()
    if variable not in known:
        # The one whose name is RQ's.
        hint = "did you mean RQ_REDIS_URL?" if variable == "INGEST_REDIS_URL" else nearest(variable, list(known))
        raise SettingsError(f"{variable} is not a setting; {hint}")
    return known[variable]


def _scalar(raw: str) -> Any:
    """JSON where it is JSON (numbers, booleans, null, objects), else the string itself."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(raw, raw)


def _describe(error: Any) -> str:
    field = str(error["loc"][0]) if error["loc"] else "settings"
    variable = "RQ_REDIS_URL" if field == "redis_url" else f"{_PREFIX}{field.upper()}"
    return f"{variable}={error['input']!r}: {error['msg']}"


@cache
def key_prefix() -> str:
    """RQ's own key prefix (`RQ_KEY_PREFIX`, default "rq"), read once as RQ does.

    Raises:
        SettingsError: it has characters that RQ refuses.
    """
    prefix = os.environ.get("RQ_KEY_PREFIX", "rq")
    if not re.fullmatch(r"[A-Za-z0-9_.:{}-]+", prefix):
        raise SettingsError(f"RQ_KEY_PREFIX={prefix!r}: only letters, digits and _ . : - {{ }} are allowed")
    return prefix
