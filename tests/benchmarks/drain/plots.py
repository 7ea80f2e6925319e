"""Pictures of a run over simulated time: what was in flight, times to first token, rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .analysis import ttft_points
from .run import Run

# Simulated seconds that one point of a rate is about.
_WINDOW = 10.0


def plot(run: Run, sla_ms: float | None, folder: Path) -> Path:
    """Writes NAME.png; returns its path.

    Raises:
        ImportError: matplotlib is not there (the extra `bench`).
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(11, 11), sharex=True, layout="constrained")
    _in_flight(axes[0], run)
    _kv_tokens(axes[1], run)
    _ttft(axes[2], run, sla_ms)
    _rates(axes[3], run)
    for axis in axes:
        for at, _ in run.marks:
            axis.axvline(_simulated(run, at), color="grey", linewidth=0.6, linestyle=":")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    top = axes[0].get_ylim()[1]
    for at, what in run.marks:
        axes[0].text(_simulated(run, at), top, what, rotation=90, va="top", ha="right", fontsize=6)
    axes[-1].set_xlabel("simulated seconds")
    scenario = run.scenario
    figure.suptitle(
        f"{scenario.name}: {scenario.num_documents:,} documents, {scenario.num_engines} simulated engines, "
        f"clock x{run.factor:.3g}, machine {run.busy_share:.0%} busy"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scenario.name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _simulated(run: Run, at: float) -> float:
    return (at - run.start) * run.factor


def _in_flight(axis, run: Run) -> None:
    looks = run.observed.looks
    times = [_simulated(run, look.at) for look in looks]
    axis.plot(times, [look.in_flight for look in looks], label="documents in flight, fleet")
    axis.plot(times, [sum(look.queued) for look in looks], label="queued", linewidth=0.6)
    if any(look.limits.max_in_flight_fleet is not None for look in looks):
        limits = [look.limits.max_in_flight_fleet for look in looks]
        axis.plot(times, limits, color="red", label="max_in_flight_fleet", linewidth=1)
    axis.set_ylabel("documents")


def _kv_tokens(axis, run: Run) -> None:
    looks = run.observed.looks
    times = [_simulated(run, look.at) for look in looks]
    for name in run.steps if len(run.steps) <= 4 else ():
        axis.plot(times, [look.kv_by_worker[name] / 1e3 for look in looks], label=f"reserved, {name}", linewidth=0.6)
    if len(run.steps) > 4:
        axis.plot(times, [look.kv_tokens / 1e3 for look in looks], label="reserved, fleet", linewidth=0.8)
    elif run.scenario.bounds.max_kv_tokens:
        axis.axhline(run.scenario.bounds.max_kv_tokens / 1e3, color="red", linewidth=1, label="max_kv_tokens")
    axis.set_ylabel("thousand KV tokens")


def _ttft(axis, run: Run, sla_ms: float | None) -> None:
    points = ttft_points(run)
    axis.plot([at for at, _ in points], [value for _, value in points], label="TTFT p95, of 2 s", linewidth=0.8)
    if sla_ms:
        axis.axhline(sla_ms, color="red", linewidth=1, label="SLA")
    axis.set_ylabel("ms")


def _rates(axis, run: Run) -> None:
    series: Sequence[tuple[str, str]] = (
        ("prefill", "num_prefilled_tokens"),
        ("decode x 10", "num_output_tokens"),
    )
    for label, name in series:
        sums: dict[int, float] = {}
        for steps in run.steps.values():
            for step in steps:
                window = int(_simulated(run, step.end) / _WINDOW)
                sums[window] = sums.get(window, 0.0) + getattr(step, name)
        scale = 10 if "10" in label else 1
        times = sorted(sums)
        axis.plot(
            [(time + 0.5) * _WINDOW for time in times],
            [sums[time] * scale / _WINDOW / 1e3 for time in times],
            label=label,
        )
    axis.set_ylabel("thousand tokens/s, fleet")
