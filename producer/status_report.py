"""`ingestq status` for people: what waits, what is in flight against which limit, and what each worker does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..common.worker_load import LOAD_TTL
from .progress import printable
from .units import beside, duration, rounded

# What an engine card may say besides (see `EngineCard`), and how it is shown.
_FOUND = {
    "kv_cache_dtype": "KV cache {}",
    "num_kv_tokens": "{:,} tokens",
    "num_blocks": "{:,} blocks",
    "block_size": "of {} tokens",
    "prefill_tokens_per_s": "prefill {:,.0f} tokens/s",
    "decode_tokens_per_s": "decode {:,.0f} tokens/s",
    "recompiles": "since then {} recompiles",
    "num_preemptions": "{} preemptions",
    "draft_acceptance": "{:.0%} of speculative tokens accepted",
}
# What the load says more freshly.
_LIVE = ("num_preemptions", "draft_acceptance")

# Tenants that are listed, those with most documents first.
_MAX_TENANTS = 10

# Columns at most, where the terminal is wider: longer lines are hard to read.
_WIDTH = 110


def render_queue(state: Mapping[str, Any], width: int) -> str:
    """Args: width: columns of the terminal."""
    width = min(width, _WIDTH)
    lines = [f"queue: {state['queue']}", beside("queued: ", _queued(state), width)]
    lines += (beside("  ", line, width) for line in _tenants(state["tenants"]))
    lines += (f"{name}: {state[name]:,}" for name in ("running", "scheduled", "finished", "failed", "cancelled"))
    lines.append(f"suspended: {state['suspended']}")
    if state["for_newer_workers"]:
        lines.append(f"of the first queued, {state['for_newer_workers']} wait for a worker of a newer release")
    lines += (beside(head, text, width) for head, text in _fleet(state["fleet"]))
    lines.append(f"workers: {len(state['workers'])}")
    for worker in state["workers"]:
        lines += (beside(head, text, width) for head, text in _worker(worker))
    lines += (beside("machine ", printable(_machine(machine)), width) for machine in state["machines"])
    return "\n".join(lines)


def _queued(state: Mapping[str, Any]) -> str:
    told = [f"{state['queued']:,}"]
    if state["oldest_s"] is not None:
        told.append(f"the oldest for {duration(state['oldest_s'])}")
    if state["queued"]:
        eta = state["eta_s"]
        rate = f"at {rounded(state['fleet']['documents_per_s'])} documents/s"
        told.append(
            "ETA unknown: nothing was finished in the last minute" if eta is None else f"ETA {duration(eta)} {rate}"
        )
    return ", ".join(told)


def _tenants(tenants: Mapping[str, Any]) -> Iterator[str]:
    waiting = sorted(
        ((name, backlog) for name, backlog in tenants.items() if backlog["queued"]), key=lambda item: -item[1]["queued"]
    )
    if not any(name for name, _ in waiting):
        return
    for name, backlog in waiting[:_MAX_TENANTS]:
        oldest = "" if backlog["oldest_s"] is None else f", the oldest for {duration(backlog['oldest_s'])}"
        yield printable(f"{tenant_told(name)}: {backlog['queued']:,}{oldest}")
    if len(waiting) > _MAX_TENANTS:
        rest = waiting[_MAX_TENANTS:]
        yield f"{len(rest)} more tenants: {sum(backlog['queued'] for _, backlog in rest):,}"


def tenant_told(tenant: str) -> str:
    return f"tenant {tenant}" if tenant else "no tenant"


def _fleet(fleet: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    documents = _against(fleet["in_flight"], fleet["limits"]["max_in_flight_fleet"], "documents")
    tokens = _against(fleet["kv_tokens"], fleet["limits"]["max_kv_tokens_fleet"], "KV tokens")
    yield "in flight: ", f"{documents}, {tokens}"
    if fleet["num_live"]:
        yield "rates: ", _rates(fleet)
        if fleet["ttft_p95_ms"] is not None:
            yield "TTFT: ", f"{_ttft(fleet)} (of the slowest worker each)"
    for closed in fleet["closed"]:
        yield "closed: ", printable(f"{closed['gate']}: {closed['why']}")


def _worker(worker: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"  {printable(worker['name'])}: ", _engine(worker)
    load = worker["load"]
    if found := _found(worker, live=load is not None):
        yield f"    {'warm-up':<11} ", found
    if load is None:
        yield "    ", f"no live figures in the last {LOAD_TTL} s"
        return
    for head, text in _load(load):
        yield f"    {head:<11} ", printable(text)
    for sentence in worker["advice"]:
        yield "    advice      ", sentence


def _engine(worker: Mapping[str, Any]) -> str:
    if worker.get("model") is None:
        return "its engine is not known yet"
    return printable(
        f"{worker['model']} on {worker['device']}, {worker['engine']}, "
        f"max_model_len {worker['max_model_len']}, max_num_seqs {worker['max_num_seqs']}"
    )


def _found(card: Mapping[str, Any], *, live: bool) -> str:
    """What the warm-up found and has been counted since, if the card says so."""
    return ", ".join(
        form.format(card[name])
        for name, form in _FOUND.items()
        if card.get(name) is not None and not (live and name in _LIVE)
    ).replace(" blocks, of ", " blocks of ")


def _load(load: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    documents = _against(load["in_flight"], load["max_in_flight"], "documents")
    tokens = _against(load["kv_tokens"], load["max_kv_tokens"] or None, "KV tokens")
    yield "in flight", f"{documents} ({load['num_running']} in the engine, {load['num_ready']} ready), {tokens}"
    for closed in load["closed"]:
        yield "closed", f"{closed['gate']}: {closed['why']}"
    yield "rates", _rates(load)
    if load["ttft_p50_ms"] is not None:
        sla = load["ttft_sla_ms"]
        bound = "" if not sla else f"; SLA {_ms(sla)} for {load['ttft_percentile']:.0%}"
        yield "TTFT", _ttft(load) + bound
    if load["queue_p50_ms"] is not None:
        yield "in Redis", f"p50 {_s(load['queue_p50_ms'])}, p95 {_s(load['queue_p95_ms'])} from enqueue to lease"
    kv = [f"{load['kv_usage']:.0%} of its blocks in use", f"{load['num_preemptions']} preemptions"]
    if load["prefix_hit_rate"] is not None:
        kv.append(f"{load['prefix_hit_rate']:.0%} of prompt tokens cached")
    yield "KV cache", ", ".join(kv)
    if load["draft_acceptance"] is not None:
        yield "speculation", f"{load['draft_acceptance']:.0%} of speculative tokens accepted"


def _against(number: int, limit: int | None, unit: str) -> str:
    """What is in flight, against its limit if there is one."""
    if limit is None:
        return f"{number:,} {unit} (no limit)"
    return f"{number:,} of {limit:,} {unit}"


def _rates(rates: Mapping[str, Any]) -> str:
    told = [
        f"{word} {rounded(rates[name])} tokens/s"
        for word, name in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s"))
        if rates[name] is not None
    ]
    documents, tokens = rounded(rates["documents_per_s"]), rounded(rates["tokens_per_s"])
    return "; ".join([", ".join(told), f"{documents} documents/s, {tokens} tokens/s over a minute"]).lstrip("; ")


def _ttft(times: Mapping[str, Any]) -> str:
    names = (("p50", "ttft_p50_ms"), ("p95", "ttft_p95_ms"), ("p99", "ttft_p99_ms"))
    return ", ".join(f"{word} {_ms(times[name])}" for word, name in names if times[name] is not None)


def _ms(milliseconds: float | None) -> str:
    # Not `duration`, whose three digits don't tell 1,996 ms from an SLA of 2 s.
    return "unknown" if milliseconds is None else f"{milliseconds:,.0f} ms"


def _s(milliseconds: float | None) -> str:
    return "unknown" if milliseconds is None else duration(milliseconds / 1000)


def _machine(machine: Mapping[str, Any]) -> str:
    failures = machine["start_failures"] + machine["run_failures"]
    state = "takes no work" if machine["takes_no_work"] else "backs off between starts"
    return f"{machine['name']}: {state}: {failures} failures in a row, the last: {machine['reason']}"
