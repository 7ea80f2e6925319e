"""The drain controller over real vLLM: one run through the command lines, under limits that change meanwhile.

Two queues in priority order, two tenants, KV limits far below what is queued and a bound on the time to first token.
The worker is `BatchWorker`; a subclass of it writes down what vLLM itself counts (tests/support/drain_worker.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from ingestq.common import keys
from ingestq.common.embedded_server import EmbeddedServer
from ingestq.common.worker_load import live_loads
from support.drain_worker import HOLD_AT, LOG
from support.models import tiny_gemma4
from support.processes import WorkerProcess, run, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

TESTS = Path(__file__).parents[1]
MODEL, WORKER = "tiny", "d"
HIGH, LOW = "ingest-high", "ingest"
GROUP = "drain"

# Documents by name; "late" ones come while the worker is in the middle of the low queue.
NUM_DOCUMENTS = {"high": 6, "acme": 18, "beta": 12, "late": 5}
MAX_TOKENS = 24

# KV tokens: at first, and at last; between them only the worker's own setting holds, which is more than its KV cache.
# All documents need some 8,000, the largest of them less than 300.
FIRST_KV_TOKENS, OWN_KV_TOKENS, LAST_KV_TOKENS = 512, 4096, 384
FIRST_IN_FLIGHT, NEXT_IN_FLIGHT = 10, 14

# Finished documents after which the engine stands still while limits are changed.
HOLDS = (9, 20)

# Prompt tokens for which the bound on the time to first token is made, from the rate and the errors that the worker has
# measured by then: two prompts at least, but not all of the late ones that are ready first. In milliseconds it depends
# on the machine, and on what else that does.
WAITING_TOKENS, NUM_READY = 450, 4

SETTINGS = {
    "INGEST_ENGINE": "vllm",
    "INGEST_MODEL_NAME": MODEL,
    "INGEST_MAX_KV_TOKENS": str(OWN_KV_TOKENS),
    "INGEST_ENGINE_DTYPE": "float32",
    "INGEST_ENGINE_ENFORCE_EAGER": "true",
    "INGEST_ENGINE_MAX_MODEL_LEN": "512",
    "INGEST_ENGINE_MAX_NUM_SEQS": "16",
    "INGEST_ENGINE_MAX_NUM_BATCHED_TOKENS": "512",
    "INGEST_ENGINE_BLOCK_SIZE": "32",
    # Of four groups of layers: 1,280 tokens of sequences this short, and vLLM's null block.
    "INGEST_ENGINE_NUM_GPU_BLOCKS_OVERRIDE": "161",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": f"{TESTS}:{TESTS.parent / 'deploy'}",
}

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one worker did from its first document to its last."""

    # In order; see drain_worker.py.
    events: Sequence[Event]
    # Where in them the engine stands still for the first and the second time, the late documents are queued, and the
    # worker is done.
    first_hold: int
    second_hold: int
    late: int
    bare: int
    # Document -> row.
    rows: Mapping[str, Any]
    # `ingestq status --json`, and `ingestq why --json` of the first document of beta, during the first hold.
    status: Any
    why: Any

    def of(self, kind: str, start: int = 0, end: int | None = None) -> list[Event]:
        return [event for event in self.events[start : self.bare if end is None else end] if event["event"] == kind]

    @property
    def documents(self) -> dict[str, str]:
        """Job -> document."""
        return {row["job_id"]: name for name, row in self.rows.items()}

    def leased(self, start: int = 0, end: int | None = None) -> list[str]:
        """Documents in the order in which they were leased; one that was handed back comes twice."""
        documents = self.documents
        return [documents[job["job_id"]] for lease in self.of("lease", start, end) for job in lease["jobs"]]


def tenant_of(document: str) -> str:
    return document.partition("-")[0]


