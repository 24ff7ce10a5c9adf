"""How jobs end badly. Each child is a few lines of Python; whatever it does, no process of it is left."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Clock
from wan_sweep.launch import Interrupted, Limits, Result, launch, worker_environment
from wan_sweep.launch.events import Event
from wan_sweep.launch.process import LOOKS_PER_SECOND, Ending, run_process
from wan_sweep.launch.tree import MARK, marked

PREAMBLE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "pid").write_text(str(os.getpid()))
def say(event, kind, name, index=None, total=None):
    with (folder / "events.jsonl").open("a") as file:
        print(json.dumps(dict(time=0.0, event=event, kind=kind, name=name, index=index, total=total)), file=file)
def tell(values):
    (folder / "measurement.json").write_text(json.dumps(values))
def be_silent():
    say("end", "block", "block")
    while True: time.sleep(600)
say("begin", "phase", "denoise")
say("begin", "step", "step", 1, 4)
"""


def run_child(
    folder: Path, body: str, limits: Limits | None = None, *, on_block: Callable[[], None] = lambda: None
) -> tuple[Result, list[Event]]:
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if event.kind == "block":
            on_block()

    command = [sys.executable, "-c", PREAMBLE + body]
    result = launch(folder, limits=limits or Limits(timeout_s=120), on_event=hear, command=command)
    return result, events


def run_into_silence(folder: Path, body: str, clock: Clock) -> Result:
    """The child does what it does, and then nothing for longer than it may."""
    limits = Limits(stall_timeout_s=300, grace_s=0.3)
    return run_child(folder, body + "\nbe_silent()", limits, on_block=lambda: clock.let_pass(301))[0]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def child_pid(folder: Path, name: str = "pid") -> int:
    return int((folder / name).read_text())


def test_a_measurement_speaks_for_itself(tmp_path: Path) -> None:
    result, events = run_child(tmp_path, "tell(dict(outcome='ok', reason='', metrics={'a': 1}))")
    assert (result.outcome, result.reason, result.measurement["metrics"]) == ("ok", "", {"a": 1})
    assert [event.name for event in events] == ["denoise", "step"]


def test_a_measured_oom_is_an_oom(tmp_path: Path) -> None:
    result, _ = run_child(tmp_path, "tell(dict(outcome='oom', reason='full', failure={'at': 'step 1'})); sys.exit(3)")
    assert (result.outcome, result.reason, result.failure) == ("oom", "full", {"at": "step 1"})


def test_a_kill_from_outside_is_told_with_place_and_likely_cause(tmp_path: Path) -> None:
    result, _ = run_child(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert result.outcome == "failed"
    assert result.reason.startswith("killed by SIGKILL in denoise, step 2 of 4; the kernel's out-of-memory killer")
    assert result.failure is not None
    assert (
        result.failure["kind"],
        result.failure["exit_code"],
        result.failure["where"],
    ) == ("signal", -9, "denoise, step 2 of 4")


def test_an_error_is_told_by_its_last_words(tmp_path: Path) -> None:
    result, _ = run_child(tmp_path, "say('end', 'step', 'step', 1, 4)\nraise ValueError('boom')")
    assert (result.outcome, result.reason) == ("failed", "exit code 1 in denoise: ValueError: boom")
    assert result.failure is not None
    assert result.failure["log_tail"][0] == "Traceback (most recent call last):"


def test_a_crash_leaves_its_stack_in_the_log(tmp_path: Path) -> None:
    result, _ = run_child(tmp_path, "import ctypes; ctypes.string_at(0)")
    assert result.reason.startswith("killed by SIGSEGV in denoise, step 2 of 4")
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "log.txt").read_text()


def test_silence_is_a_stall(tmp_path: Path, clock: Clock) -> None:
    result = run_into_silence(tmp_path, "", clock)
    assert (
        result.outcome,
        result.reason,
    ) == ("timeout", "no event for 300 s in denoise, step 2 of 4; raise stall_timeout_s if that is expected")
    assert not is_running(child_pid(tmp_path))


def test_a_busy_job_is_stopped_by_the_wall_limit_only(tmp_path: Path, clock: Clock) -> None:
    body = "while True: say('begin', 'block', 'block', 0, 2); say('end', 'block', 'block', 0, 2); time.sleep(0.05)"
    limits = Limits(stall_timeout_s=300, timeout_s=1000)
    result, _ = run_child(tmp_path, body, limits, on_block=lambda: clock.let_pass(200))
    assert result.outcome == "timeout"
    assert result.reason.startswith("longer than timeout_s=1000 in denoise, step 2 of 4")
    assert not is_running(child_pid(tmp_path))


