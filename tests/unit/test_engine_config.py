"""The engine's YAML, and the names in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ingestq.common.engine_config import MAX_BYTES, load_engine_config, read_engine_config, with_model
from ingestq.common.engine_names import gone, instead
from ingestq.common.errors import SettingsError
from ingestq.common.guard_rails import Target, apply_guard_rails
from ingestq.common.settings import Settings

ROOT = Path(__file__).parents[2]
ENGINES = sorted((ROOT / "deploy" / "engines").glob("*.yaml"))
ARTICLE = ROOT / "tests" / "data" / "article.yaml"

# Some of `vllm.EngineArgs`; tests/acceptance/test_engine_arguments.py takes all of them from vLLM itself.
KNOWN = [
    "model",
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "tensor_parallel_size",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "speculative_config",
    "gpu_memory_utilization",
    "enforce_eager",
    "watermark",
    "disable_log_stats",
    "spec_method",
]


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "engine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --- reading


def test_a_file_is_read_in_vllms_own_names(tmp_path: Path) -> None:
    path = written(tmp_path, "max_num_seqs: 128  # why\nhf_overrides: {a: [1, null, 0.5]}\nenforce_eager: true\n")

    assert read_engine_config(path) == {
        "max_num_seqs": 128,
        "hf_overrides": {"a": [1, None, 0.5]},
        "enforce_eager": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seqs: 1\nmax_num_seqs: 2\n", "max_num_seqs is there 2 times; leave one"),
        ("a: {b: 1, b: 2}\n", "b is there 2 times"),
        ("a: &x [1]\nb: *x\n", "aliases .* are not read; write the value out"),
        ("- max_num_seqs\n", "a mapping of engine arguments is expected"),
        ("", "a mapping of engine arguments is expected"),
        ("on: 3\n", "True is not a name; quote it"),
        ("a: {1: 2}\n", "1 is not a name"),
        ("a: 2026-11-24\n", "2026-11-24 is a date; quote it"),
        ("a: !!set {b}\n", "is a set"),
        ("a: !!binary aGk=\n", "is a bytes"),
        ("[" * 5000, "nested more than 16 deep"),
        ("a: " + "[" * 40 + "]" * 40, "nested more than 16 deep"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: [1\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        (b"\xff\xfe\x00", "unacceptable character|truncated"),
        ("? [a]\n: 1\n", "unhashable"),
        ("model: 3\n", "model=3: a local folder or a hub id is expected"),
        ("a: " + "x" * MAX_BYTES, f"more than {MAX_BYTES} bytes"),
    ],
)
def test_what_is_no_mapping_of_arguments_is_refused_in_one_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = written(tmp_path, text)

    with pytest.raises(SettingsError, match=message) as refusal:
        read_engine_config(path)
    assert str(refusal.value).startswith(f"INGEST_ENGINE_CONFIG={path!r}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", ["/nowhere/engine.yaml", "/", "/dev/zero", "a\0b"])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(SettingsError, match=r"^INGEST_ENGINE_CONFIG="):
        read_engine_config(path)


# --- merging


def test_a_variable_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "max_num_seqs: 128\nmax_model_len: 4608\n")
    settings = Settings.from_env({"INGEST_ENGINE_CONFIG": path, "INGEST_ENGINE_MAX_NUM_SEQS": "8"})

    assert settings.engine_args == {"max_num_seqs": 8}
    assert load_engine_config(settings).args == {"max_num_seqs": 8, "max_model_len": 4608}


def test_without_a_file_the_arguments_are_those_of_the_variables() -> None:
    assert load_engine_config(Settings(engine_args={"max_num_seqs": 8})).args == {"max_num_seqs": 8}


def test_the_files_model_counts_where_no_variable_names_one(tmp_path: Path) -> None:
    path = written(tmp_path, "model: org/of-the-file\n")

    assert with_model(Settings(engine_config=path)).served_model == "org/of-the-file"
    assert with_model(Settings(engine_config=path, model="folder")).served_model == "folder"
    assert with_model(Settings(engine_config=path, model_name="name")).served_model == "name"
    with pytest.raises(SettingsError, match="INGEST_MODEL is not set"):
        _ = with_model(Settings(engine_config=written(tmp_path, "max_num_seqs: 1"))).served_model


# --- names


def test_the_articles_file_gets_one_error_that_lists_each_wrong_key_and_what_to_write() -> None:
    with pytest.raises(SettingsError) as refusal:
        load_engine_config(Settings(engine_config=str(ARTICLE))).check_names(KNOWN)

    message = str(refusal.value)
    assert re.findall(r"article\.yaml: (\w+) is no engine argument of vLLM", message) == [
        "speculative_decoding_method",
        "num_speculative_tokens",
        "swap_space",
        "compile_cache_max_size",
    ]
    assert "speculative_config: {method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}" in message
    assert "async_scheduling: false" in message
    assert "no longer swaps" in message
    assert "VLLM_XLA_CACHE_PATH" in message
    assert "\n" not in message


def test_each_wrong_name_is_told_by_where_it_is_from(tmp_path: Path) -> None:
    path = written(tmp_path, "max_num_seq: 128\nmax-model-len: 1\nzzzzzz: 1\n")
    settings = Settings(engine_config=path, engine_args={"kv_cache_dtyp": "fp8"})

    with pytest.raises(SettingsError) as refusal:
        load_engine_config(settings).check_names(KNOWN)
    assert str(refusal.value).split("; ") == [
        "engine.yaml: max_num_seq is no engine argument of vLLM",
        "did you mean max_num_seqs?",
        "engine.yaml: max-model-len is no engine argument of vLLM",
        "write max_model_len",
        "engine.yaml: zzzzzz is no engine argument of vLLM",
        "it is like none of them (see vllm.EngineArgs)",
        "INGEST_ENGINE_KV_CACHE_DTYP is no engine argument of vLLM",
        "did you mean kv_cache_dtype?",
    ]


def test_what_is_not_the_users_to_set_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path, "disable_log_stats: true\nmodel: org/model\n")

    with pytest.raises(SettingsError, match=r"^engine.yaml: disable_log_stats: leave it out"):
        load_engine_config(Settings(engine_config=path)).check_names(KNOWN)
    with pytest.raises(SettingsError, match=r"^INGEST_ENGINE_MODEL: set INGEST_MODEL$"):
        load_engine_config(Settings(engine_args={"model": "x"})).check_names(KNOWN)


@pytest.mark.parametrize("name", sorted(gone()))
def test_every_name_that_is_gone_says_what_to_do(name: str) -> None:
    assert re.match(r"(leave it out|write|set)\b", instead(name, KNOWN))
    assert ";" not in instead(name, KNOWN)  # which separates one wrong name from the next


# --- the files that are shipped


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_a_shipped_file_is_read_and_no_guard_rail_minds_it(path: Path) -> None:
    target = {"gpu": Target(device="cuda", chips="h100-1"), "cpu": Target(device="cpu", chips="cpu")}.get(
        path.stem, Target(device="tpu", chips=path.stem[:5], is_multimodal=True)
    )
    args = read_engine_config(path)

    assert apply_guard_rails(args, target) == (args, [])


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_each_line_of_a_shipped_file_has_its_reason_there_or_in_the_file_that_it_names(path: Path) -> None:
    explained = _explained(path)
    for other in set(re.findall(r"[\w-]+\.yaml", path.read_text())):
        explained |= _explained(path.parent / other)

    assert set(read_engine_config(path)) <= explained


def _explained(path: Path) -> set[str]:
    """The keys with a comment above them, or above the lines that directly precede them."""
    explained, commented = set(), False
    for line in path.read_text().splitlines():
        if not line.strip():
            commented = False
        elif line.startswith("#"):
            commented = True
        elif commented:
            explained.add(line.partition(":")[0])
    return explained


def test_the_environment_of_the_tpu_files_is_read_by_systemd_and_by_a_shell() -> None:
    lines = (ROOT / "deploy" / "engines" / "tpu.env").read_text().splitlines()

    assert all(re.fullmatch(r"(#.*|[A-Z_]+=[A-Za-z0-9_/.-]+)?", line) for line in lines)
    assert {line.partition("=")[0] for line in lines if line and line[0] != "#"} == {
        "MODEL_IMPL_TYPE",
        "USE_BATCHED_RPA_KERNEL",
        "VLLM_XLA_CACHE_PATH",
    }
