"""Whole sweeps through Hydra, with a worker that only speaks the protocol."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_for
from wan_sweep.record import Record, load_records

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]


def sweeps(root: Path, name: str = "sweep") -> list[Path]:
    return sorted((root / "outputs" / name).iterdir())


def outcomes(records: list[Record]) -> list[tuple[int, str]]:
    return [(record.number, record.outcome) for record in records]


def processes_in(folder: Path) -> list[int]:
    """Processes that were started with something of this folder."""
    everything = psutil.process_iter(["pid", "cmdline"])
    return [one.info["pid"] for one in everything if any(str(folder) in word for word in one.info["cmdline"] or [])]


def test_every_outcome_is_a_record_and_the_others_go_on(fake_sweep: Command, tmp_path: Path) -> None:
    done = fake_sweep("-m", "prompt=ok,kill,oom,fail,hang,leave", "frame_num=9,80", "stall_timeout_s=300")
    assert done.returncode == 1, done.stderr
    records = load_records(sweeps(tmp_path)[0])
    by_prompt = {record.overrides["prompt"]: record for record in records if record.outcome != "refused"}
    assert {str(prompt): record.outcome for prompt, record in by_prompt.items()} == {
        "ok": "ok",
        "kill": "failed",
        "oom": "oom",
        "fail": "failed",
        "hang": "timeout",
        "leave": "ok",
    }
    assert sum(record.outcome == "refused" for record in records) == 6
    assert by_prompt["hang"].reason.startswith("no event for 300 s in denoise, step 1 of 4")
    assert by_prompt["fail"].reason == "exit code 1 in denoise, step 1 of 4: ValueError: the pipeline broke"
    assert by_prompt["ok"].metrics == {"memory/peak/allocated_bytes": 64 * 2**20, "time/total_s": 0.1}
    assert by_prompt["ok"].environment["cuda"] == "none"
    assert processes_in(tmp_path) == []
    assert "Traceback" not in done.stdout + done.stderr
    assert "summary" in done.stdout


def test_a_job_folder_holds_what_the_job_was(fake_sweep: Command, tmp_path: Path) -> None:
    done = fake_sweep("prompt=ok", "device=cpu", "precision=bf16")
    assert done.returncode == 0, done.stderr
    folder = sweeps(tmp_path)[0] / "1_tiny"
    assert {"job.json", "config.yaml", "record.json", "events.jsonl", "measurement.json", "log.txt"} == {
        path.name for path in folder.iterdir()
    }
    job = json.loads((folder / "job.json").read_text())
    record = json.loads((folder / "record.json").read_text())
    assert (job["job"], job["job"]["number"], job["knobs"]) == (record["job"], 1, record["knobs"])
    assert 'precision: "bf16"\n' in (folder / "config.yaml").read_text()
    assert (folder / "log.txt").read_text() == "working on ok\n"


def test_an_oom_and_a_refusal_alone_are_no_failure(fake_sweep: Command) -> None:
    assert fake_sweep("-m", "prompt=oom,ok", "frame_num=9,80").returncode == 0


def test_the_same_command_does_only_what_is_missing(fake_sweep: Command, tmp_path: Path) -> None:
    fake_sweep("-m", "prompt=ok,fail")
    done = fake_sweep("-m", "prompt=ok,fail,leave", "name=other")
    assert "2 to run, 1 done before" in done.stdout
    first, second = sweeps(tmp_path)[0], load_records(sweeps(tmp_path, "other")[0])
    assert outcomes(second) == [(1, "skipped"), (2, "failed"), (3, "ok")]
    assert second[0].measured_in == str(first / "1_prompt=ok")
    assert second[0].metrics == load_records(first)[0].metrics


def test_repeats_run_round_by_round(fake_sweep: Command, tmp_path: Path) -> None:
    fake_sweep("-m", "prompt=ok,leave", "repeats=2")
    records = load_records(sweeps(tmp_path)[0])
    assert [(record.overrides["prompt"], record.repeat) for record in records] == [
        ("ok", 0),
        ("leave", 0),
        ("ok", 1),
        ("leave", 1),
    ]
    assert len({record.key for record in records}) == 4
    assert sorted(records, key=lambda record: record.started_at) == records
    fake_sweep("prompt=ok", "repeats=3", "name=single")
    assert outcomes(load_records(sweeps(tmp_path, "single")[0])) == [(1, "skipped"), (2, "skipped"), (3, "ok")]


def test_a_duplicate_runs_once(fake_sweep: Command, tmp_path: Path) -> None:
    done = fake_sweep("-m", "prompt=ok", "device=cpu", "sample_steps=4,null")
    assert done.returncode == 0, done.stderr
    assert outcomes(load_records(sweeps(tmp_path)[0])) == [(1, "ok")]


def test_a_plan_runs_nothing(wan_sweep: Command, tmp_path: Path) -> None:
    done = wan_sweep("-m", "precision=fp16,bf16", "offload=true,false", "plan=true", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "sweep sweep" in done.stdout
    assert "4 to run" in done.stdout
    assert [path.name for path in sweeps(tmp_path)[0].iterdir()] == ["plan.json"]
    plan = json.loads((sweeps(tmp_path)[0] / "plan.json").read_text())
    assert [job["name"] for job in plan["jobs"][:2]] == [
        "1_precision=fp16,offload=true",
        "2_precision=fp16,offload=false",
    ]


def test_help_shows_commands_presets_and_knobs(wan_sweep: Command) -> None:
    done = wan_sweep("--help")
    assert done.returncode == 0, done.stderr
    assert "python -m wan_sweep -m precision=fp16,bf16 offload=true,false" in done.stdout
    assert "optimization: balanced, fastest, fastest_fp8, lowest_memory, memory_opt, none" in done.stdout
    assert "  precision=fp16\n      Weights and compute of the DiT.\n      fp16, bf16 or fp32\n" in done.stdout


def test_a_folder_that_is_there_is_left_alone(fake_sweep: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = fake_sweep("prompt=ok", "hydra.run.dir=mine")
    assert done.returncode == 2
    assert "mine is there already" in done.stderr
    assert list((tmp_path / "mine").iterdir()) == []


def test_two_sweeps_at_once_do_not_touch_each_other(
    fake_command: list[str], child_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*fake_command, "-m", "prompt=ok,oom", "resume=false"]
    both = [subprocess.Popen(command, cwd=tmp_path, env=child_environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    folders = sweeps(tmp_path)
    assert len(folders) == 2
    for folder in folders:
        assert outcomes(load_records(folder)) == [(1, "ok"), (2, "oom")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_keeps_what_it_has_and_can_be_continued(
    fake_command: list[str], child_environment: dict[str, str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [*fake_command, "-m", "prompt=ok,wait,leave"],
        cwd=tmp_path,
        env=child_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - as in a terminal
    )
    under_way = "outputs/sweep/*/2_prompt=wait/events.jsonl"
    wait_for(lambda: any('"step"' in path.read_text() for path in tmp_path.glob(under_way)))
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=240)
    assert code == process.returncode
    assert "Traceback" not in stdout + stderr
    assert "1 of 3 jobs were not started; the same command runs what is missing." in stdout
    records = load_records(sweeps(tmp_path)[0])
    assert outcomes(records) == [(1, "ok"), (2, "failed")]
    assert records[1].reason.startswith("interrupted in denoise")
    assert [pid for pid in processes_in(tmp_path) if pid != os.getpid()] == []


def test_a_record_that_finds_the_disk_full_is_told_and_the_others_go_on(fake_sweep: Command, tmp_path: Path) -> None:
    # The disk is full when the first record is written, and has space again afterwards.
    driver = tmp_path / "driver.py"
    limit = (
        "import wan_sweep.runner as runner, errno\n"
        "whole = runner.write_record\n"
        "def full(folder, record):\n"
        "    if record.number == 1: raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    whole(folder, record)\n"
        "runner.write_record = full\n"
    )
    driver.write_text(driver.read_text().replace("sys.exit(cli", limit + "sys.exit(cli"))
    done = fake_sweep("-m", "prompt=ok,oom")
    assert done.returncode == 1
    assert "The record of job 1 (ok) could not be written: No space left on device" in done.stdout
    assert outcomes(load_records(sweeps(tmp_path)[0])) == [(2, "oom")]


def test_a_report_that_breaks_is_told_and_costs_no_record(fake_sweep: Command, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(driver.read_text().replace('lambda folder, console: console.print("summary")', "None"))
    done = fake_sweep("prompt=ok")
    assert done.returncode == 1
    assert "The report could not be made: TypeError" in done.stdout
    assert outcomes(load_records(sweeps(tmp_path)[0])) == [(1, "ok")]


def test_an_experiment_is_a_sweep_without_m(fake_sweep: Command, tmp_path: Path) -> None:
    done = fake_sweep("+experiment=memory_opt", "prompt=ok", "optimization=none,memory_opt")
    assert done.returncode == 0, done.stderr
    records = load_records(sweeps(tmp_path, "memory_opt")[0])
    assert [record.overrides for record in records] == [{"optimization": "none"}, {"optimization": "memory_opt"}]
    assert [record.knobs["offload"] for record in records] == [False, True]
