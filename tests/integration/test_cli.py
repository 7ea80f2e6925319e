"""`ingestq` as scripts use it: a subprocess, a real server, exit codes."""

import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.engine_card import publish
from support.hand_worker import finish, lease
from support.live_workers import card
from support.processes import BIN, wait_until
from support.processes import environment as clean_environment

COMMAND = [str(BIN / "ingestq")]
PAGES = Path(__file__).parents[2] / "deploy" / "demo" / "documents"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(server: EmbeddedServer, redis: Redis) -> dict[str, str]:
    return clean_environment(server.url, {"INGEST_MODEL": "m"})


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    def run_command(*arguments: Any, stdin: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            env={**environment, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run_command


def rows_of(output: str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in output.splitlines()]


def jsonl(*rows: object) -> str:
    return "".join(orjson.dumps(row).decode() + "\n" for row in rows)


TWO = jsonl({"text": "one", "id": "a"}, {"text": "two", "id": "b"})


def assert_one_line_error(done: "subprocess.CompletedProcess[str]", code: int, message: str) -> None:
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("ingestq: ")]
    assert len(errors) == 1
    assert message in errors[0]


# --- enqueue


def test_enqueue_prints_the_group_id_and_nothing_else_on_stdout(run, redis):
    done = run("enqueue", "-", "--group", "crawl-1", stdin=TWO)
    assert (done.returncode, done.stdout) == (0, "crawl-1\n")
    assert "2 new" in done.stderr
    assert redis.llen(keys.queue("ingest")) == 2


def test_enqueue_names_a_group_by_itself(run):
    first, second = run("enqueue", "-", stdin=TWO), run("enqueue", "-", stdin=TWO)
    assert len(first.stdout.split()) == 1
    assert first.stdout != second.stdout


def test_enqueue_says_what_was_already_there(run, redis):
    run("enqueue", "-", "--group", "g1", stdin=TWO)
    finish(redis, lease(redis, want=1))
    done = run("enqueue", "-", "--group", "g2", stdin=TWO + jsonl({"text": "three"}))
    assert done.returncode == 0
    assert "1 new, 1 already queued or running, 1 already finished, 0 refused" in done.stderr


def test_enqueue_sends_the_text_of_pages_and_the_options(run, redis):
    prompt = ["--instruction", "Summarize.", "--system", "Be brief.", "--no-chat"]
    sampling = ["--max-tokens", "9", "--temperature", "0.5", "--model", "other"]
    done = run("enqueue", PAGES / "auth-peer.html", *prompt, *sampling)
    assert done.returncode == 0
    [job_id] = redis.lrange(keys.queue("ingest"), 0, -1)
    request = orjson.loads(redis.hget(keys.job(job_id.decode()), "data"))[2][0]
    assert request["text"].startswith("21.9. Peer Authentication\n")
    assert "<" not in request["text"]
    del request["text"]
    assert request == {
        "schema_version": 1,
        "document_id": str(PAGES / "auth-peer.html"),
        "model": "other",
        "system": "Be brief.",
        "instruction": "Summarize.",
        "chat": False,
        "sampling": {"max_tokens": 9, "temperature": 0.5},
    }


def test_enqueue_carries_retries_in_rqs_own_fields(run, redis):
    run("enqueue", "-", "--retry", "2", "--retry-interval", "1", "--retry-interval", "5", stdin=TWO)
    [job_id, _] = redis.lrange(keys.queue("ingest"), 0, -1)
    retries_left, intervals = redis.hmget(keys.job(job_id.decode()), "retries_left", "retry_intervals")
    assert (retries_left, orjson.loads(intervals)) == (b"2", [1, 5])


def test_one_refused_document_is_named_and_the_others_are_queued(run, redis, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    done = run("enqueue", ".", "none.txt", "--group", "g")
    assert (done.returncode, done.stdout) == (1, "g\n")
    refusals = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 2
    assert "'./b.pdf'" in refusals[0]
    assert "'none.txt': no such file" in refusals[1]
    assert redis.llen(keys.queue("ingest")) == 1


def test_a_document_over_the_bound_is_refused_by_the_queue(run, redis):
    done = run("enqueue", "-", stdin=TWO + jsonl({"text": "x" * 101, "id": "long"}), INGEST_MAX_TEXT_BYTES="100")
    assert done.returncode == 1
    assert "refused: document 'long'" in done.stderr
    assert redis.llen(keys.queue("ingest")) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"system": "x" * 70_000}, "system: String should have at most 65536 characters"),
        ({"instruction": "x" * 70_000}, "instruction: String should have at most 65536 characters"),
        ({"id": "bad " + "x" * 600}, "document_id: String should have at most 512 characters"),
        ({"id": "bad\n"}, "document_id: String should match pattern"),
    ],
)
def test_a_field_over_its_bound_refuses_its_document_by_name(run, redis, row, reason):
    done = run("enqueue", "-", stdin=TWO + jsonl({"text": "t", "id": "bad", **row}))
    [refusal] = [line for line in done.stderr.splitlines() if line.startswith("refused: document 'bad")]
    assert reason in refusal
    assert (done.returncode, redis.llen(keys.queue("ingest"))) == (1, 2)


