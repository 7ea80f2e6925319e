"""`ingestq plan`: what fits on a machine, how fast and at what price, before anything runs. It needs no Redis."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from ..common.settings import Settings
from .article import judge
from .article import render as render_verdicts
from .command import EXIT_CODES, ExitCode, leave, print_json
from .plan_report import render, to_json
from .plan_request import MAX_TOKENS, PlanRequest, find
from .presets import PRESETS
from .progress import printable

# Columns where there is no terminal to ask: a log, a file, an issue.
_WIDTH = 120


class _Finite(click.FloatRange):
    """A float in a range; click lets nan and inf pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


_TOKENS = click.IntRange(1, MAX_TOKENS)
_GIB = _Finite(0, 2**20, min_open=True)


_OPTIONS = (
    click.option("--model", help="A folder with config.json, or a known one: gemma-4-26b-a4b (default: INGEST_MODEL)."),
    click.option("--chips", metavar="NAME", help="The machine: v6e-4, v5e-8, h100, cpu ... (default: INGEST_CHIPS)."),
    click.option("--memory", type=_GIB, metavar="GIB", help="Of one device, if not as known; a CPU needs it."),
    click.option("--kv-cache-memory", type=_GIB, metavar="GIB", help="For the KV cache; as VLLM_CPU_KVCACHE_SPACE."),
    click.option("--preset", type=click.Choice(list(PRESETS)), help="A tier of service; other options override it."),
    click.option("--engine-config", metavar="FILE", help="As INGEST_ENGINE_CONFIG: a YAML in vLLM's argument names."),
    click.option("--prompt-tokens", type=_TOKENS, metavar="N", help="Of one document, where none is given."),
    click.option("--output-tokens", type=_TOKENS, metavar="N", default=256, show_default=True, help="Of one document."),
    click.option("--shared-prefix-tokens", type=_TOKENS, metavar="N", help="The first N of each prompt are the same."),
    click.option("--documents", type=click.IntRange(1, 10**15), metavar="N", help="How many; files are then a sample."),
    click.option("--system", metavar="TEXT", help="As in `enqueue`: counted with each document."),
    click.option("--instruction", metavar="TEXT", help="As in `enqueue`: counted with each document."),
    click.option("--tokenizer", metavar="PATH", help="The model's tokenizer.json or its folder (default: --model's)."),
    click.option("--kv-cache-dtype", metavar="NAME", help="auto, bfloat16, fp8, fp8_e4m3 or fp8_e5m2."),
    click.option("--max-model-len", type=_TOKENS, metavar="N", help="Default: what the longest document needs."),
    click.option("--max-num-seqs", type=click.IntRange(1, 1_000_000), metavar="N", help="Default: suggested."),
    click.option("--max-num-batched-tokens", type=_TOKENS, metavar="N", help="Default: suggested."),
    click.option("--tensor-parallel-size", type=click.IntRange(1, 4096), metavar="N", help="Default: all devices."),
    click.option("--gpu-memory-utilization", type=_Finite(0, 1, min_open=True), metavar="X", help="Default: 0.92."),
    click.option("--price-per-hour", type=_Finite(0, 1e12), metavar="X", help="Of the machine, in any currency."),
    click.option("--deadline", type=_Finite(0, 1e9, min_open=True), metavar="HOURS", help="For all of the documents."),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, metavar="[PATH... | -]")
@_with_options
@click.option("--article", is_flag=True, help="Judge the article that the project started from, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, in base units.")
def plan(paths: tuple[str, ...], article: bool, as_json: bool, **options: Any) -> None:
    """Says what fits, how fast and at what price, before anything runs; each figure with its formula and source.

    PATH is what `ingestq enqueue` takes: the documents' tokens are counted, and the plan is made for their average.
    Without it say --prompt-tokens. INGEST_ENGINE_* and INGEST_ENGINE_CONFIG count as they do for a worker.
    """
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    if article:
        verdicts = judge()
        _print([asdict(verdict) for verdict in verdicts], render_verdicts(verdicts, width), as_json)
        return
    findings, num_refused = find(paths, PlanRequest(**options), Settings.from_env())
    _print(to_json(findings), render(findings, width), as_json)
    if not findings.fits or not findings.meets_deadline:
        leave(ExitCode.DOES_NOT_FIT)
    leave(ExitCode.DOCUMENTS if num_refused else ExitCode.OK)


def _print(fields: Any, text: str, as_json: bool) -> None:
    if as_json:
        print_json(json.dumps(fields).encode())  # orjson refuses the integers of absurd models
    else:
        click.echo("\n".join(map(printable, text.splitlines())))