def test_a_job_that_ignores_sigterm_is_killed(tmp_path: Path, clock: Clock) -> None:
    result = run_into_silence(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", clock)
    assert result.failure is not None
    assert result.failure["exit_code"] == -signal.SIGKILL
    assert not is_running(child_pid(tmp_path))


def test_numbers_told_before_a_limit_are_kept(tmp_path: Path, clock: Clock) -> None:
    result = run_into_silence(tmp_path, "tell(dict(outcome='ok'))", clock)
    assert result.outcome == "ok"
    assert [warning["code"] for warning in result.warnings] == ["ended_by_limit"]


GRANDCHILD = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(folder / "grandchild").write_text(str(child.pid))
"""


@pytest.mark.parametrize("ending", ["tell(dict(outcome='ok'))", "os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_grandchild_in_a_session_of_its_own_is_gone_too(tmp_path: Path, ending: str) -> None:
    result, _ = run_child(tmp_path, GRANDCHILD + ending)
    assert not is_running(child_pid(tmp_path, "grandchild"))
    assert [warning["code"] for warning in result.warnings] == ["left_behind"]


def test_an_orphan_of_an_orphan_is_gone_too(tmp_path: Path, clock: Clock) -> None:
    body = """
code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
code += "start_new_session=True); open(sys.argv[1], 'w').write(str(p.pid))"
subprocess.run([sys.executable, "-c", code, str(folder / "grandchild")], start_new_session=True)
"""
    run_into_silence(tmp_path, body, clock)
    assert not is_running(child_pid(tmp_path, "grandchild"))


def test_a_damaged_measurement_is_a_failure_that_says_so(tmp_path: Path) -> None:
    result, _ = run_child(tmp_path, "(folder / 'measurement.json').write_text('{')")
    assert result.outcome == "failed"
    assert "measurement.json is damaged" in result.reason


def test_exit_code_three_without_a_measurement_is_an_oom(tmp_path: Path) -> None:
    result, _ = run_child(tmp_path, "print('no space to tell'); sys.exit(3)")
    assert (
        result.outcome,
        result.reason,
    ) == ("oom", "out of memory in denoise, step 2 of 4, and no measurement was written: no space to tell")


def test_a_command_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        launch(tmp_path, limits=Limits(), on_event=print, command=["/no/such/program"])


def test_an_interrupted_parent_leaves_no_process(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as error:
        run_child(tmp_path, GRANDCHILD + "be_silent()", on_block=interrupt)
    assert isinstance(error.value.__cause__, KeyboardInterrupt)
    assert error.value.where == "denoise, step 2 of 4"
    assert not is_running(child_pid(tmp_path))
    assert not is_running(child_pid(tmp_path, "grandchild"))


def test_an_error_in_the_parent_leaves_no_process(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("in the display")

    with pytest.raises(RuntimeError, match="in the display"):
        run_child(tmp_path, "be_silent()", on_block=fail)
    assert not is_running(child_pid(tmp_path))


def run_alone(folder: Path, code: str, look: Callable[[], bool]) -> Ending:
    return run_process(
        [sys.executable, "-c", code],
        folder=folder,
        log=folder / "log.txt",
        environment=worker_environment(),
        limits=Limits(timeout_s=120),
        look=look,
    )


def test_the_parent_sleeps_while_it_waits(tmp_path: Path) -> None:
    looks = []
    started, worked_before = time.monotonic(), time.process_time()
    run_alone(tmp_path, "import time; time.sleep(2)", lambda: bool(looks.append(1)))
    seconds, worked = time.monotonic() - started, time.process_time() - worked_before
    assert 1 < len(looks) <= seconds * LOOKS_PER_SECOND + 1  # the last one when all is over
    assert worked < 1  # of the two seconds that a parent takes which does not sleep


def test_other_jobs_are_left_alone(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    other = subprocess.Popen(["/bin/sleep", "600"], env={**os.environ, MARK: mark}, start_new_session=True)
    try:
        run_child(tmp_path, "tell(dict(outcome='ok'))")
        assert other.poll() is None
        assert [other.pid] == [process.pid for process in marked(mark)]
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()


def test_a_process_without_pidfd_is_waited_for_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    ending = run_alone(tmp_path, "import sys; sys.exit(5)", lambda: False)
    assert (ending.exit_code, ending.limit) == (5, None)


def test_a_worker_imports_the_same_packages_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}")
    body = "import wan_sweep.schema as a, wan21 as b; tell(dict(outcome='ok', reason=a.__file__ + '|' + b.__file__))"
    result, _ = run_child(tmp_path, body)
    import wan21
    import wan_sweep.schema

    assert f"{wan_sweep.schema.__file__}|{wan21.__file__}" == result.reason
