"""Hydra's launchers: the same twelve jobs, one of them killed, one out of memory, give the same table with each."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wan_sweep.record import load_records
from wan_sweep.store import read_json

pytestmark = pytest.mark.slow

PROMPTS = "prompt=one,two,kill,four,five,six,seven,eight,nine,oom,eleven,one"
LAUNCHERS = {
    "basic": ("hydra", ["hydra/launcher=basic"]),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]),
}

# The module has to be imported, not run: a task that is sent to another process is found there by its name.
START = "import sys; from wan_sweep import cli; sys.exit(cli.run(sys.argv[2:], worker=(sys.executable, sys.argv[1])))"

EXPECTED = [
    (1, "ok", "one"),
    (2, "ok", "two"),
    (3, "failed", "kill"),
    (4, "ok", "four"),
    (5, "ok", "five"),
    (6, "ok", "six"),
    (7, "ok", "seven"),
    (8, "ok", "eight"),
    (9, "ok", "nine"),
    (10, "oom", "oom"),
    (11, "ok", "eleven"),
]


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture
def run(tmp_path: Path, fake_worker: Path, child_environment: dict[str, str]) -> Callable[..., str]:
    """Runs a sweep in an empty folder with the worker that does what the prompt says."""
    environment = {**child_environment, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}

    def start(*arguments: str, code: int = 1) -> str:
        command = [sys.executable, "-c", START, str(fake_worker), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr  # 1: a job failed
        return done.stdout + done.stderr

    return start


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_twelve_jobs_give_the_same_table_with_every_launcher(
    run: Callable[..., str], tmp_path: Path, launcher: str
) -> None:
    module, choice = LAUNCHERS[launcher]
    if not is_there(module):
        pytest.skip(f"{module} is not installed; it is an extra of the package")
    fixed = ("model=tiny", "device=cpu", "track=false", "fidelity=false")
    said = run("-m", *choice, *fixed, PROMPTS)
    (sweep,) = (tmp_path / "outputs" / "sweep").iterdir()
    records = load_records(sweep)
    assert [(record.number, record.outcome, record.overrides["prompt"]) for record in records] == EXPECTED, said
    assert records[2].reason.startswith("killed by SIGKILL in denoise, step 1 of 4")
    lines = (sweep / "results.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(number), outcome] for number, outcome, _ in EXPECTED]
    assert "Traceback" not in said
    if launcher == "joblib":  # what is done is done, whoever did it
        assert "9 done before" in run("-m", *choice, *fixed, PROMPTS, "plan=true", code=0)


def test_the_gpus_of_a_cluster_are_those_that_its_launcher_asks_for(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    if not is_there("hydra_plugins.hydra_submitit_launcher"):
        pytest.skip("hydra-submitit-launcher is not installed; it is an extra of the package")
    cluster = ("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=2")
    quick = ("model=tiny", "size=96*64", "frame_num=1", "sample_steps=1")  # what is planned for a GPU is estimated
    knobs = (*quick, "device=cuda", "ulysses_size=1,2,4", "track=false", "plan=true")
    command = [sys.executable, "-m", "wan_sweep", "-m", *cluster, *knobs]
    done = subprocess.run(
        command, cwd=tmp_path, env=child_environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 to run, 1 refused" in done.stdout
    assert "ulysses_size=4 needs 4 GPUs, this machine has 2" in done.stdout
    (plan,) = tmp_path.glob("outputs/sweep/*/plan.json")
    environment = read_json(plan)["environment"]
    assert environment["where"] == "submitit_slurm"
    assert "fingerprint" not in environment
