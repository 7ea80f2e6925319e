"""The runbook and the systemd unit name what there is: files, settings, commands, options."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import click
import pytest

from ingestq.common.settings import variables
from ingestq.producer.cli import main as ingestq
from ingestq.workers.acceptance.cli import main as acceptance

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
UNIT = ROOT / "deploy" / "ingestq-worker@.service"


class _Unit(RawConfigParser):
    """systemd's files: names keep their case and may come more than once; the last counts here."""

    def __init__(self) -> None:
        super().__init__(strict=False)
        self.optionxform = str


def unit() -> dict[str, str]:
    parser = _Unit()
    parser.read(UNIT)
    return dict(parser["Service"])


@pytest.mark.parametrize("text", [RUNBOOK, UNIT.read_text()], ids=["runbook", "unit"])
def test_every_setting_that_is_named_exists(text: str) -> None:
    named = set(re.findall(r"\bINGEST_[A-Z_]*[A-Z]\b", text))

    assert {name for name in named if not name.startswith("INGEST_ENGINE_")} <= set(variables())
    assert {name for name in named if name.startswith("INGEST_ENGINE_")} <= {"INGEST_ENGINE_CONFIG"}


def test_every_file_that_is_named_exists() -> None:
    for path in re.findall(r"\bdeploy/[\w@./-]+\w", RUNBOOK):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:engines/)?[\w-]+\.(?:env|yaml|conf|acl))`", RUNBOOK):
        assert (ROOT / "deploy" / path).exists() or path == "engine.yaml", path


def test_every_command_and_option_of_ours_exists() -> None:
    commands = re.findall(r"(?:^|[`/ ])(ingestq(?:-acceptance)?)((?: [\w-]+)*[^`\n|]*)", RUNBOOK, re.MULTILINE)
    assert len(commands) > 10
    for name, rest in commands:
        command: click.Command = ingestq if name == "ingestq" else acceptance
        for word in rest.split():
            if isinstance(command, click.Group) and word in command.commands:
                command = command.commands[word]
            elif word.startswith("--"):
                assert word in {option for param in command.params for option in param.opts}, f"{name}{rest}"


def test_the_failures_and_the_exit_codes_of_the_unit_are_the_workers() -> None:
    assert unit()["RestartPreventExitStatus"] == "2"  # of BatchWorker, for bad settings
    assert unit()["Restart"] == "on-failure"
    assert unit()["KillMode"] == "control-group"  # README: `mixed` would kill the guardian
    assert "-w ingestq.workers.BatchWorker" in unit()["ExecStart"]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd-analyze is not installed")
    installed = tmp_path / "ingestq-worker@a.service"
    installed.write_text(UNIT.read_text().replace("/opt/ingestq/bin/rq", str(Path(sys.executable).parent / "rq")))

    done = subprocess.run([analyze, "verify", str(installed)], capture_output=True, text=True)

    assert (done.returncode, [line for line in done.stderr.splitlines() if "ingestq" in line]) == (0, [])