def test_an_option_over_its_bound_refuses_each_document_by_name(run, redis):
    done = run("enqueue", "-", "--system", "x" * 70_000, stdin=TWO)
    assert "refused: document 'a': system: " in done.stderr
    assert "refused: document 'b': system: " in done.stderr
    assert (done.returncode, redis.llen(keys.queue("ingest"))) == (1, 0)


def test_an_interrupted_enqueue_names_the_group_to_go_on_with(redis, environment):
    arguments = [*COMMAND, "enqueue", "-"]
    with subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: redis.keys(keys.group("*")), "the group is open")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        errors = process.stderr.read().decode()
    [group] = [key.decode().removeprefix(keys.group("")) for key in redis.keys(keys.group("*"))]
    assert f"interrupted; the same command with --group {group} completes the group" in errors
    assert "Traceback" not in errors


# --- results


def test_results_without_follow_prints_what_there_is_and_says_that_some_are_missing(run, redis):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    finish(redis, lease(redis, want=1))
    done = run("results", "g")
    assert done.returncode == 3
    assert [(row["document_id"], row["status"]) for row in rows_of(done.stdout)] == [("a", "succeeded")]
    assert "'b'" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_tells_failed_documents_by_its_exit_code(run, redis):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    first, second = lease(redis)
    finish(redis, [first])
    assert run("results", "g").returncode == 3
    finish(redis, [second], "F")
    done = run("results", "g")
    assert done.returncode == 1
    assert [row["status"] for row in rows_of(done.stdout)] == ["succeeded", "failed"]


def test_results_follow_ends_with_the_last_row(run, redis, environment):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    with subprocess.Popen([*COMMAND, "results", "g", "--follow"], env=environment, stdout=subprocess.PIPE) as follower:
        first, second = lease(redis)
        finish(redis, [first])
        assert orjson.loads(follower.stdout.readline())["document_id"] == "a"  # while the other is still running
        finish(redis, [second])
        assert orjson.loads(follower.stdout.readline())["document_id"] == "b"
        assert follower.wait(30) == 0


def test_results_follow_gives_up_after_its_timeout(run):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    assert_one_line_error(run("results", "g", "--follow", "--timeout", "0.2"), 3, "2 documents have no result")


