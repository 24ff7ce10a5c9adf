"""What many tests need: folders, the command line in a process of its own, a worker without torch."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Two test processes on two cores: more threads than that only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts on a CPU, is chatty otherwise

REPOSITORY = Path(__file__).resolve().parent.parent

# Speaks the protocol of wan_sweep.worker; what becomes of the job is told by its prompt.
FAKE_WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
what = job["knobs"]["prompt"]

if sys.argv[2] == "attribution":
    told = {"schema_version": 1, "outcome": "oom", "reason": "as before", "peaks": [], "oom": None}
    (folder / "attribution.json").write_text(json.dumps(told))
    sys.exit(3)

def say(event, kind, name, index=None, total=None):
    line = {"time": time.time(), "event": event, "kind": kind, "name": name, "index": index, "total": total}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")

def measured(outcome, **more):
    values = {"outcome": outcome, "reason": "", "failure": None, "warnings": [], "idle_knobs": {}, "ranks": [],
              "metrics": {"memory/peak/allocated_bytes": 64 * 2**20, "time/total_s": 0.1},
              "series": {"step/allocated_bytes": [1, 2]}, "environment": {"cuda": "none"}, "weights": "random"}
    (folder / "measurement.json").write_text(json.dumps(values | more))

print("working on", what, flush=True)
say("begin", "phase", "denoise")
say("begin", "step", "step", 0, 4)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "hang":
    Path(__file__).with_name("hangs").write_text(str(os.getpid()))
    time.sleep(600)
if what == "wait":
    time.sleep(600)
if what == "leave":
    subprocess.Popen(["sleep", "600"], start_new_session=True)
if what == "fail":
    raise ValueError("the pipeline broke")
if what == "oom":
    measured("oom", reason="out of memory in denoise, step 1 of 4", failure={"kind": "oom"})
    sys.exit(3)
say("end", "step", "step", 0, 4)
say("end", "phase", "denoise")
measured("ok")
"""

# By it limits are measured. While the process lives whose number is in the file `hangs`, an hour passes at each look:
# what hangs is found out at once, and nothing else is taken for it because the machine is slow.
CLOCK = """
import sys, time
from pathlib import Path

from wan_sweep.launch import process

class Clock:
    hangs = Path(sys.argv[1]).with_name("hangs")
    ahead = 0.0

    def monotonic(self):
        if self.hangs.exists() and Path("/proc", self.hangs.read_text()).exists():
            self.ahead += 3600
        return time.monotonic() + self.ahead

process.time = Clock()
"""

DRIVER = (
    CLOCK
    + """
import types

import wan_sweep

report = types.ModuleType("wan_sweep.report")
report.__path__ = [str(Path(wan_sweep.__file__).parent / "report")]  # what draws nothing is the real one
report.write_table = report.write_reports = lambda folder: None
report.print_summary = lambda folder, console: console.print("summary")
report.draw_timeline = lambda folder: None
sys.modules["wan_sweep.report"] = report

from wan_sweep import cli

sys.exit(cli.run(sys.argv[2:], worker=(sys.executable, sys.argv[1])))
"""
)

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, so that no test process is left with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def environment() -> dict[str, str]:
    """For a child that imports the packages of this checkout."""
    theirs = os.environ.get("PYTHONPATH", "")  # where packages need not be installed to be found
    folders = os.pathsep.join(filter(None, [str(REPOSITORY), str(REPOSITORY / "Wan2.1"), theirs]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "CUDA", "HYDRA"))}
    return {**kept, "PYTHONPATH": folders}


def fits_one_screen(words: str) -> bool:
    """Whether 24 lines of 120 columns show it whole."""
    return sum(max(1, len(textwrap.wrap(line, 120))) for line in words.splitlines()) <= 24


def wait_for(condition: Callable[[], object], seconds: float = 200.0) -> None:
    """Returns as soon as it is so, however slow the machine.

    Raises:
        AssertionError: it has not become so.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Clock:
    """Stands still until a test lets time pass: who hits a limit is then no question of how fast the machine is."""

    def __init__(self) -> None:
        self._now = 0.0
        self._passes = 0.0

    def let_pass(self, seconds: float) -> None:
        """By the next look at the clock, however often this is said until then."""
        self._passes = seconds

    def monotonic(self) -> float:
        self._now += self._passes
        self._passes = 0.0
        return self._now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which a job's limits are measured."""
    made = Clock()
    monkeypatch.setattr("wan_sweep.launch.process.time", made)
    return made


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def wan_sweep(tmp_path: Path) -> Command:
    """Runs `python -m wan_sweep` in an empty folder; the worker is the real one."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "wan_sweep", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240, check=False
        )

    return run


@pytest.fixture
def fake_worker(tmp_path: Path) -> Path:
    """A worker without torch: what becomes of its job is told by the prompt."""
    path = tmp_path / "fake_worker.py"
    path.write_text(FAKE_WORKER)
    return path


@pytest.fixture
def fake_command(tmp_path: Path, fake_worker: Path) -> list[str]:
    """The command line with the fake worker, and without plots and MLflow; arguments are appended."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    return [sys.executable, str(driver), str(fake_worker), "track=false"]


@pytest.fixture
def fake_sweep(tmp_path: Path, fake_command: list[str]) -> Command:
    """Runs the fake command line in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*fake_command, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240, check=False
        )

    return run


@pytest.fixture
def child_environment() -> dict[str, str]:
    return environment()
