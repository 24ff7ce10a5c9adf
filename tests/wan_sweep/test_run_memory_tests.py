"""scripts/run_memory_tests.sh and the matrix that it runs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import initialize_config_dir
from hydra.types import RunMode

from wan_sweep.convert import candidates_of, job_of
from wan_sweep.record import load_records
from wan_sweep.schema import Job

CONF = Path(__file__).resolve().parents[2] / "conf"
MOST_JOBS = 16

# Plays Python: notes its arguments, and does as much of a sweep as the script looks at.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS/$2"
echo "$PYTHONPATH" > "$CALLS/path"
if [[ "$2" == wan_sweep.checks ]]; then exit "${CHECKS_EXIT:-0}"; fi
for argument in "$@"; do
  if [[ "$argument" == hydra.run.dir=* ]]; then folder="${argument#hydra.run.dir=}"; fi
done
folder="$MADE_IN/memory_tests/${folder##*/}"
mkdir -p "$folder" && touch "$folder/report.md"
exit "${SWEEP_EXIT:-0}"
"""


@dataclass
class Script:
    """A copy of the script in a folder with a space in its name, with a Python that only notes what it is told."""

    root: Path
    calls: Path
    folder: Path

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in {"PYTHON", "PYTHONPATH"}}
        command = ["bash", str(self.root / "scripts/run_memory_tests.sh"), *arguments]
        environment = {**kept, "CALLS": str(self.calls), "MADE_IN": "outputs", **environ}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    def told(self, module: str) -> list[str]:
        return (self.calls / module).read_text().splitlines()


@pytest.fixture
def script(tmp_path: Path, repository: Path) -> Script:
    script = Script(root=tmp_path / "a checkout", calls=tmp_path / "calls", folder=tmp_path / "elsewhere")
    for folder in (script.root / "scripts", script.root / ".venv/bin", script.calls, script.folder):
        folder.mkdir(parents=True)
    for name in ("run_memory_tests.sh", "python.sh"):
        shutil.copy(repository / "scripts" / name, script.root / "scripts")
    put_python(script.root / ".venv/bin/python")
    return script


def put_python(path: Path) -> None:
    path.write_text(FAKE_PYTHON)
    path.chmod(0o755)


def test_arguments_reach_checks_and_sweep_as_they_are(script: Script) -> None:
    arguments = ['prompt="a, $HOME \\"b\\""', "size=832*480", "precision=fp16,bf16", "ckpt_dir=$(touch evaluated)/x y"]
    done = script.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert script.told("wan_sweep.checks") == ["-m", "wan_sweep.checks", *arguments]
    told = script.told("wan_sweep")
    assert told[:3] == ["-m", "wan_sweep", "+experiment=memory_tests"]
    assert told[4:] == arguments
    assert list(script.folder.iterdir()) == [script.folder / "outputs"]


def test_without_arguments_it_runs_as_well_from_any_folder(script: Script) -> None:
    done = script.run()
    assert done.returncode == 0, done.stderr
    assert script.told("path") == [f"{script.root}:{script.root}/Wan2.1"]


def test_the_report_is_named_where_the_sweep_made_it(script: Script) -> None:
    (report,) = script.run().stdout.splitlines()
    assert report.startswith("Report: outputs/memory_tests/")
    assert (script.folder / report.removeprefix("Report: ")).is_file()
    (report,) = script.run("output_root=other place", MADE_IN="other place").stdout.splitlines()
    assert (script.folder / report.removeprefix("Report: ")).parent.parent.parent.name == "other place"


def test_a_refused_check_stops_before_the_sweep(script: Script) -> None:
    assert script.run(CHECKS_EXIT="2").returncode == 2
    assert not (script.calls / "wan_sweep").exists()


def test_the_exit_code_is_that_of_the_sweep_and_the_report_is_named_all_the_same(script: Script) -> None:
    done = script.run(SWEEP_EXIT="1")
    assert done.returncode == 1
    assert done.stdout.startswith("Report: ")


@pytest.mark.parametrize("where", ["PYTHON", "PATH"])
def test_another_python_is_taken_where_it_is_named_or_there_is_none_of_its_own(script: Script, where: str) -> None:
    (script.root / ".venv/bin/python").unlink()
    other = script.root / "bin" / "python3"
    other.parent.mkdir()
    put_python(other)
    environ = {"PYTHON": str(other)} if where == "PYTHON" else {"PATH": f"{other.parent}:{os.environ['PATH']}"}
    assert script.run(**environ).returncode == 0
    assert script.told("wan_sweep")[:2] == ["-m", "wan_sweep"]


@pytest.fixture(scope="module")
def hydra() -> Iterator[ConfigLoader]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture(scope="module")
def matrix(hydra: ConfigLoader) -> list[Job]:
    config = hydra.load_configuration("config", ["+experiment=memory_tests"], run_mode=RunMode.MULTIRUN)
    return [nameless(candidate.job) for candidate in candidates_of(config, hydra)]


def nameless(job: Job) -> Job:
    return job.replace(name="any", description=None)


def job(hydra: ConfigLoader, override: str) -> Job:
    return nameless(job_of(hydra.load_configuration("config", [override], run_mode=RunMode.RUN)))


def test_the_matrix_begins_with_the_baseline_and_contains_memory_opt(hydra: ConfigLoader, matrix: list[Job]) -> None:
    assert len(matrix) <= MOST_JOBS
    assert matrix[0] == job(hydra, "+experiment=baseline")
    assert matrix[0] == nameless(Job(output_root=matrix[0].output_root, load_strategy="block", precision="fp16"))
    assert job(hydra, "optimization=memory_opt") in matrix


@pytest.mark.parametrize("knob", ["precision", "load_strategy", "offload", "attention_slicing"])
def test_each_knob_of_the_matrix_differs_alone_from_the_baseline(knob: str, matrix: list[Job]) -> None:
    first, *others = matrix
    assert sum(first == other.replace(**{knob: getattr(first, knob)}) for other in others) == 1


@pytest.mark.slow
def test_the_matrix_runs_and_its_report_is_there(
    repository: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    overrides = ["model=tiny", "device=cpu", "size=96*64", "frame_num=1", "sample_steps=2", "precision=fp32"]
    overrides += ["load_strategy=block", "offload=false", "save_video=false", "track=false"]
    command = ["bash", str(repository / "scripts/run_memory_tests.sh"), *overrides]
    environment = {**child_environment, "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the jobs run on the CPU" in done.stdout
    (report,) = tmp_path.glob("outputs/memory_tests/*/report.md")
    assert f"Report: {report.relative_to(tmp_path)}" in done.stdout
    records = load_records(report.parent)
    assert [(record.outcome, record.knobs["attention_slicing"]) for record in records] == [("ok", False), ("ok", True)]
    assert json.loads((report.parent / "plan.json").read_text())["sweep"]["name"] == "memory_tests"
