from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from ingestq.common.errors import SettingsError
from ingestq.common.settings import Settings, is_name, variables


def test_every_variable_sets_its_field() -> None:
    settings = Settings.from_env({"INGEST_QUEUE": "night", "INGEST_RESULT_TTL": "60", "INGEST_LEASE_TTL": "2.5"})

    assert (settings.queue, settings.result_ttl, settings.lease_ttl) == ("night", 60, 2.5)
    assert set(variables().values()) == set(Settings.model_fields) - {"redis_url", "engine_args"}


def test_rows_are_kept_seven_days_and_failures_a_year_by_default() -> None:
    assert Settings.from_env({}).result_ttl == 7 * 24 * 3600
    assert Settings.from_env({}).failure_ttl == 365 * 24 * 3600


def test_redis_is_where_rq_looks_for_it() -> None:
    assert Settings.from_env({"RQ_REDIS_URL": "redis://there:1/2"}).redis_url == "redis://there:1/2"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("INGEST_RESULTS_TTL", "INGEST_RESULT_TTL"),
        ("INGEST_MAX_INFLIGHT", "INGEST_MAX_IN_FLIGHT"),
        ("INGEST_QUEUES", "INGEST_QUEUE"),
        ("INGEST_REDIS_URL", "RQ_REDIS_URL"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_named(variable: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{variable} is not a setting; did you mean {nearest}\?$"):
        Settings.from_env({variable: "1"})


def test_an_unknown_variable_like_no_other_is_refused_too() -> None:
    with pytest.raises(SettingsError, match="INGEST_ZZZZZZZZZZZZ is not a setting"):
        Settings.from_env({"INGEST_ZZZZZZZZZZZZ": "1"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("INGEST_RESULT_TTL", "seven days"),
        ("INGEST_RESULT_TTL", "0"),
        ("INGEST_RESULT_TTL", ""),
        ("INGEST_FEED", "waves"),
        ("INGEST_LEASE_TTL", "nan"),
        ("INGEST_QUEUE", "a b"),
        ("INGEST_MAX_CRASHES", "-1"),
        ("INGEST_RESULT_TTL", "9" * 18),
        ("INGEST_FAILURE_TTL", "9" * 18),
        ("INGEST_GROUP_TTL", "9" * 18),
        ("INGEST_MAX_IN_FLIGHT_FLEET", "9" * 18),
        ("INGEST_MAX_KV_TOKENS", "-1"),
        ("INGEST_MAX_KV_TOKENS_FLEET", "9" * 18),
        ("INGEST_PRESET", "best"),
        ("INGEST_TTFT_SLA_MS", "nan"),
        ("INGEST_TTFT_SLA_MS", "-1"),
        ("INGEST_TTFT_PERCENTILE", "95"),
        ("INGEST_LOWER_SHARE", "1"),
        ("INGEST_TENANT", "a@b"),
    ],
)
def test_a_malformed_value_is_refused_with_variable_and_value(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{variable}='{value}': "):
        Settings.from_env({variable: value})


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"INGEST_MAX_IN_FLIGHT": "50"}, "INGEST_MAX_IN_FLIGHT is 50"),
        ({"INGEST_PRESET": "interactive"}, "the ceiling of INGEST_PRESET=interactive is 8"),
    ],
)
def test_a_floor_above_the_ceiling_is_refused_with_both(settings: dict[str, str], bound: str) -> None:
    with pytest.raises(SettingsError, match=rf"^INGEST_MIN_IN_FLIGHT='51': {bound}; lower the one or raise the other$"):
        Settings.from_env({**settings, "INGEST_MIN_IN_FLIGHT": "51"})


def test_a_limit_below_the_presets_floor_is_no_contradiction() -> None:
    # Hard limits come before the floor.
    assert Settings.from_env({"INGEST_PRESET": "batch", "INGEST_MAX_IN_FLIGHT": "8"}).max_in_flight == 8
    assert Settings.from_env({"INGEST_MIN_IN_FLIGHT": "8", "INGEST_MAX_IN_FLIGHT": "8"}).min_in_flight == 8


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("ingest-high", True), ("a:b.c_d", True), ("", False), ("a@b", False), ("a\n", False), ("a" * 129, False)],
)
def test_queues_and_tenants_have_plain_names(name: str, is_one: bool) -> None:
    assert is_name(name) is is_one


def test_a_setting_given_in_code_is_checked_as_well() -> None:
    with pytest.raises(ValidationError, match="result_tll"):
        Settings(result_tll=5)


def test_engine_variables_pass_through_under_the_engines_own_names() -> None:
    settings = Settings.from_env(
        {
            "INGEST_ENGINE": "simulated",
            "INGEST_ENGINE_MAX_MODEL_LEN": "4096",
            "INGEST_ENGINE_ENFORCE_EAGER": "True",
            "INGEST_ENGINE_KV_CACHE_DTYPE": "fp8",
            "INGEST_ENGINE_HF_OVERRIDES": '{"num_layers": 2}',
        }
    )

    assert settings.engine == "simulated"
    assert settings.engine_args == {
        "max_model_len": 4096,
        "enforce_eager": True,
        "kv_cache_dtype": "fp8",
        "hf_overrides": {"num_layers": 2},
    }


def test_the_served_name_is_the_models_unless_it_has_one_of_its_own() -> None:
    assert Settings(model="org/model").served_model == "org/model"
    assert Settings(model="folder", model_name="name").served_model == "name"
    with pytest.raises(SettingsError, match="INGEST_MODEL is not set"):
        _ = Settings().served_model


def test_a_key_prefix_that_rq_would_refuse_stops_the_process() -> None:
    code = "from ingestq.common.settings import key_prefix; key_prefix()"
    environment = {"RQ_KEY_PREFIX": "a b"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode != 0
    assert "RQ_KEY_PREFIX='a b'" in ended.stderr
