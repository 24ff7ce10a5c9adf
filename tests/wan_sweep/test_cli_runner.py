"""The runner in one process: what it does when files, reports or the tracker let it down."""

import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from wan_sweep.convert import Candidate
from wan_sweep.environment import Machine
from wan_sweep.plan import Plan, make_plan
from wan_sweep.runner import Sweep
from wan_sweep.schema import Job

OK = "import json, sys; open(sys.argv[1] + '/measurement.json', 'w').write(json.dumps({'outcome': 'ok'}))"


@pytest.fixture(autouse=True)
def report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that does nothing."""
    module = ModuleType("wan_sweep.report")

    def nothing(*arguments: object) -> None:
        """Reports nothing."""

    vars(module).update(write_table=nothing, write_reports=nothing, print_summary=nothing, draw_timeline=nothing)
    monkeypatch.setitem(sys.modules, "wan_sweep.report", module)


class Tracker:
    """Notes what it is told, or always fails."""

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.told: list[str] = []

    def _tell(self, what: str) -> str:
        if not self.works:
            raise ConnectionError("no server")
        self.told.append(what)
        return what

    def open(self) -> None:
        self._tell("open")

    def log_job(self, record_path: Path) -> None:
        self._tell(record_path.parent.name)

    def close_sweep(self, sweep_dir: Path) -> str | None:
        return self._tell(f"http://ui/{sweep_dir.name}")


def plan_in(folder: Path, *jobs: Job) -> Plan:
    return make_plan(
        [Candidate(job=job, axes={"frame_num": job.frame_num}) for job in jobs],
        folder=folder,
        sample=jobs[0],
        machine=Machine(torch_version="2.13.0+cpu"),
        environment={},
        code_version="c0de",
    )


def run_all(plan: Plan, tracker: Tracker | None = None) -> tuple[list[str], int, str]:
    console = Console(file=io.StringIO(), width=200)
    sweep = Sweep(plan, console, tracker=tracker)
    sweep.settle()
    outcomes = [sweep.run(entry, [sys.executable, "-c", OK]) for entry in plan.own_jobs]
    code = sweep.finish()
    assert isinstance(console.file, io.StringIO)
    return outcomes, code, console.file.getvalue()


def test_a_folder_that_cannot_be_written_fails_the_job_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_in(tmp_path / "file" / "stamp", Job(model="tiny", output_root=str(tmp_path)))
    outcomes, code, shown = run_all(plan)
    assert (outcomes, code) == (["failed"], 1)
    assert "The record of job 1 (failed) could not be written: Not a directory" in shown


def test_every_record_is_logged_once_refused_ones_too(tmp_path: Path) -> None:
    tracker = Tracker(works=True)
    plan = plan_in(tmp_path, *(Job(model="tiny", output_root=str(tmp_path), frame_num=n) for n in (9, 80)))
    outcomes, code, shown = run_all(plan, tracker)
    assert (outcomes, code) == (["ok", "refused"], 0)
    assert ["1_frame_num=9", "2_frame_num=80", f"http://ui/{tmp_path.name}"] == tracker.told
    assert f"http://ui/{tmp_path.name}\n" in shown


def test_a_tracker_that_fails_costs_nothing(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, Job(model="tiny", output_root=str(tmp_path)))
    outcomes, code, _ = run_all(plan, Tracker(works=False))
    assert (outcomes, code) == (["ok"], 0)
    assert len(list(tmp_path.glob("1_*/record.json"))) == 1


def test_a_job_is_not_run_twice(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, Job(model="tiny", output_root=str(tmp_path)))
    sweep = Sweep(plan, Console(file=io.StringIO()))
    assert sweep.run(plan.jobs[0], [sys.executable, "-c", OK]) == "ok"
    assert sweep.run(plan.jobs[0], ["/no/such/program"]) == "ok"


def test_jobs_that_were_not_started_are_told(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, *(Job(model="tiny", output_root=str(tmp_path), frame_num=n) for n in (5, 9)))
    console = Console(file=io.StringIO(), width=200)
    Sweep(plan, console).finish()
    assert isinstance(console.file, io.StringIO)
    assert "2 of 2 jobs were not started; the same command runs what is missing." in console.file.getvalue()
