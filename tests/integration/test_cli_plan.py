"""`ingestq plan` as people and scripts use it: real pages, no Redis, exit codes."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers

from ingestq.common.settings import Settings
from ingestq.producer.article import TEMPLATE
from ingestq.producer.cli import main
from support.processes import BIN, environment

PAGES = Path(__file__).parents[2] / "deploy" / "demo" / "documents"
SHIPPED = PAGES.parents[2] / "common" / "planner" / "models"
GEMMA = ["--model", "gemma-4-26b-a4b", "--chips", "v6e-4"]
LONG = ["--prompt-tokens", "16384"]
# Nobody listens there: the command must not ask.
NO_REDIS = "redis://127.0.0.1:1/0"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, but for its start: most of its second is imports."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("INGEST_")]:
        monkeypatch.delenv(name)

    def run_command(*arguments: Any, stdin: str = "", **variables: str) -> Result:
        variables = {"RQ_REDIS_URL": NO_REDIS, "COLUMNS": "120", **variables}
        done = CliRunner().invoke(main, ["plan", *map(str, arguments)], input=stdin, env=variables)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        return done

    return run_command


def figures_of(done: Result) -> dict[str, dict[str, Any]]:
    assert done.stdout, done.stderr
    return {figure["name"]: figure for figure in orjson.loads(done.stdout)["figures"]}


def assert_one_clear_line(done: Result, *told: str) -> None:
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(("ingestq: ", "Error: "))
    for word in told:
        assert word in last


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer that makes a token of each word."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


# --- the report


def test_the_installed_command_makes_a_plan_without_redis():
    command = [BIN / "ingestq", "plan", *GEMMA, *LONG]
    done = subprocess.run(command, env=environment(NO_REDIS), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FITS" in done.stdout


def test_a_plan_says_whether_it_fits_and_gives_every_figure_its_formula_and_source(run):
    done = run(
        *GEMMA, *LONG, "--kv-cache-dtype", "fp8", "--documents", 10_000, "--price-per-hour", 10, "--deadline", 24
    )
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gemma-4-26b-a4b on v6e-4: ")
    assert any(line.lstrip().startswith("FITS") for line in lines)
    for section in ("MEMORY", "SPEED", "SETTINGS", "JOB", "SOURCES"):
        assert section in lines
    cited = {int(number) for line in lines for number in re.findall(r" \[(\d+)\]$", line)}
    listed = {int(number) for line in lines for number in re.findall(r"^\[(\d+)\] \S", line)}
    assert cited == listed == set(range(1, len(listed) + 1))
    assert max(map(len, lines)) <= 120


def test_the_report_fits_a_narrow_terminal(run):
    for arguments in ([PAGES, *GEMMA, "--preset", "standard"], ["--article"]):
        done = run(*arguments, COLUMNS="80")
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_json_has_everything_in_base_units(run):
    done = run(*GEMMA, *LONG, "--kv-cache-dtype", "fp8", "--json")
    report = orjson.loads(done.stdout)
    assert report["fits"] is True
    assert report["workload"]["prompt_tokens"] == 16384
    assert report["shape"]["kv_cache_dtype"].startswith("fp8")
    assert all(None not in (figure["formula"], figure["source"], figure["unit"]) for figure in report["figures"])
    figures = figures_of(done)
    assert figures["kv_bytes_per_token"]["value"] == 143_360
    assert figures["kv_bytes_per_token_ideal"]["value"] == 10_240


def test_nothing_in_the_text_is_missing_from_the_json(run):
    arguments = [*GEMMA, *LONG, "--documents", "7", "--price-per-hour", "3", "--deadline", "2"]
    text = run(*arguments).stdout
    for figure in figures_of(run(*arguments, "--json")).values():
        assert figure["formula"].split()[0] in text


@pytest.mark.parametrize("prompt_tokens", [1, 1000, 100_000])
def test_what_it_says_to_set_are_settings_and_give_the_same_plan(run, prompt_tokens):
    length = ["--prompt-tokens", prompt_tokens]
    text = run(*GEMMA, *length, "--kv-cache-dtype", "fp8").stdout
    variables = dict(re.findall(r"(INGEST_[A-Z_]+)=(\S+)", text))
    settings = Settings.from_env(variables)
    assert settings.max_in_flight > 0
    again = orjson.loads(run(*GEMMA, *length, "--json", **variables).stdout)
    assert again["shape"] == orjson.loads(run(*GEMMA, *length, "--kv-cache-dtype", "fp8", "--json").stdout)["shape"]
    assert settings.engine_args.items() <= again["shape"].items()


def test_the_readme_shows_what_the_command_prints(run):
    readme = (PAGES.parents[2] / "README.md").read_text()
    [(command, shown)] = re.findall(r"\$ ingestq plan (deploy.*?[^\\])\n(.*?)\n  \.\.\.\n", readme, re.DOTALL)
    arguments = command.replace("\\", "").replace("deploy/demo/documents", str(PAGES)).split()
    assert run(*arguments).stdout.startswith(shown)


# --- real documents


def test_documents_are_counted_by_the_models_tokenizer(run, words):
    done = run(PAGES, *GEMMA, "--tokenizer", words, "--json")
    assert done.exit_code == 0
    report = orjson.loads(done.stdout)
    counts = report["documents"]
    assert counts["exact"] is True
    assert counts["low"]["sum"] == counts["high"]["sum"] > 2_000
    assert report["workload"]["num_documents"] == counts["num_documents"]
    assert report["workload"]["prompt_tokens"] == -(-counts["high"]["sum"] // counts["num_documents"])
    assert report["shape"]["max_model_len"] >= counts["high"]["max"] + 256


def test_without_a_tokenizer_the_range_is_told_and_how_to_get_the_count(run):
    done = run(PAGES, *GEMMA)
    assert done.exit_code == 0
    assert "estimated from bytes" in done.stdout
    assert "--tokenizer PATH" in " ".join(done.stdout.split())


def test_files_are_a_sample_where_the_number_of_documents_is_given(run):
    report = orjson.loads(run(PAGES / "auth-peer.html", *GEMMA, "--documents", 5000, "--json").stdout)
    assert report["documents"]["num_documents"] == 1
    assert report["workload"]["num_documents"] == 5000


def test_the_instruction_that_documents_share_is_planned_as_a_cached_prefix(run, words):
    arguments = [PAGES, *GEMMA, "--tokenizer", words, "--instruction", "Summarize in two sentences.", "--json"]
    assert orjson.loads(run(*arguments).stdout)["workload"]["shared_prefix_tokens"] == 4


def test_a_document_that_enqueue_would_refuse_is_named_and_left_out(run, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    (tmp_path / "c.txt").write_text("x" * 101)
    done = run(".", *GEMMA, "--json", INGEST_MAX_TEXT_BYTES="100")
    assert done.exit_code == 1
    assert orjson.loads(done.stdout)["documents"]["num_documents"] == 1
    assert "refused: document './b.pdf'" in done.stderr
    assert "raise INGEST_MAX_TEXT_BYTES" in done.stderr


def test_documents_that_leave_no_room_for_their_output_are_counted(run, words):
    row = orjson.dumps({"text": "word " * 200}).decode()
    limits = ["--max-model-len", 150, "--output-tokens", 10]
    done = run("-", *GEMMA, "--tokenizer", words, *limits, stdin=f'{row}\n{{"text": "short"}}\n')
    assert done.exit_code == 1
    assert "1 of 2 documents leave no room for their output in max_model_len 150" in " ".join(done.stdout.split())


# --- who has the say


def test_an_option_goes_before_a_variable_before_the_file_before_the_preset(run, tmp_path):
    (tmp_path / "engine.yaml").write_text("max_num_seqs: 3\nmax_num_batched_tokens: 2048\nkv_cache_dtype: bfloat16\n")
    arguments = [*GEMMA, *LONG, "--preset", "interactive", "--engine-config", "engine.yaml", "--json"]
    variables = {"INGEST_ENGINE_MAX_NUM_BATCHED_TOKENS": "4096"}
    shape = orjson.loads(run(*arguments, "--kv-cache-dtype", "fp8_e5m2", **variables).stdout)["shape"]
    assert shape["max_num_seqs"] == 3
    assert shape["max_num_batched_tokens"] == 4096
    assert shape["kv_cache_dtype"] == "fp8_e5m2"


def test_model_and_machine_may_come_from_the_workers_settings(run):
    done = run(*LONG, INGEST_MODEL="google/gemma-4-26B-A4B-it", INGEST_CHIPS="v6e-4")
    assert done.exit_code == 0
    assert "v6e-4" in done.stdout.splitlines()[0]


def test_a_file_with_arguments_that_vllm_lacks_does_not_start(run, tmp_path):
    (tmp_path / "engine.yaml").write_text("swap_space: 4\nmax_num_seqs: 8\n")
    done = run(*GEMMA, *LONG, "--engine-config", "engine.yaml")
    assert done.exit_code == 6
    assert "DOES NOT START" in done.stdout
    assert "engine.yaml: swap_space is no engine argument of vLLM; leave it out" in " ".join(done.stdout.split())


def test_the_articles_own_configuration_is_told_key_by_key(run, tmp_path):
    (tmp_path / "article.yaml").write_text("".join(f"{key}: {value}\n" for key, value in TEMPLATE.items()))
    done = run("--chips", "v6e-4", *LONG, "--engine-config", "article.yaml", "--json")
    assert done.exit_code == 6
    told = orjson.loads(done.stdout)["problems"]
    wrong = ["speculative_decoding_method", "num_speculative_tokens", "swap_space", "compile_cache_max_size"]
    assert [problem.split()[1] for problem in told] == wrong


@pytest.mark.parametrize("preset", ["interactive", "standard", "batch", "long-context"])
def test_every_preset_makes_a_plan(run, preset):
    length = [] if preset == "long-context" else LONG
    done = run(*GEMMA, *length, "--preset", preset, "--json")
    report = orjson.loads(done.stdout)
    assert report["preset"]["name"] == preset
    assert report["shape"]["kv_cache_dtype"].startswith("fp8")
    assert report["preset"]["max_num_seqs"] in (None, report["shape"]["max_num_seqs"])
    assert report["shape"]["max_num_seqs"] <= 1024


def test_a_tier_whose_promise_cannot_hold_says_how_far_it_does(run):
    done = run(*GEMMA, *LONG, "--preset", "standard")
    assert "a mean TTFT of 2.1 s holds up to" in " ".join(done.stdout.split())
    assert "not at 64; the queue keeps the rest" in " ".join(done.stdout.split())
    done = run(*GEMMA, "--prompt-tokens", 1000, "--preset", "interactive")
    assert "a mean TTFT of 1.5 s holds at 8 in flight" in " ".join(done.stdout.split())


def test_presets_do_not_ask_a_cpu_for_fp8(run):
    arguments = ["--model", "gemma-4-e4b", "--chips", "cpu", "--memory", 64, "--preset", "interactive", "--json"]
    assert orjson.loads(run(*arguments, *LONG).stdout)["shape"]["kv_cache_dtype"] == "auto"


# --- exit codes


def test_a_model_that_does_not_fit_ends_with_6_and_the_way_out(run):
    done = run("--model", "gemma-4-31b", "--chips", "v6e-1", *LONG)
    assert done.exit_code == 6
    assert "DOES NOT FIT" in done.stdout
    assert "problem" in done.stdout
    assert "Traceback" not in done.stderr


def test_rates_that_nobody_knows_are_not_invented(run):
    done = run(
        "--model", "gemma-4-e4b", "--chips", "cpu", "--kv-cache-memory", 4, *LONG, "--documents", 9, "--deadline", 1
    )
    assert done.exit_code == 0
    assert "TAKES" in done.stdout
    assert "unknown: a worker measures the rates of cpu at its warm-up" in " ".join(done.stdout.split())


def test_a_deadline_that_is_missed_ends_with_6(run):
    hurry = [*GEMMA, *LONG, "--documents", 1_000_000]
    missed = run(*hurry, "--deadline", 0.1)
    assert (missed.exit_code, "deadline: missed" in missed.stdout) == (6, True)
    met = run(*hurry, "--deadline", 10_000)
    assert (met.exit_code, "deadline: met" in met.stdout) == (0, True)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--chips", "v6e-4", *LONG], ["which model?", "--model"]),
        (["--model", "gemma-4-26b-a4b", *LONG], ["which machine?", "--chips"]),
        (GEMMA, ["how long is a document?", "--prompt-tokens"]),
        ([*GEMMA, *LONG, PAGES], ["leave out --prompt-tokens"]),
        ([*GEMMA, "none.txt"], ["no document to plan for"]),
        ([*GEMMA, *LONG, "--shared-prefix-tokens", 16384], ["--shared-prefix-tokens 16384"]),
        (["--model", "gemma-4-26b-a4b", "--chips", "cpu", *LONG], ["how much memory has the cpu?", "--memory"]),
        ([*GEMMA, *LONG, "--deadline", 8], ["how many documents?", "--documents"]),
        ([*GEMMA, *LONG, "--price-per-hour", "nan"], ["not a finite number"]),
        ([*GEMMA, *LONG, "--deadline", "inf"], ["--deadline", "inf"]),
        ([*GEMMA, *LONG, "--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization"]),
        ([*GEMMA, *LONG, "--kv-cache-dtype", "int8"], ["int8"]),
        ([*GEMMA, *LONG, "--engine-config", "none.yaml"], ["none.yaml"]),
        ([*GEMMA, PAGES, "--tokenizer", "none.json"], ["none.json", "tokenizer.json"]),
        (["--model", "gemma-5", "--chips", "v6e-4", *LONG], ["gemma-5"]),
        (["--model", "gemma-4-26b-a4b", "--chips", "v6-4", *LONG], ["v6-4", "v6e-4"]),
    ],
)
def test_bad_input_is_one_clear_line(run, arguments, told):
    assert_one_clear_line(run(*arguments), *told)


@pytest.mark.parametrize(
    ("value", "told"),
    [("max_num_seqs: many", "max_num_seqs='many'"), ("max_num_seqs: 0", "max_num_seqs=0"), ("[1]", "a mapping")],
)
def test_a_bad_value_in_the_file_is_one_clear_line(run, tmp_path, value, told):
    (tmp_path / "engine.yaml").write_text(value)
    assert_one_clear_line(run(*GEMMA, *LONG, "--engine-config", "engine.yaml"), told)


def test_a_bad_model_file_is_one_clear_line(run, tmp_path):
    for content in ("", "[]", '{"model_type": "mamba"}', "\x00"):
        (tmp_path / "config.json").write_text(content)
        assert_one_clear_line(run("--model", tmp_path, "--chips", "v6e-4", *LONG), str(tmp_path))


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "num_experts_per_tok=129 is above num_experts=128"),
        ("gemma-4-e4b", {"num_kv_shared_layers": 42}, "num_kv_shared_layers=42 leaves none"),
        ("llama-3.1-8b", {"num_hidden_layers": 2**70}, "num_hidden_layers="),
        ("llama-3.1-8b", {"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_a_model_that_cannot_be_is_one_clear_line(run, tmp_path, model, changes, told):
    config = orjson.loads((SHIPPED / f"{model}.json").read_bytes())
    config.get("text_config", config).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_one_clear_line(run("--model", tmp_path, "--chips", "v6e-4", *LONG), told)


# --- the article


def test_the_article_is_judged_claim_by_claim(run):
    done = run("--article")
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"^IMPOSSIBLE +FP8: peak prefill 475,552 tok/s$", done.stdout, re.MULTILINE)
    verdicts = orjson.loads(run("--article", "--json").stdout)
    assert len(verdicts) > 15
    assert {verdict["word"] for verdict in verdicts} >= {"true", "partly", "false", "impossible", "unsupported"}
    text = " ".join(done.stdout.split())
    assert all(f"{verdict['claim']} {verdict['because']}" in text for verdict in verdicts)


def test_the_file_sets_memory_aside_for_the_kv_cache(run: Run) -> None:
    """deploy/engines/cpu.yaml says it: nobody has to say it again, on each device that the engine has."""
    cpu = ["--model", "llama-3.1-8b", "--chips", "cpu", "--prompt-tokens", "64"]
    cpu += ["--engine-config", PAGES.parents[1] / "engines" / "cpu.yaml", "--json"]

    one = run(*cpu)
    two = run(*cpu, "--tensor-parallel-size", "2")
    said = run(*cpu, "--kv-cache-memory", "3")

    assert one.exit_code == two.exit_code == said.exit_code == 0
    assert [figures_of(done)["kv_pool_bytes"]["value"] for done in (one, two, said)] == [2**30, 2 * 2**30, 3 * 2**30]
    assert_one_clear_line(run(*cpu[:6]), "how much memory has the cpu")


def test_what_the_planner_does_not_know_is_told(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("quantization: fp8\npipeline_parallel_size: 1\nhf_overrides: {a: 1}\n")

    done = run(*GEMMA, *LONG, "--engine-config", file, "--json")

    told = "planned without quantization='fp8', hf_overrides={'a': 1}, which the planner doesn't know and which changes"
    assert any(line.startswith(told) for line in orjson.loads(done.stdout)["warnings"])


def test_without_prefix_caching_a_shared_prefix_saves_nothing(run: Run) -> None:
    shared = [*GEMMA, *LONG, "--shared-prefix-tokens", "8192", "--json"]
    cached, plain = run(*shared), run(*shared, INGEST_ENGINE_ENABLE_PREFIX_CACHING="false")

    assert figures_of(cached)["ttft_at_limit_ms"]["low"] < 0.6 * figures_of(plain)["ttft_at_limit_ms"]["low"]
    assert orjson.loads(plain.stdout)["workload"]["shared_prefix_tokens"] == 0


@pytest.mark.parametrize("value", [".nan", "-.inf", "0", "true", "x", "[1]", "2000000000000000"])
@pytest.mark.parametrize("name", ["gpu_memory_utilization", "kv_cache_memory_bytes", "block_size"])
def test_a_value_that_can_not_be_planned_with_is_named(run: Run, tmp_path: Path, name: str, value: str) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(f"{name}: {value}\n")

    assert_one_clear_line(run("--model", "llama-3.1-8b", "--chips", "h100", *LONG, "--engine-config", file), name)


def test_what_a_file_leaves_to_vllm_the_planner_chooses(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("dtype: auto\nmax_model_len: -1\nblock_size: 64\n")

    done = run(*GEMMA, *LONG, "--engine-config", file)

    assert done.exit_code == 0
    assert "INGEST_ENGINE_MAX_MODEL_LEN=16640" in done.stdout
    assert "INGEST_ENGINE_BLOCK_SIZE=64" in done.stdout
    wide = run("--model", "llama-3.1-8b", "--chips", "v6e-4", *LONG, INGEST_ENGINE_DTYPE="float32")
    assert "INGEST_ENGINE_DTYPE=float32" in wide.stdout
