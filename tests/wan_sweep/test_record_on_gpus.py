"""scripts/record_on_gpus.py: sweeps side by side until the time is over, and an archive of what is there."""

import importlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.conftest import wait_for
from wan_sweep.convert import candidates_of

CONF = Path(__file__).resolve().parents[2] / "conf"

# Plays a sweep: leaves a record that names its GPU, or hangs until it is asked to end.
FAKE_PYTHON = """#!/usr/bin/env bash
[[ "$1" == -m ]] || exit 0
for argument in "$@"; do
  if [[ "$argument" == hydra.run.dir=* ]]; then folder="${argument#hydra.run.dir=}"; fi
done
mkdir -p "$folder/1_job"
echo "$CUDA_VISIBLE_DEVICES ${PYTORCH_ALLOC_CONF:-} $*" > "$folder/1_job/record.json"
touch "$folder/1_job/frames.npy"
if [[ "$folder" == */"$HANGS" ]]; then exec sleep 600; fi
"""


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    module = importlib.import_module("record_on_gpus")
    monkeypatch.setattr(module.sys, "executable", str(fake))
    monkeypatch.setenv("HANGS", "none")
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(script.sys, "argv", ["record_on_gpus.py", *arguments])
    return int(script.main())


def test_all_sweeps_run_on_both_gpus_and_their_records_are_packed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(script, monkeypatch, str(tmp_path / "out"), "sample_steps=1") == 0
    with tarfile.open(tmp_path / "out/record.tar.gz") as archive:
        names = archive.getnames()
    assert {f"{name}/1_job/record.json" for name, _, _ in script.SWEEPS} < set(names)
    assert not [name for name in names if name.endswith(".npy")]
    calls = {name: (tmp_path / "out" / name / "1_job/record.json").read_text() for name, _, _ in script.SWEEPS}
    assert {call[0] for call in calls.values()} == {"0", "1"}
    assert "expandable_segments:True" in calls["small-segments"]
    assert "expandable" not in calls["small"]
    assert all(call.count("sample_steps=") == 1 and "sample_steps=1" in call for call in calls.values())


def test_sweeps_can_be_chosen_and_a_wrong_name_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, str(tmp_path / "out"), "--sweeps", "middle") == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["middle"]
    with pytest.raises(SystemExit):
        run(script, monkeypatch, str(tmp_path / "other"), "--sweeps", "middle,huge")
    assert "--sweeps=huge is not one of small, large-fastest" in capsys.readouterr().err


def test_when_the_time_is_over_sweeps_are_stopped_and_what_is_there_is_packed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def now() -> float:
        if not (tmp_path / "out/small.txt").exists():
            return 0.0
        wait_for((tmp_path / "out/small/1_job/frames.npy").exists)  # which comes last
        return 600.0

    monkeypatch.setenv("HANGS", "small")
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=now))
    packed = tmp_path / "else/where.tar.gz"
    flags = ["--gpus", "0", "--seconds", "500", "--archive", str(packed)]
    assert run(script, monkeypatch, str(tmp_path / "out"), *flags) == 1
    assert "GPU 0: small ended with -15" in capsys.readouterr().out
    with tarfile.open(packed) as archive:
        assert archive.getnames() == ["small/1_job/record.json", "small.txt"]


@pytest.mark.parametrize("number", range(12))
def test_every_sweep_plans(script: ModuleType, number: int) -> None:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir
    from hydra.types import RunMode

    assert len(script.SWEEPS) == 12
    name, overrides, _ = script.SWEEPS[number]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)
        candidates = candidates_of(config, loader)
    assert len(candidates) == {"small": 4, "middle": 3}.get(name, 1)


@pytest.mark.slow
def test_on_a_cpu_it_ends_with_the_table(repository: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    tiny = ["model=tiny", "device=cpu", "size=96*64", "frame_num=1", "sample_steps=1", "kernels=torch"]
    tiny += ["attention_kernel=sdpa", "optimization=none,memory_opt"]
    script = repository / "scripts/record_on_gpus.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), "--sweeps", "small", *tiny],
        env={**child_environment, "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| tiny 96\\*64 | memory\\_opt |" in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1] == f"Packed: {tmp_path / 'out/record.tar.gz'}"
