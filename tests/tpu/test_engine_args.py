"""The shipped engine configurations, the article's, and our table of names, against vllm-tpu's own argument parser."""

from __future__ import annotations

import dataclasses
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs

from ingestq.common import engine_names
from ingestq.common.engine_config import EngineConfig, read_engine_config
from ingestq.common.errors import SettingsError
from ingestq.common.guard_rails import Target, apply_guard_rails
from ingestq.common.planner import capacity
from ingestq.common.planner.hardware import MACHINES
from support.models import save_tokenizer

TOP = Path(__file__).parents[2]
SHIPPED = sorted((TOP / "deploy" / "engines").glob("v*e-*.yaml"))
ARTICLE = TOP / "tests" / "data" / "article.yaml"
KNOWN = [field.name for field in dataclasses.fields(EngineArgs)]
V6E = Target(device="tpu", chips="v6e-4", is_multimodal=True)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Gemma 4 26B-A4B's config.json, and a tokenizer that is not its own; no weights are looked at."""
    folder = tmp_path_factory.mktemp("gemma-4-26b-a4b")
    save_tokenizer(folder)
    shutil.copy(str(files("ingestq.common.planner") / "models" / "gemma-4-26b-a4b.json"), folder / "config.json")
    return folder


@pytest.fixture
def tpu_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variables that belong to the files."""
    for line in (TOP / "deploy" / "engines" / "tpu.env").read_text().splitlines():
        if line and not line.startswith("#"):
            monkeypatch.setenv(*line.split("=", 1))
    monkeypatch.setenv("VLLM_XLA_CACHE_PATH", str(tmp_path))


def vllm_config(args: dict[str, Any], model: Path) -> Any:
    return EngineArgs(**{**args, "model": str(model)}).create_engine_config()


@pytest.mark.usefixtures("tpu_env")
@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_configuration_passes_the_real_runtimes_parser(
    file: Path, gemma4: Path, facts: dict[str, Any]
) -> None:
    asked = read_engine_config(file)
    EngineConfig(from_file=asked, from_env={}, file=file.name).check_names(KNOWN)
    args, lines = apply_guard_rails(asked, V6E)

    config = vllm_config(args, gemma4)

    assert (args, lines) == (asked, []), "what we ship needs no mending"
    assert config.device_config.device_type == "tpu"
    assert config.cache_config.cache_dtype == asked["kv_cache_dtype"]
    assert config.model_config.max_model_len == asked["max_model_len"]
    assert config.model_config.quantization is None
    assert config.scheduler_config.async_scheduling
    assert config.cache_config.block_size == capacity.block_size(
        MACHINES["v6e-8"], max_model_len=asked["max_model_len"], max_num_seqs=asked["max_num_seqs"]
    )
    facts["configs_checked"] = facts.get("configs_checked", 0) + 1


@pytest.mark.usefixtures("tpu_env")
@pytest.mark.parametrize(
    "file", sorted(set((TOP / "deploy" / "engines").glob("*.yaml")) - set(SHIPPED)), ids=lambda path: path.name
)
def test_a_configuration_for_other_machines_is_one_that_this_parser_takes_too(
    file: Path, gemma4: Path, facts: dict[str, Any]
) -> None:
    asked = read_engine_config(file)
    EngineConfig(from_file=asked, from_env={}, file=file.name).check_names(KNOWN)

    assert vllm_config(asked, gemma4).model_config.max_model_len == asked["max_model_len"]
    facts["configs_checked"] = facts.get("configs_checked", 0) + 1


def refused_names(args: dict[str, Any]) -> set[str]:
    """The arguments that EngineArgs does not take: it names one at a time."""
    refused: set[str] = set()
    while True:
        try:
            EngineArgs(**{name: value for name, value in args.items() if name not in refused})
        except TypeError as error:
            refused |= set(re.findall(r"unexpected keyword argument '(\w+)'", str(error)))
        else:
            return refused


def test_the_articles_configuration_is_refused_for_the_keys_that_our_check_names(facts: dict[str, Any]) -> None:
    args = read_engine_config(ARTICLE)
    with pytest.raises(SettingsError) as caught:
        EngineConfig(from_file=args, from_env={}, file="article.yaml").check_names(KNOWN)
    ours = set(re.findall(r"article\.yaml: (\w+) is no engine argument", str(caught.value)))

    refused = refused_names(args)

    assert ours == refused
    assert refused == {
        "speculative_decoding_method",
        "num_speculative_tokens",
        "swap_space",
        "compile_cache_max_size",
    }
    facts["article_keys_refused"] = sorted(refused)


@pytest.mark.usefixtures("tpu_env")
def test_what_our_check_leaves_of_the_article_passes(gemma4: Path) -> None:
    args = read_engine_config(ARTICLE)
    args = {name: value for name, value in args.items() if name not in refused_names(args)}
    mended, lines = apply_guard_rails(args, V6E)

    config = vllm_config(mended, gemma4)

    assert config.cache_config.cache_dtype == "fp8_e5m2"
    assert any("fp8_e5m2" in line for line in lines)


def test_names_that_we_call_gone_are_gone_and_no_other() -> None:
    assert not set(engine_names.gone()) & set(KNOWN)


@pytest.mark.usefixtures("tpu_env")
def test_the_articles_speculation_as_vllm_spells_it_turns_async_scheduling_off(gemma4: Path) -> None:
    """Why `ngram` is not to be had without saying so."""
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}

    config = vllm_config({"tensor_parallel_size": 4, "max_model_len": 4096, "speculative_config": ngram}, gemma4)

    assert not config.scheduler_config.async_scheduling


@pytest.mark.usefixtures("tpu_env")
def test_an_int8_kv_cache_is_refused_by_both(gemma4: Path) -> None:
    with pytest.raises(SettingsError, match="kv_cache_dtype='int8'"):
        apply_guard_rails({"kv_cache_dtype": "int8"}, V6E)

    with pytest.raises(ValueError, match="int8"):
        vllm_config({"max_model_len": 4096, "kv_cache_dtype": "int8"}, gemma4)