class _Scenario:
    """The command lines, and the worker's log."""

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.redis = Redis.from_url(server.url)

    def command(self, *arguments: str) -> str:
        done = run("ingestq", *arguments, url=self.server.url, settings={"INGEST_MODEL_NAME": MODEL})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def enqueue(self, name: str, *options: str) -> None:
        """Documents of a name, of 70 to 230 tokens with what goes before them."""
        path = self.folder / f"{name}.jsonl"
        lines = [
            {"document_id": f"{name}-{i}", "text": f"{name} {i}. " + "The meeting began at noon. " * (6 + 7 * i % 23)}
            for i in range(NUM_DOCUMENTS[name])
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = ("--instruction", "Say what this is about.", "--max-tokens", str(MAX_TOKENS))
        self.command("enqueue", str(path), "--group", GROUP, *task, *options)

    def limit(self, *changes: str) -> None:
        for queue in (HIGH, LOW):
            self.command("limits", "set", *changes, "--queue", queue)

    @property
    def events(self) -> list[Event]:
        path = self.folder / "events"
        # The last line may be on its way.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def run_until(self, num_finished: int) -> None:
        """Lets the engine go on until so many documents are finished."""
        draft = self.folder / "hold.new"
        draft.write_text(str(num_finished))
        draft.replace(self.folder / "hold")

    def await_hold(self, number: int) -> int:
        """Waits until the engine stands still and what it has finished is written; where its log is then."""

        def is_written() -> bool:
            holds = [event for event in self.events if event["event"] == "hold"]
            written = sum(self.redis.zcard(keys.finished(queue)) for queue in (HIGH, LOW))
            return len(holds) > number and written == holds[number]["num_finished"]

        wait_until(is_written, f"the engine stands still, hold {number}", patience=120)
        return len(self.events)

    def await_closed_gate(self) -> None:
        """Waits until the worker has nothing to do but to ask again, and says so."""

        def has_settled() -> bool:
            held = int(self.redis.hget(keys.kv_tokens(), f"worker:{WORKER}") or 0)
            load = live_loads(self.redis, LOW)[WORKER]
            return load.kv_tokens == held and {closed.gate for closed in load.closed} == {"kv"} and self.is_asking()

        wait_until(has_settled, "the worker says that its KV tokens are given out")

    def is_asking(self) -> bool:
        """Whether the last lease calls, of which there are twenty a second, brought nothing."""
        last = self.events[-5:]
        return all(event["event"] == "lease" and not event["jobs"] for event in last)

    def await_ready(self, number: int, since: int) -> None:
        """Waits until so many more documents are leased and ready for the engine."""

        def are_ready() -> bool:
            words = [word for event in self.events[since:] for word in event.get("words", ())]
            return words.count("granted") >= number

        wait_until(are_ready, f"{number} more documents are ready for the engine")

    def rows(self) -> dict[str, Any]:
        lines = self.command("results", GROUP, "--follow", "--timeout", "60").splitlines()
        return {row["document_id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def drained(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("drain")
    scenario = _Scenario(server, folder)
    redis = scenario.redis
    redis.flushall()
    scenario.limit(f"max_kv_tokens={FIRST_KV_TOKENS}", f"max_in_flight={FIRST_IN_FLIGHT}", "ttft_sla_ms=60000")
    scenario.enqueue("acme", "--tenant", "acme")
    scenario.enqueue("beta", "--tenant", "beta")
    scenario.enqueue("high", "--queue", HIGH)
    settings = {
        **SETTINGS,
        "INGEST_MODEL": str(tiny_gemma4()),
        LOG: str(folder / "events"),
        HOLD_AT: str(folder / "hold"),
    }
    scenario.run_until(HOLDS[0])
    with WorkerProcess(
        server.url, folder, "--burst", HIGH, name=WORKER, worker="support.drain_worker.DrainWorker", **settings
    ) as worker:
        scenario.await_hold(0)
        scenario.await_closed_gate()
        first_hold = len(scenario.events)
        status = json.loads(scenario.command("status", "--json"))
        head = redis.lindex(keys.queue(LOW, "beta"), 0)
        why = json.loads(scenario.command("why", "--json", head.decode()))

        scenario.enqueue("late", "--queue", HIGH)
        late = len(scenario.events)
        [hold] = (event for event in scenario.events if event["event"] == "hold")
        sla = WAITING_TOKENS / status["fleet"]["prefill_tokens_per_s"] * 1e3 + hold["margin_ms"]
        scenario.limit("max_kv_tokens=none", f"max_in_flight={NEXT_IN_FLIGHT}", f"ttft_sla_ms={sla}")
        scenario.await_ready(NUM_READY, late)
        scenario.run_until(HOLDS[1])

        second_hold = scenario.await_hold(1)
        scenario.limit(f"max_kv_tokens={LAST_KV_TOKENS}")
        scenario.run_until(10**9)
        assert worker.wait() == 0, worker.output
    events = scenario.events
    done = Run(
        events=events,
        first_hold=first_hold,
        second_hold=second_hold,
        late=late,
        bare=next(i for i, event in enumerate(events) if event["event"] == "bare"),
        rows=scenario.rows(),
        status=status,
        why=why,
    )
    yield done
    redis.close()


def test_every_document_succeeds_at_its_first_attempt_with_the_text_of_a_plain_generate(drained: Run) -> None:
    expected = {f"{name}-{i}" for name, number in NUM_DOCUMENTS.items() for i in range(number)}
    assert set(drained.rows) == expected
    for row in drained.rows.values():
        assert (row["status"], row["attempts"], row["worker"]) == ("succeeded", 1, WORKER), row
        assert row["usage"]["output_tokens"] == MAX_TOKENS

    jobs = {job["prompt_id"]: job["job_id"] for lease in drained.of("lease") for job in lease["jobs"]}
    texts = drained.events[-1]["texts"]
    assert {drained.documents[jobs[prompt_id]]: text for prompt_id, text in texts.items()} == {
        name: row["text"] for name, row in drained.rows.items()
    }


def test_no_lease_goes_beyond_the_limits_that_stand_in_redis(drained: Run) -> None:
    limits: Event = {}
    for event in drained.events[: drained.bare]:
        if event["event"] == "lease":
            limits = event["limits"]
        if event.get("jobs") or "granted" in event.get("words", ()):
            assert event["held"] <= (limits["max_kv_tokens"] or OWN_KV_TOKENS), event
        if event.get("jobs"):
            assert event["in_flight"] <= limits["max_in_flight"], event


def test_vllm_never_has_more_than_was_leased_for_it(drained: Run) -> None:
    """Documents and KV tokens, in whole blocks, by the count of its scheduler, after each of its steps."""
    held = in_flight = 0
    for event in drained.events[: drained.bare]:
        held = event.get("held", held)
        in_flight = event.get("in_flight", in_flight)
        if event["event"] == "step":
            assert event["tokens"] <= held, event
            assert event["num_requests"] <= in_flight, event
            assert event["num_blocks"] <= drained.events[0]["num_usable_blocks"], event


def test_vllm_keeps_to_each_limit_while_it_holds_and_uses_it(drained: Run) -> None:
    def most(start: int, end: int, figure: str) -> int:
        return max(step[figure] for step in drained.of("step", start, end))

    first = most(0, drained.first_hold, "tokens")
    raised = most(drained.first_hold, drained.second_hold, "tokens")
    # From the first lease under the lowered limit on.
    granted = next(
        i
        for i, event in enumerate(drained.events)
        if event.get("jobs") and event["limits"]["max_kv_tokens"] == LAST_KV_TOKENS
    )
    lowered = most(granted, drained.bare, "tokens")

    print(
        f"KV tokens in vLLM at most: {first} of {FIRST_KV_TOKENS}, {raised} when raised, {lowered} of {LAST_KV_TOKENS}"
    )
    assert FIRST_KV_TOKENS // 2 < first <= FIRST_KV_TOKENS
    assert raised > FIRST_KV_TOKENS
    assert LAST_KV_TOKENS // 2 < lowered <= LAST_KV_TOKENS
    assert most(0, drained.first_hold, "num_requests") <= FIRST_IN_FLIGHT
    assert most(0, drained.bare, "num_requests") <= NEXT_IN_FLIGHT


def test_a_lowered_limit_is_in_force_with_the_next_lease(drained: Run) -> None:
    leases = drained.of("lease", drained.second_hold)
    lowered = [lease for lease in leases if lease["limits"]["max_kv_tokens"] == LAST_KV_TOKENS]
    assert lowered[0]["held"] > LAST_KV_TOKENS, "what is in flight ends as it would have"
    assert [lease for lease in lowered if lease["jobs"] and lease["held"] > LAST_KV_TOKENS] == []
    assert drained.leased(drained.second_hold), "and there is more to take"


def test_nothing_is_preempted_under_the_controller_and_something_is_without_it(drained: Run) -> None:
    """Without it: one `generate` of the same prompts, by the same engine."""
    begin, bare, generate = (drained.of(kind, end=len(drained.events))[0] for kind in ("begin", "bare", "generate"))
    steps = drained.of("step", drained.bare, len(drained.events))
    print(
        f"preemptions: {bare['num_preemptions'] - begin['num_preemptions']} under the controller, "
        f"{generate['num_preemptions']} without it, which had {steps[0]['num_requests']} documents at once"
    )
    assert bare["num_preemptions"] == begin["num_preemptions"]
    assert generate["num_preemptions"] > 0
    # It was the controller that kept it from that: there were more prompts than the engine had blocks for.
    assert "kv" in {event["gate"] for event in drained.of("gate", drained.first_hold)}


def test_documents_of_the_first_queue_are_leased_before_those_of_the_second(drained: Run) -> None:
    first = drained.leased(end=drained.first_hold)
    high = [tenant_of(document) == "high" for document in first]
    assert sum(high) >= NUM_DOCUMENTS["high"]
    assert sorted(high, reverse=True) == high, first
    after = drained.leased(drained.late)
    assert {tenant_of(document) for document in after[: NUM_DOCUMENTS["late"]]} == {"late"}, after


def test_tenants_are_served_alike_while_both_wait(drained: Run) -> None:
    needs = {member.partition(":")[2]: tokens for event in drained.of("reserve") for member, tokens in event["needs"]}
    served = {"acme": 0, "beta": 0}
    left = {name: NUM_DOCUMENTS[name] for name in served}
    jobs = {job["job_id"]: job for lease in drained.of("lease") for job in lease["jobs"]}  # each as it was leased last
    for job in jobs.values():
        tenant = job["tenant"]
        if tenant and all(left.values()):
            served[tenant] += needs[job["prompt_id"]]
            left[tenant] -= 1
    jain = sum(served.values()) ** 2 / (len(served) * sum(tokens**2 for tokens in served.values()))
    print(f"KV tokens while both tenants wait: {served}, Jain's index {jain:.4f}")
    assert jain >= 0.95


def test_prompts_start_while_what_waits_in_vllm_is_within_the_time_to_first_token(drained: Run) -> None:
    """By the rate and the errors that the worker knew then; whether the promise was right, no test can tell."""
    started = [event for event in drained.of("gate") if event["gate"] == "open"]
    added = drained.of("add")
    assert [event["waiting_tokens"] for event in started] == [event["waiting_tokens"] for event in added]
    for event in started:
        if event["waiting_tokens"]:
            assert event["predicted_ttft_ms"] <= event["ttft_sla_ms"], event
    assert any(event["waiting_tokens"] for event in drained.of("add", drained.first_hold)), (
        "it let some in behind others"
    )
    assert "ttft" in {event["gate"] for event in drained.of("gate", drained.first_hold)}, "it held some back"
    assert {event["gate"] for event in drained.of("gate", 0, drained.first_hold)} <= {"open"}, "with a minute, none"


def test_the_time_in_redis_is_told_apart_from_the_time_to_first_token(drained: Run) -> None:
    jobs = [job["job_id"] for lease in drained.of("lease") for job in lease["jobs"]]
    last = {drained.documents[job_id]: i for i, job_id in enumerate(jobs)}
    rows = [drained.rows[name] for name in sorted(last, key=last.__getitem__)]
    for name in NUM_DOCUMENTS:  # enqueued in one call each: who is leased later has waited longer
        waits = [row["queue_ms"] for row in rows if tenant_of(row["document_id"]) == name]
        assert waits == sorted(waits)
    _print_figures(drained)
    for row in rows:
        assert 0 < row["ttft_ms"] <= row["run_ms"]


def _print_figures(drained: Run) -> None:
    """Of the documents that started under the bound."""
    gates = drained.of("gate", drained.first_hold)
    jobs = {job["prompt_id"]: job["job_id"] for lease in drained.of("lease") for job in lease["jobs"]}
    adds = drained.of("add", drained.first_hold)
    ttfts = [
        (drained.rows[drained.documents[jobs[add["prompt_id"]]]]["ttft_ms"], add["waiting_tokens"]) for add in adds
    ]
    alone = sorted(ttft for ttft, waiting in ttfts if not waiting)
    behind = sorted(ttft for ttft, waiting in ttfts if waiting)
    num_closed = [gate["gate"] for gate in gates].count("ttft")
    print(f"bound of {gates[0]['ttft_sla_ms']:.0f} ms, gate closed before {num_closed} steps")
    for told, of in (("alone, as one always may", alone), ("behind others", behind)):
        if of:
            p50, p95 = of[len(of) // 2], of[len(of) * 95 // 100]
            print(f"{len(of)} prompts started {told}: TTFT p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    print(f"in Redis up to {max(row['queue_ms'] for row in drained.rows.values()) / 1e3:.1f} s")


def test_status_and_why_say_what_documents_wait_for(drained: Run) -> None:
    [worker] = drained.status["workers"]
    load = worker["load"]
    assert {closed["gate"] for closed in load["closed"]} == {"kv"}
    assert load["num_preemptions"] == 0
    assert load["max_in_flight"] == FIRST_IN_FLIGHT
    assert 0 < load["kv_tokens"] == worker["kv_tokens"] <= FIRST_KV_TOKENS
    assert (drained.why["tenant"], drained.why["waits_for"]) == ("beta", "kv")
    told = f"{WORKER}: {load['kv_tokens']} of {FIRST_KV_TOKENS} KV tokens are reserved (max_kv_tokens)"
    assert told in drained.why["details"]
