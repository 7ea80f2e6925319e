"""Section "machine": what all the other figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from redis import Redis

from .probe import Answer
from .report import Section, Verdict


def machine_section(probe: Answer, redis: Redis) -> Section:
    """The machine, the engine and the versions of everything that has a say."""
    kinds = sorted({device["kind"] for device in probe.devices})
    figures = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "CPU": _cpu(Path("/proc/cpuinfo").read_text()),
        "CPUs usable": len(os.sched_getaffinity(0)),
        "memory, GiB": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "device": probe.card["device"],
        "accelerators": f"{len(probe.devices)} x {', '.join(kinds)}" if kinds else None,
        "HBM, GiB": sum(device["bytes_limit"] for device in probe.devices) / 2**30 or None,
        "server": _server(redis),
        **{f"{name} version": value for name, value in probe.versions.items()},
    }
    device = figures["accelerators"] or f"the {probe.card['device']}"
    found = f"{probe.card['engine']} on {device}, model {probe.card['model']}"
    return Section(
        name="machine", title="Machine and versions", verdict=Verdict.PASS, reason=f"{found}.", figures=figures
    )


def _cpu(cpuinfo: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "?")


def _server(redis: Redis) -> str:
    info: Any = redis.info("server")
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info.get('redis_version'))}"
