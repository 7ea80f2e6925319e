"""How much to lease and to start: hard limits, the time to first token, the floor, and the company of suspects."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ingestq.common.limits import AdmissionLimits
from ingestq.workers.drain import DrainBounds, DrainController, EngineLoad, Room, companies
from ingestq.workers.engines.base import FirstToken, Rates, StepReport
from ingestq.workers.live_rate import LiveRate
from support.properties import bounded

MAX_IN_FLIGHT = st.integers(1, 5000)
MAX_CRASHES = st.integers(2, 12)


# --- whatever is measured


ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -1.0, 1e-300, 1e300, 0.2])
ANY_INT = st.integers(-(10**9), 10**30) | st.sampled_from([0, 1, 8192])


@st.composite
def any_reports(draw: st.DrawFn) -> StepReport:
    firsts = [
        FirstToken(prompt_id="", ttft_ms=ttft, num_prompt_tokens=own, num_tokens_ahead=ahead)
        for ttft, own, ahead in draw(st.lists(st.tuples(ANY_FLOAT, ANY_INT, ANY_INT), max_size=5))
    ]
    return StepReport(
        seconds=draw(ANY_FLOAT),
        num_waiting_tokens=draw(ANY_INT),
        num_prefilled_tokens=draw(ANY_INT),
        num_output_tokens=draw(ANY_INT),
        num_preemptions=draw(st.integers(-1, 3)),
        first_tokens=tuple(firsts),
    )


ANY_RATES = st.none() | st.builds(
    Rates, prefill_tokens_per_s=ANY_FLOAT, decode_tokens_per_s=ANY_FLOAT, decode_num_seqs=st.just(1)
)
ANY_BOUNDS = st.builds(
    DrainBounds,
    max_in_flight=st.integers(0, 2000),
    max_num_seqs=st.integers(1, 1024),
    floor=st.integers(1, 3000),
    ceiling=st.integers(1, 3000),
    max_ready=st.integers(1, 100),
    num_blocks=st.integers(0, 1000),
    ttft_sla_ms=st.none() | st.floats(0.001, 10_000),
    ttft_percentile=st.floats(0.5, 0.999),
    max_num_batched_tokens=st.integers(1, 16384),
)
ANY_LIMITS = st.builds(
    AdmissionLimits,
    max_in_flight=st.none() | st.integers(0, 3000),
    ttft_sla_ms=st.none() | st.floats(0, 10_000),
)
# What a controller may be told: of a step and whether the limit was used, of errors, of live limits.
ANY_TOLD = st.lists(
    st.tuples(any_reports(), st.booleans()) | st.integers(1, 100) | st.lists(ANY_LIMITS, min_size=1, max_size=3),
    max_size=30,
)


def told(controller: DrainController, events: Sequence[object]) -> None:
    for event in events:
        match event:
            case int(num):
                controller.observe_errors(num)
            case (StepReport() as report, bool(used)):
                controller.observe(report, limit_used=used)
            case _:
                controller.update(event)


@given(ANY_BOUNDS, ANY_RATES, ANY_TOLD, st.integers(0, 3000), st.integers(0, 3000), st.none() | st.integers(0, 3000))
@bounded(200)
def test_no_more_is_leased_than_hard_limits_leave(bounds, rates, events, in_flight, num_ready, jobs_left) -> None:
    controller = DrainController(bounds, rates)
    told(controller, events)
    room = controller.admit(in_flight=in_flight, num_ready=min(num_ready, in_flight), jobs_left=jobs_left)

    assert room.documents >= 0
    assert in_flight + room.documents <= max(in_flight, bounds.max_in_flight, 0)
    assert jobs_left is None or room.documents <= jobs_left
    live = [event for event in events if isinstance(event, list)]
    if live and all(each.max_in_flight is not None for each in live[-1]):
        assert in_flight + room.documents <= max(in_flight, *(each.max_in_flight for each in live[-1]))


@given(ANY_BOUNDS, ANY_RATES, ANY_TOLD, st.lists(st.tuples(st.integers(1, 32768), st.integers(1, 300)), max_size=50))
@bounded(200)
def test_no_more_is_started_than_the_engine_holds(bounds, rates, events, prompts) -> None:
    controller = DrainController(bounds, rates)
    told(controller, events)
    load = EngineLoad()

    for num_tokens, num_blocks in prompts:
        if controller.start_gate(load, num_tokens, num_blocks) == "open":
            load = load.plus(num_tokens, num_blocks)

    assert load.num_seqs <= bounds.max_num_seqs
    if bounds.num_blocks and load.num_seqs > 1:
        assert load.num_blocks <= bounds.num_blocks


@given(ANY_BOUNDS, ANY_RATES, ANY_TOLD, st.integers(1, 10**6), st.integers(1, 10**6))
@bounded(200)
def test_an_empty_worker_takes_the_next_document_whatever_it_is(bounds, rates, events, num_tokens, num_blocks) -> None:
    """Tiny SLAs, absurd measurements, huge documents, floors above the hard limit: it never starves."""
    controller = DrainController(bounds, rates)
    told(controller, events)
    assume(controller.in_flight_limit)  # 0 is what somebody asked for

    assert controller.admit(in_flight=0).documents >= 1
    assert controller.start_gate(EngineLoad(), num_tokens, num_blocks) == "open"


@given(ANY_BOUNDS, ANY_RATES, ANY_TOLD)
@bounded(200)
def test_what_it_says_is_finite(bounds, rates, events) -> None:
    controller = DrainController(bounds, rates)
    told(controller, events)

    said = [controller.prefill_tokens_per_s, controller.decode_tokens_per_s, *controller.ttft_ms]
    said.append(controller.predicted_ttft_ms(10_000, 1000))
    assert all(value is None or (math.isfinite(value) and value >= 0) for value in said)


# --- hard limits, the time to first token, the floor: in this order


def controller_of(*, seed: float | None = 36_000.0, **bounds: object) -> DrainController:
    values = {"max_in_flight": 282, "max_num_seqs": 256, "floor": 128, "ceiling": 282, "max_ready": 26, **bounds}
    rates = Rates(prefill_tokens_per_s=seed, decode_tokens_per_s=8000.0, decode_num_seqs=256) if seed else None
    return DrainController(DrainBounds(**values), rates)


def step(**values: object) -> StepReport:
    zeros = {"num_waiting_tokens": 0, "num_prefilled_tokens": 0, "num_output_tokens": 0, "num_preemptions": 0}
    return StepReport(**{"seconds": 0.2, **zeros, "first_tokens": (), **values})


def firsts(num: int) -> tuple[FirstToken, ...]:
    return (FirstToken(prompt_id="", ttft_ms=100.0, num_prompt_tokens=100, num_tokens_ahead=0),) * num


def test_a_floor_above_the_hard_limit_is_the_hard_limit() -> None:
    assert controller_of(max_in_flight=8, floor=128).in_flight_limit == 8
    assert controller_of(max_in_flight=0).in_flight_limit == 0


def test_the_time_to_first_token_holds_prompts_below_the_floor() -> None:
    controller = controller_of(ttft_sla_ms=1000.0, floor=128)
    load, num_started = EngineLoad(), 0
    while controller.start_gate(load, 9000, 10) == "open":
        load, num_started = load.plus(9000, 10), num_started + 1

    assert 1 <= num_started < 128
    assert controller.start_gate(load, 9000, 10) == "ttft"
    assert controller.predicted_ttft_ms(load.waiting_tokens - 9000, 9000) <= 1000


def test_preemptions_and_errors_lower_the_limit_to_the_floor_and_no_further() -> None:
    controller = controller_of(floor=100)
    for _ in range(50):
        controller.observe(step(num_preemptions=1, first_tokens=firsts(300)), limit_used=True)
        controller.observe_errors(50)

    assert controller.in_flight_limit == 100
    assert controller.kv_share == 0.5


def test_the_limit_moves_once_for_all_that_was_admitted_under_it() -> None:
    controller = controller_of(floor=1)
    for _ in range(10):
        controller.observe(step(num_preemptions=5, first_tokens=firsts(1)), limit_used=True)

    assert controller.in_flight_limit == int(282 * 0.75)


def test_the_limit_comes_back_while_it_is_used_and_only_then() -> None:
    controller = controller_of(floor=1)
    controller.observe(step(num_preemptions=1), limit_used=True)
    shrunk = controller.in_flight_limit
    for _ in range(1000):
        controller.observe(step(first_tokens=firsts(10)), limit_used=False)
    assert controller.in_flight_limit == shrunk

    for _ in range(1000):
        controller.observe(step(first_tokens=firsts(10)), limit_used=True)
    assert controller.in_flight_limit == 282


def test_a_limit_that_a_live_one_undercuts_is_not_used() -> None:
    controller = controller_of(floor=1)
    controller.observe(step(num_preemptions=1), limit_used=True)
    controller.update([AdmissionLimits(max_in_flight=50)])
    for _ in range(1000):
        controller.observe(step(first_tokens=firsts(10)), limit_used=True)
    controller.update([AdmissionLimits()])

    assert controller.in_flight_limit == int(282 * 0.75)


def test_single_documents_that_fail_say_nothing_of_the_engine() -> None:
    controller = controller_of()
    for _ in range(200):
        controller.observe(step(first_tokens=firsts(99)), limit_used=True)
        controller.observe_errors(1)
    assert controller.in_flight_limit == 282

    controller.observe_errors(20)
    assert controller.in_flight_limit < 282


def test_after_preemptions_fewer_blocks_are_given_out_until_it_goes_well() -> None:
    controller = controller_of(num_blocks=1000)
    full = EngineLoad(num_seqs=10, num_blocks=900)
    assert controller.start_gate(full, 100, 100) == "open"
    assert controller.start_gate(full, 100, 101) == "kv"

    controller.observe(step(num_preemptions=1), limit_used=False)
    assert controller.start_gate(full, 100, 1) == "kv"
    for _ in range(1000):
        controller.start_gate(full, 100, 100)
        controller.observe(step(first_tokens=firsts(10)), limit_used=False)
    assert controller.start_gate(full, 100, 100) == "open"


def test_the_engine_gets_no_more_than_its_sequences_and_the_limit() -> None:
    controller = controller_of(floor=1)
    assert controller.start_gate(EngineLoad(num_seqs=255), 1, 1) == "open"
    assert controller.start_gate(EngineLoad(num_seqs=256), 1, 1) == "sequences"

    controller.observe(step(num_preemptions=1), limit_used=True)
    assert controller.start_gate(EngineLoad(num_seqs=controller.in_flight_limit), 1, 1) == "sequences"


# --- what is leased


def test_what_the_engine_can_run_is_leased_and_a_lead() -> None:
    controller = controller_of()
    assert controller.admit(in_flight=0) == Room(documents=282, prompt_tokens=None)
    assert controller.admit(in_flight=256).documents == 26
    assert controller.admit(in_flight=200, num_ready=10).documents == 256 - 190 + 26 - 10
    assert controller.admit(in_flight=200, jobs_left=3).documents == 3


def test_behind_a_closed_gate_only_the_lead_is_leased() -> None:
    controller = controller_of(num_blocks=100)
    assert controller.start_gate(EngineLoad(num_seqs=5, num_blocks=95), 100, 10) == "kv"

    assert controller.admit(in_flight=15, num_ready=10).documents == 16
    assert controller.admit(in_flight=31, num_ready=26).documents == 0
    # The pool may have been emptied by a cancelled group: the gate is then asked again.
    assert controller.admit(in_flight=5).documents == 26


def test_prompt_tokens_are_leased_as_far_as_the_sla_goes_and_a_step_more() -> None:
    controller = controller_of(ttft_sla_ms=1000.0)
    # Until errors are known, a full step of 8,192 is the margin: 36,000 tokens/s * 1 s, less that, and a step more.
    assert controller.admit(in_flight=0).prompt_tokens == pytest.approx(36_000, abs=2)
    assert controller.admit(in_flight=9, ready_tokens=10_000, waiting_tokens=20_000).prompt_tokens == pytest.approx(
        6000, abs=2
    )
    assert controller.admit(in_flight=9, waiting_tokens=36_001) == Room(documents=0, prompt_tokens=0)


def test_the_shortest_sla_and_the_largest_limit_of_its_queues_are_in_force() -> None:
    controller = controller_of(ttft_sla_ms=1500.0)
    controller.update([AdmissionLimits(max_in_flight=10), AdmissionLimits(max_in_flight=20, ttft_sla_ms=900)])
    assert (controller.in_flight_limit, controller.ttft_sla_ms) == (20, 900)

    controller.update([AdmissionLimits(max_in_flight=10), AdmissionLimits(ttft_sla_ms=0)])
    assert (controller.in_flight_limit, controller.ttft_sla_ms) == (282, 1500)

    controller.update([AdmissionLimits(ttft_sla_ms=0)])
    assert controller.ttft_sla_ms is None

    controller.update([])
    assert (controller.in_flight_limit, controller.ttft_sla_ms) == (282, 1500)


# --- a small engine: it prefills in order, a budget of tokens a step, and decodes one token for each sequence


@dataclass
class Document:
    prompt_tokens: int
    output_tokens: int
    num_left: int = 0
    num_ahead: int = 0
    added_ms: float = 0.0


@dataclass
class SmallEngine:
    """Milliseconds of a step: fixed, for each sequence, for each prefill token; all of it times `slowness`."""

    step_ms: float = 20.0
    step_ms_per_seq: float = 0.04
    step_ms_per_prefill_token: float = 1 / 40
    max_num_batched_tokens: int = 8192
    slowness: float = 1.0
    now_ms: float = 0.0
    waiting: deque[Document] = field(default_factory=deque)
    # With the output tokens that are still to come.
    running: list[tuple[Document, int]] = field(default_factory=list)
    waiting_tokens: int = 0

    def add(self, document: Document) -> None:
        document.num_left, document.num_ahead = document.prompt_tokens, self.waiting_tokens
        document.added_ms = self.now_ms
        self.waiting_tokens += document.prompt_tokens
        self.waiting.append(document)

    @property
    def num_seqs(self) -> int:
        return len(self.running) + len(self.waiting)

    def step(self) -> tuple[int, StepReport]:
        """How many documents ended, and the report."""
        before, num_decoding = self.waiting_tokens, len(self.running)
        begun, num_prefilled = self._prefill(self.max_num_batched_tokens - num_decoding)
        num_seqs = num_decoding + len(begun)
        ms = self.step_ms + self.step_ms_per_seq * num_seqs + self.step_ms_per_prefill_token * num_prefilled
        self.now_ms += ms * self.slowness
        self.running += [(document, document.output_tokens) for document in begun]
        left = [(document, output_tokens - 1) for document, output_tokens in self.running]
        self.running = [entry for entry in left if entry[1]]
        return len(left) - len(self.running), StepReport(
            seconds=ms * self.slowness / 1e3,
            num_waiting_tokens=before,
            num_prefilled_tokens=sum(document.prompt_tokens for document in begun),
            num_output_tokens=num_seqs,
            num_preemptions=0,
            first_tokens=tuple(
                FirstToken(
                    prompt_id="",
                    ttft_ms=self.now_ms - document.added_ms,
                    num_prompt_tokens=document.prompt_tokens,
                    num_tokens_ahead=document.num_ahead,
                )
                for document in begun
            ),
        )

    def _prefill(self, budget: int) -> tuple[list[Document], int]:
        begun, spent = [], 0
        while self.waiting and spent < budget:
            document = self.waiting[0]
            num_tokens = min(document.num_left, budget - spent)
            document.num_left -= num_tokens
            spent += num_tokens
            if document.num_left:
                break
            begun.append(self.waiting.popleft())
            self.waiting_tokens -= document.prompt_tokens
        return begun, spent


@dataclass
class Run:
    """What became of a queue of documents."""

    # For each in the order of their first tokens: how many had ended by then, and its time to first token.
    ttfts: list[tuple[int, float]] = field(default_factory=list)
    # For each step: how many had ended after it, at which time.
    ended: list[tuple[int, float]] = field(default_factory=list)

    def share_over(self, sla_ms: float, since: int = 0, until: int = 10**9) -> float:
        ttfts = [ttft for num_ended, ttft in self.ttfts if since <= num_ended < until]
        return sum(ttft > sla_ms for ttft in ttfts) / len(ttfts)

    def seconds(self, since: int = 0, until: int = 10**9) -> float:
        times = [ms for num_ended, ms in self.ended if since <= num_ended < until]
        return (times[-1] - times[0]) / 1e3


def run(
    controller: DrainController,
    engine: SmallEngine,
    queue: Sequence[Document],
    slowness: Callable[[int], float] = lambda num_ended: 1.0,
    arrived: Callable[[int], int] = lambda num_ended: 10**9,
) -> Run:
    """Everything in the queue, through a controller, as courier and step loop do it.

    Args:
        slowness: of the engine, when so many documents have ended.
        arrived: how many documents are in the queue by then.
    """
    queue, pool, result, num_ended, num_leased = deque(queue), deque(), Run(), 0, 0
    while queue or pool or engine.num_seqs:
        engine.slowness = slowness(num_ended)
        room = controller.admit(
            in_flight=len(pool) + engine.num_seqs,
            num_ready=len(pool),
            ready_tokens=sum(document.prompt_tokens for document in pool),
            waiting_tokens=engine.waiting_tokens,
        )
        leased = _leased(queue, room, arrived(num_ended) - num_leased)
        num_leased += len(leased)
        pool.extend(leased)
        in_flight = len(pool) + engine.num_seqs
        load = EngineLoad(num_seqs=engine.num_seqs, waiting_tokens=engine.waiting_tokens)
        while pool and controller.start_gate(load, pool[0].prompt_tokens, 1) == "open":
            load = load.plus(pool[0].prompt_tokens, 1)
            engine.add(pool.popleft())
        assert engine.num_seqs, "the engine idles though there is backlog"
        num, report = engine.step()
        num_ended += num
        controller.observe(report, limit_used=in_flight >= controller.in_flight_limit)
        result.ttfts += [(num_ended, first.ttft_ms) for first in report.first_tokens]
        result.ended.append((num_ended, engine.now_ms))
    return result


def _leased(queue: deque[Document], room: Room, at_most: int) -> list[Document]:
    leased, num_tokens = [], 0
    while queue and len(leased) < min(room.documents, at_most):
        num_tokens += queue[0].prompt_tokens
        if leased and room.prompt_tokens is not None and num_tokens > room.prompt_tokens:
            break
        leased.append(queue.popleft())
    return leased


def documents(num: int, *, prompt_tokens: int = 3000, output_tokens: int = 60, most: int = 16384) -> list[Document]:
    """Long-tailed."""
    chance = random.Random(0)
    return [
        Document(
            prompt_tokens=min(most, int(chance.lognormvariate(math.log(prompt_tokens), 0.7)) + 1),
            output_tokens=min(2048, int(chance.lognormvariate(math.log(output_tokens), 0.8)) + 1),
        )
        for _ in range(num)
    ]


@given(
    prompt_tokens=st.integers(300, 5000),
    output_tokens=st.integers(5, 100),
    step_ms=st.floats(5, 40),
    per_token=st.floats(1 / 100, 1 / 5),
    seed=st.none() | st.floats(0.2, 5),
    slack=st.floats(5, 20),
)
@bounded(12)
def test_under_constant_load_the_sla_holds_and_the_engine_stays_full(
    prompt_tokens: int, output_tokens: int, step_ms: float, per_token: float, seed: float | None, slack: float
) -> None:
    def engine() -> SmallEngine:
        return SmallEngine(step_ms=step_ms, step_ms_per_prefill_token=per_token)

    full_step_ms = step_ms + 8192 * per_token
    # A bound that the longest document and a full step leave room for.
    sla_ms = slack * full_step_ms
    given_rate = seed * 8192 / full_step_ms * 1e3 if seed else None
    queue = documents(1200, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    controlled = run(controller_of(ttft_sla_ms=sla_ms, seed=given_rate), engine(), queue)
    unbounded = run(controller_of(), engine(), queue)

    assert controlled.share_over(sla_ms, since=300) <= 0.05
    assert unbounded.seconds() >= 0.95 * controlled.seconds()


@pytest.mark.parametrize("output_tokens", [30, 200])
@pytest.mark.parametrize("slowness", [4.0, 0.25])
def test_it_recovers_when_the_engine_changes_its_speed_and_changes_back(slowness: float, output_tokens: int) -> None:
    sla_ms = 2100.0
    queue = documents(3000, output_tokens=output_tokens)

    def speed(num_ended: int) -> float:
        return slowness if 1000 <= num_ended < 2000 else 1.0

    controlled = run(controller_of(ttft_sla_ms=sla_ms), SmallEngine(), queue, speed)
    unbounded = run(controller_of(), SmallEngine(), queue, speed)

    # 200 documents after the change at the latest; the slow engine needs 0.8 of the bound for the longest alone.
    assert controlled.share_over(sla_ms, since=1200, until=2000) <= 0.05
    assert controlled.share_over(sla_ms, since=2200) <= 0.05
    assert unbounded.seconds(since=2500) >= 0.95 * controlled.seconds(since=2500)


def test_it_recovers_from_a_step_that_compiled_for_minutes() -> None:
    compiled: list[int] = []

    def speed(num_ended: int) -> float:
        if num_ended >= 1000 and not compiled:
            compiled.append(num_ended)
            return 2000.0
        return 1.0

    result = run(controller_of(ttft_sla_ms=1500.0), SmallEngine(), documents(2000), speed)

    assert result.share_over(1500.0, since=1300) <= 0.05
    assert result.seconds(since=1500) <= 1.05 * run(controller_of(), SmallEngine(), documents(2000)).seconds(since=1500)


def test_a_burst_after_quiet_hours_keeps_the_sla() -> None:
    # One by one for 500 documents, then the rest at once.
    result = run(
        controller_of(ttft_sla_ms=1500.0),
        SmallEngine(),
        documents(2000),
        arrived=lambda num_ended: num_ended + 1 if num_ended < 500 else 10**9,
    )

    assert result.share_over(1500.0, since=500) <= 0.05


@pytest.mark.parametrize("sla_ms", [0.001, 10.0, 100.0])
def test_an_sla_that_cannot_be_kept_starves_nobody(sla_ms: float) -> None:
    queue = [*documents(300, most=100_000), Document(prompt_tokens=500_000, output_tokens=10)]

    assert run(controller_of(ttft_sla_ms=sla_ms), SmallEngine(), queue).ended[-1][0] == 301


def test_a_rate_thought_too_low_does_not_keep_itself_alive() -> None:
    # Prompts far smaller than a step, let in one by one while nothing more seems possible.
    queue = documents(1500, prompt_tokens=500, most=1000)
    doubtful = run(controller_of(ttft_sla_ms=1500.0, seed=100.0), SmallEngine(), queue)
    sure = run(controller_of(ttft_sla_ms=1500.0), SmallEngine(), queue)

    assert sure.seconds(since=500) >= 0.95 * doubtful.seconds(since=500)


# --- the prefill rate


def prefilled(num_tokens: int, seconds: float, *, num_waiting_tokens: int = 50_000) -> StepReport:
    return step(num_prefilled_tokens=num_tokens, seconds=seconds, num_waiting_tokens=num_waiting_tokens)


def rate_after(reports: Sequence[StepReport], *, seed: float | None = None) -> float | None:
    controller = controller_of(seed=seed)
    for report in reports:
        controller.observe(report, limit_used=True)
    return controller.prefill_tokens_per_s


def test_the_rate_is_a_ratio_of_sums_over_the_steps_that_had_enough_to_prefill() -> None:
    # A prompt's tokens are told with the step that ends its prefill.
    assert rate_after([prefilled(0, 0.2), prefilled(16_384, 0.2)] * 50) == pytest.approx(40_960, rel=0.05)
    # Steps that had less to do are slower for each token, and say nothing.
    slower = prefilled(100, 0.025, num_waiting_tokens=100)
    assert rate_after([prefilled(8192, 0.2), slower, slower] * 50) == pytest.approx(40_960)


def test_decode_steps_are_no_prefill() -> None:
    assert rate_after([step(num_output_tokens=256)] * 100) is None
    assert rate_after([step(num_output_tokens=256)] * 100, seed=30_000.0) == 30_000


def test_a_few_real_steps_outvote_the_warm_up() -> None:
    assert rate_after([prefilled(8192, 0.2)] * 6, seed=80_000.0) == pytest.approx(40_960, rel=0.2)


def test_without_any_other_the_first_step_that_prefilled_says_how_fast_it_is() -> None:
    assert rate_after([prefilled(1000, 0.05, num_waiting_tokens=1000)]) == pytest.approx(20_000)


def test_one_step_of_minutes_does_not_outweigh_all_others() -> None:
    usual = [prefilled(8192, 0.2)] * 40
    assert rate_after([*usual, prefilled(8192, 1200.0)]) > 0.6 * 40_960
    assert rate_after([*usual, *[prefilled(8192, 0.8)] * 20]) < 0.5 * 40_960


# --- companies


def test_the_companies_are_those_that_were_measured() -> None:
    # notes of the project: one poison in 256 and three crashes took 256, 16, 1.
    assert companies(256, 3) == [16, 1]
    assert companies(1024, 3) == [32, 1]
    assert companies(1024, 4) == [94, 9, 1]
    assert companies(1024, 1) == []


@given(MAX_IN_FLIGHT, MAX_CRASHES)
def test_companies_shrink_until_the_last_is_alone(max_in_flight: int, max_crashes: int) -> None:
    steps = [max_in_flight, *companies(max_in_flight, max_crashes)]

    assert len(steps) == max_crashes
    assert steps[-1] == 1
    assert steps == sorted(steps, reverse=True)


@given(MAX_IN_FLIGHT, MAX_CRASHES, st.lists(st.integers(0, 20)))
def test_the_most_suspect_document_bounds_the_company(max_in_flight: int, max_crashes: int, crashes: list[int]) -> None:
    bounds = DrainBounds(max_in_flight=max_in_flight, max_num_seqs=max_in_flight)
    controller = DrainController(bounds, companies=companies(max_in_flight, max_crashes))

    bound = controller.company(crashes)

    if not any(crashes):
        assert bound == 0
    else:
        assert bound == companies(max_in_flight, max_crashes)[min(max(crashes), max_crashes - 1) - 1]


def test_short_steps_that_say_nothing_of_prefill_do_not_raise_the_rate() -> None:
    """An output that was already there takes no time; alone it would count as the fastest step ever."""
    rate = LiveRate(8192, 40_000)
    for _ in range(200):
        rate.observe(1_000, 0.05, full=False)
        rate.observe(1_000, 0.0002, full=False)
    assert rate.tokens_per_s == pytest.approx(40_000, rel=0.15)


def test_a_rate_takes_no_number_that_is_none() -> None:
    rate = LiveRate(8192, 40_000)
    for tokens in (math.nan, math.inf, -1):
        rate.observe(tokens, 1.0, full=True)
    assert rate.tokens_per_s == 40_000
