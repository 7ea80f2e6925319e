"""Which process it is and how it ended, told by one that is not its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ingestq.workers import processes
from ingestq.workers.crash_report import CrashReport
from ingestq.workers.vitals import Duty, Vitals

SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(3600)"]


def test_a_process_is_told_from_a_later_one_of_its_pid() -> None:
    with subprocess.Popen(SLEEP) as process:
        name = processes.identity(process.pid)
        assert not processes.is_dead(name)
        boot, namespace, pid, started = name.split("/")
        assert processes.is_dead(f"{boot}/{namespace}/{pid}/{int(started) - 1}")
        # Of another machine, or another container, nothing is known.
        assert not processes.is_dead(f"other/{namespace}/{pid}/1")
        assert not processes.is_dead(f"{boot}/pid:[1]/{pid}/1")
        assert not processes.is_dead("nonsense")
        process.kill()
        process.wait()
        assert processes.is_dead(name)


@pytest.mark.parametrize("forgetful", [False, True], ids=["linux 6.15", "older linux"])
@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL)"),
        ("import os; os.abort()", "killed by signal 6 (SIGABRT)"),
        ("import os; os._exit(77)", "exited with code 77"),
    ],
)
def test_how_a_process_ended_is_seen_before_its_parent_knows(
    monkeypatch: pytest.MonkeyPatch, forgetful: bool, ending: str, told: str
) -> None:
    if forgetful:
        monkeypatch.setattr(processes, "_PIDFD_GET_INFO", 0)
    process = subprocess.Popen([sys.executable, "-c", f"input(); {ending}"], stdin=subprocess.PIPE)
    watched = processes.Watched(process.pid, os.pidfd_open(process.pid))
    assert not watched.has_ended(0)
    assert watched.exit_status() is None

    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()

    assert watched.has_ended(60)
    status = watched.exit_status()
    assert status is not None
    assert processes.told(status) == told
    process.wait()
    if forgetful:
        assert watched.exit_status() is None


def test_descendants_are_killed_and_no_others() -> None:
    grandchild = f"import subprocess; subprocess.run({SLEEP!r}, env={{}})"
    child = subprocess.Popen([sys.executable, "-c", grandchild], stdout=subprocess.PIPE)
    other = subprocess.Popen(SLEEP)
    try:
        assert child.stdout is not None
        child.stdout.readline()  # the grandchild runs
        family = processes.descendants({child.pid})
        assert len(family) == 1
        assert {processes.identity(child.pid), *family} <= processes.descendants({os.getpid()})

        assert processes.kill_all({processes.identity(child.pid)}) == 2

        assert all(map(processes.is_dead, family))
        assert child.wait() == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_fatal_signal_leaves_a_report_with_stacks() -> None:
    report = CrashReport.create()
    assert (report.text(), report.signal()) == ("", None)
    code = (
        "import ctypes, sys; from ingestq.workers.crash_report import CrashReport\n"
        "CrashReport(int(sys.argv[1])).enable(); ctypes.string_at(0)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(report.fd)], pass_fds=[report.fd], check=False)

    assert ended.returncode == -signal.SIGSEGV
    assert report.signal() == signal.SIGSEGV
    assert "string_at" in report.text()
    os.close(report.fd)


def test_a_promise_that_is_not_kept_is_seen_from_another_mapping() -> None:
    vitals = Vitals.create()
    guardian = Vitals(os.dup(vitals.fd))
    assert guardian.overdue() is None

    vitals.promise(Duty.STEP, 3600.0)
    vitals.promise(Duty.COURIER, -1.0)
    assert guardian.overdue() is Duty.COURIER
    vitals.release(Duty.COURIER)
    assert guardian.overdue() is None

    assert not vitals.preempted
    guardian.announce_preemption()
    assert vitals.preempted