def test_results_go_to_a_file_that_is_never_seen_half_written(run, redis, tmp_path):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    finish(redis, lease(redis))
    (tmp_path / "out.jsonl").write_text("older\n")
    done = run("results", "g", "-o", "out.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    assert len(rows_of((tmp_path / "out.jsonl").read_text())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_output_file_that_can_not_be_written_is_exit_code_2(run):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    assert_one_line_error(run("results", "g", "-o", "no/such/folder/out.jsonl"), 2, "No such file")


def test_an_interrupted_follow_leaves_the_older_file_and_exits_130_without_a_traceback(
    run, redis, environment, tmp_path
):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    finish(redis, lease(redis, want=1))
    (tmp_path / "out.jsonl").write_text("older\n")
    arguments = ["results", "g", "--follow", "-o", "out.jsonl"]
    with subprocess.Popen([*COMMAND, *arguments], env=environment, cwd=tmp_path, stderr=subprocess.PIPE) as follower:
        wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob("*.part")), "a row is written")
        follower.send_signal(signal.SIGINT)
        _, errors = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "older\n"


def test_a_reader_that_leaves_early_is_no_error(run, redis, environment):
    run("enqueue", "-", "--group", "g", stdin=jsonl(*({"text": f"text {i}"} for i in range(50))))
    finish(redis, lease(redis), text="x" * 100_000)
    with subprocess.Popen(
        [*COMMAND, "results", "g"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(30) == 141
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


# --- status and cancel


def test_status_of_a_group_as_json(run, redis):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    finish(redis, lease(redis, want=1))
    done = run("status", "g", "--json")
    assert done.returncode == 0
    assert orjson.loads(done.stdout) == {
        "group": "g",
        "sealed": True,
        "documents": 2,
        "terminal": 1,
        "states": {
            "queued": 1,
            "running": 0,
            "scheduled": 0,
            "succeeded": 1,
            "failed": 0,
            "stopped": 0,
            "cancelled": 0,
            "expired": 0,
        },
        "warnings": [],
    }


def test_status_of_a_queue_as_json_has_its_workers_and_their_engines(run, redis):
    publish(redis, "ingest", "w1", card())
    run("enqueue", "-", "--group", "g", stdin=TWO + jsonl({"text": "three"}))
    first, _ = lease(redis, want=2)
    finish(redis, [first])
    state = orjson.loads(run("status", "--json").stdout)
    [worker] = state.pop("workers")
    assert state.pop("oldest_s") >= 0
    assert state.pop("fleet")["in_flight"] == 1
    assert state.pop("tenants")[""]["queued"] == 1
    assert state == {
        "queue": "ingest",
        "queued": 1,
        "eta_s": None,
        "running": 1,
        "scheduled": 0,
        "finished": 1,
        "failed": 0,
        "cancelled": 0,
        "suspended": False,
        "for_newer_workers": 0,
        "machines": [],
        "warnings": [],
    }
    assert (worker["name"], worker["model"], worker["device"], worker["max_model_len"]) == ("w1", "m", "cpu", 2048)


def test_status_for_people_can_not_drive_their_terminal(run, redis):
    publish(redis, "ingest", "w1\x1b[31m", card())
    done = run("status")
    assert "\x1b" not in done.stdout
    assert "w1\\x1b[31m: m on cpu, vllm 0.32.0, max_model_len 2048" in done.stdout


def test_cancel_ends_what_was_queued(run, redis):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    finish(redis, lease(redis, want=1))
    assert run("cancel", "g").returncode == 0
    done = run("results", "g", "--follow")
    assert done.returncode == 1
    assert sorted((row["document_id"], row["status"]) for row in rows_of(done.stdout)) == [
        ("a", "succeeded"),
        ("b", "cancelled"),
    ]


# --- errors


@pytest.mark.parametrize("arguments", [["results", "none"], ["status", "none"], ["cancel", "none"]])
def test_an_unknown_group_is_exit_code_5(run, arguments):
    assert_one_line_error(run(*arguments), 5, "none")


def test_no_redis_is_exit_code_4(run):
    assert_one_line_error(run("status", RQ_REDIS_URL="redis://:secret@127.0.0.1:1/0"), 4, "127.0.0.1:1")
    assert "secret" not in run("status", RQ_REDIS_URL="redis://:secret@127.0.0.1:1/0").stderr


def test_a_malformed_url_is_exit_code_4(run):
    assert_one_line_error(run("status", "--url", "http://x"), 4, "http://x")


def test_a_misspelt_setting_is_exit_code_2(run):
    assert_one_line_error(run("status", INGEST_QUEU="x"), 2, "did you mean INGEST_QUEUE?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["enqueue", "-", "--group", "a b"], "a b"), (["status", "--queue", "a b"], "a b")],
)
def test_a_malformed_name_is_exit_code_2(run, arguments, message):
    assert_one_line_error(run(*arguments, stdin=TWO), 2, message)


def test_no_model_is_exit_code_2(run, environment):
    del environment["INGEST_MODEL"]
    assert_one_line_error(run("enqueue", "-", stdin=TWO), 2, "INGEST_MODEL is not set")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["enqueue"],
        ["enqueue", "-", "--max-tokens", "0"],
        ["enqueue", "-", "--temperature", "nan"],
        ["enqueue", "-", "--retry", "1" + "0" * 19],
        ["results"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["enqueue", "results", "status", "why", "cancel"])
def test_help_names_the_exit_codes(run, command):
    assert "3  some documents have no result yet" in run(command, "--help").stdout


def test_options_override_the_environment(run, redis, server):
    done = run("enqueue", "-", "--url", server.url, "--queue", "other", stdin=TWO, RQ_REDIS_URL="redis://127.0.0.1:1/0")
    assert done.returncode == 0
    assert redis.llen(keys.queue("other")) == 2


@pytest.fixture
def unsafe_server(redis: Redis) -> Iterator[None]:
    redis.config_set("maxmemory-policy", "allkeys-lru")
    yield
    redis.config_set("maxmemory-policy", "noeviction")


@pytest.mark.usefixtures("unsafe_server")
def test_a_server_that_may_lose_documents_is_warned_of_on_stderr(run):
    assert "warning: Redis may evict queued documents" in run("enqueue", "-", stdin=TWO).stderr
    assert "allkeys-lru" in orjson.loads(run("status", "--json").stdout)["warnings"][0]
    run("enqueue", "-", "--group", "g", stdin=TWO)
    assert "warning: Redis may evict queued documents" in run("results", "g").stderr
    assert "warning: Redis may evict queued documents" in run("cancel", "g").stderr


# --- terminals


def run_on_terminal(environment: dict[str, str], *arguments: str) -> str:
    """What a command writes to a terminal that is its stdout and stderr."""
    leader, follower = pty.openpty()
    with subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=follower, stderr=follower) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                output += os.read(leader, 65536)
            except OSError:  # Linux says EIO when the last writer is gone
                break
        process.wait(30)
    os.close(leader)
    return output.decode()


def test_rows_on_a_terminal_carry_no_control_characters(run, redis, environment):
    run("enqueue", "-", "--group", "g", stdin=TWO)
    finish(redis, lease(redis), text="red \x1b[31m \x9b31m \u202e")
    output = run_on_terminal(environment, "results", "g")
    assert all(char.isprintable() or char in "\r\n" for char in output)
    assert "\\u009b31m" in output


def test_a_state_on_a_terminal_carries_no_control_characters(redis, environment):
    publish(redis, "ingest", "red \x1b[31m \x9b31m \u202e \U000e0001", card())
    output = run_on_terminal(environment, "status", "--json")
    assert all(char.isprintable() or char in "\r\n" for char in output)
    assert orjson.loads(output)["workers"][0]["name"] == "red \x1b[31m \x9b31m \u202e \U000e0001"


def test_a_terminal_shows_a_bar_with_a_rate(environment, tmp_path):
    (tmp_path / "a.jsonl").write_text(TWO)
    output = run_on_terminal(environment, "enqueue", str(tmp_path / "a.jsonl"), "--group", "g")
    assert "\x1b[" in output
    assert "/s" in output
