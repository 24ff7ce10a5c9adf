"""scripts/run_record.sh and the sweep that it runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import initialize_config_dir
from hydra.types import RunMode

from wan_sweep.convert import candidates_of

CONF = Path(__file__).resolve().parents[2] / "conf"

# Plays Python: notes each call, and leaves what the script looks for after a sweep.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s ' "$@" >> "$CALLS"
echo >> "$CALLS"
[[ "$1" == -m ]] || exit 0
[[ "$*" != *REFUSED* ]] || exit 2
for argument in "$@"; do
  if [[ "$argument" == hydra.run.dir=* ]]; then folder="${argument#hydra.run.dir=}"; fi
done
mkdir -p "$folder" && touch "$folder/results.csv"
[[ "$*" != *FAILS* ]] || exit 1
"""


@pytest.fixture
def script(tmp_path: Path, repository: Path) -> Path:
    folder = tmp_path / "a checkout"
    for part in ("scripts", ".venv/bin"):
        (folder / part).mkdir(parents=True)
    for name in ("run_record.sh", "python.sh"):
        shutil.copy(repository / "scripts" / name, folder / "scripts")
    python = folder / ".venv/bin/python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return folder / "scripts/run_record.sh"


def run(script: Path, *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and the calls of Python."""
    calls = script.parents[2] / "calls"
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHON", "PYTHONPATH"}}
    command = ["bash", str(script), *arguments]
    environment = {**kept, "CALLS": str(calls)}
    done = subprocess.run(command, cwd=script.parents[2], env=environment, check=False, timeout=240)
    return done.returncode, calls.read_text().splitlines()


def test_without_arguments_all_workloads_run_and_stand_in_one_table(script: Path) -> None:
    code, (*sweeps, table) = run(script)
    assert code == 0
    asked = [call.split(" ", 4)[4].strip() for call in sweeps]
    assert asked == [
        "model=t2v-1.3B size=832*480",
        "model=t2v-14B size=832*480",
        "model=t2v-14B size=1280*720",
    ]
    assert all(call.startswith("-m wan_sweep +experiment=record hydra.run.dir=outputs/record/") for call in sweeps)
    assert table.startswith(f"{script.parent}/record_table.py outputs/record/")
    assert table.count("outputs/record/") == len(sweeps) + 1
    assert table.strip().endswith(".md")


def test_a_model_makes_it_one_sweep_with_the_arguments_as_they_are(script: Path) -> None:
    code, (sweep, table) = run(script, "model=t2v-14B", "size=1280*720", "output_root=else where")
    assert code == 0
    assert "hydra.run.dir=else where/record/" in sweep
    assert sweep.strip().endswith("model=t2v-14B size=1280*720 output_root=else where")
    assert "--output else where/record/" in table


def test_a_sweep_that_is_not_well_does_not_stop_the_others(script: Path) -> None:
    code, calls = run(script, "description=FAILS")
    assert code == 1
    assert len(calls) == 4


def test_where_all_is_refused_there_is_no_table(script: Path) -> None:
    code, calls = run(script, "model=t2v-1.3B", "description=REFUSED")
    assert code == 2
    assert len(calls) == 1


def test_the_sweep_begins_with_the_plain_run_that_the_others_are_compared_with() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", ["+experiment=record"], run_mode=RunMode.MULTIRUN)
        candidates = candidates_of(config, loader)
    assert len(candidates) == 8
    assert candidates[0].axes == {"vae_precision": "fp32", "optimization": "none"}
    assert {candidate.job.precision for candidate in candidates} == {"bf16"}
    assert {candidate.axes["optimization"] for candidate in candidates} == {
        "none",
        "fastest",
        "balanced",
        "lowest_memory",
    }


@pytest.mark.slow
def test_on_a_cpu_it_ends_with_the_table(repository: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    overrides = ["model=tiny", "device=cpu", "size=96*64", "frame_num=1", "sample_steps=2", "vae_precision=fp32"]
    overrides += ["optimization=none,balanced", "save_video=false", "track=false"]
    command = ["bash", str(repository / "scripts/run_record.sh"), *overrides]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**child_environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("outputs/record/*.md")
    assert written.read_text("utf-8") in done.stdout
    assert "| tiny 96\\*64 | balanced |" in written.read_text("utf-8")
    assert "| equal " in written.read_text("utf-8")
