import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from wan_sweep.checks import Check, Probes, run_checks
from wan_sweep.checks.allocator import check_allocator
from wan_sweep.checks.gpu import check_mode, check_speed
from wan_sweep.checks.host import JOB_BYTES, LEAST_BYTES, check_disk, check_memory, existing
from wan_sweep.checks.software import OLDEST_TORCH, check_cuda, check_cudnn, check_driver, check_torch
from wan_sweep.checks.variables import check_variables
from wan_sweep.environment import Gpu, Machine
from wan_sweep.nvml import GpuProcess, GpuState
from wan_sweep.units import GIB

H100 = Gpu(name="NVIDIA H100", total_bytes=80 * GIB, used_bytes=GIB)
GOOD = Machine(gpus=(H100,), driver="580.159.04", driver_cuda="13.0", torch_version="2.11.0+cu130", torch_cuda="13.0")
CPU_ONLY = Machine(torch_version="2.13.0+cpu", torch_cuda="")
CPU_BUILD = Machine(gpus=(H100,), driver="580", driver_cuda="13.0", torch_version="2.13.0+cpu", torch_cuda="")
QUIET = GpuState(index=0, allocated_bytes=0, compute_mode="default", has_ecc=True)


def states(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def checks_of(machine: Machine = GOOD, devices: Sequence[str] = ("auto",), **probes: Any) -> list[Check]:
    made_up: dict[str, Any] = {
        "environ": {},
        "package_version": {"nvidia-cudnn-cu13": "9.19.0.56"}.get,
        "gpus": lambda: [QUIET],
        "our_processes": lambda: {1},
        "free_bytes": lambda _: 100 * GIB,
        "host_available_bytes": lambda: 64 * GIB,
    }
    return run_checks(
        machine,
        "warn",
        devices=devices,
        output_root=Path("outputs"),
        say=lambda words: pytest.fail(f"waited: {words}"),
        probes=Probes(**made_up | probes),
    )


def test_on_a_good_machine_everything_is_looked_at_and_ok() -> None:
    checks = checks_of()
    assert states(checks) == dict.fromkeys(
        ["driver", "torch", "cuda", "cudnn", "allocator", "variables", "disk", "memory", "processes", "mode", "speed"],
        "ok",
    )
    assert all(check.text and not check.advice for check in checks)
    assert checks[0].to_dict() == {
        "name": "driver",
        "state": "ok",
        "text": "580.159.04 for CUDA up to 13.0; NVIDIA H100",
        "advice": "",
    }


@pytest.mark.parametrize(("machine", "devices"), [(CPU_ONLY, ["auto"]), (GOOD, ["cpu"]), (CPU_BUILD, ["cpu"])])
def test_jobs_on_the_cpu_need_nothing_of_a_gpu(machine: Machine, devices: list[str]) -> None:
    checks = checks_of(machine, devices, gpus=lambda: pytest.fail("a GPU was asked"))
    assert states(checks) == dict.fromkeys(["driver", "torch", "variables", "disk", "memory"], "ok")


def test_only_the_gpus_that_the_jobs_use_are_looked_at() -> None:
    busy = GpuState(index=1, processes=(GpuProcess(pid=42, name="python"),), slowdowns=("power",))
    assert set(states(checks_of(gpus=lambda: [QUIET, busy])).values()) == {"ok"}
    assert states(checks_of(gpus=lambda: [busy, QUIET]))["processes"] == "warning"


@pytest.mark.parametrize(
    ("machine", "devices", "state", "words"),
    [
        (Machine(driver_problem="Driver/library version mismatch"), ["auto"], "refused", "version mismatch"),
        (Machine(driver_problem="Driver/library version mismatch"), ["cpu"], "ok", "version mismatch"),
        (CPU_ONLY, ["auto"], "ok", "no NVIDIA driver is loaded; the jobs run on the CPU"),
        (CPU_ONLY, ["cuda"], "refused", "device=cuda is asked for"),
        (CPU_ONLY, ["cuda", "cpu"], "warning", "device=cuda is asked for"),
        (Machine(driver="580"), ["auto"], "ok", "see CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_driver_that_is_needed_must_answer(machine: Machine, devices: list[str], state: str, words: str) -> None:
    check = check_driver(machine, devices)
    assert (check.state, words in check.text) == (state, True)
    assert bool(check.advice) == (state != "ok")


@pytest.mark.parametrize(
    ("machine", "devices", "state"),
    [
        (CPU_BUILD, ["auto"], "refused"),
        (CPU_BUILD, ["cuda"], "refused"),
        (CPU_BUILD, ["cpu"], "ok"),
        (CPU_ONLY, ["auto"], "ok"),
        (Machine(torch_version="2.5.1+cu124"), ["cpu"], "refused"),
        (Machine(torch_version="2.6.0a0+git12"), ["cpu"], "ok"),
        (Machine(), ["cpu"], "refused"),
    ],
)
def test_torch_has_to_be_new_enough_and_built_for_the_device(machine: Machine, devices: list[str], state: str) -> None:
    check = check_torch(machine, devices)
    assert (check.state, machine.torch_version in check.text) == (state, True)


def test_the_oldest_torch_is_the_one_of_the_requirements(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert f"torch>={'.'.join(map(str, OLDEST_TORCH))}" in project["dependencies"]


@pytest.mark.parametrize(
    ("torch_cuda", "driver_cuda", "state"),
    [
        ("13.0", "13.0", "ok"),
        ("12.8", "13.0", "ok"),
        ("12.8", "12.4", "ok"),  # within a major version, kernels run on older drivers
        ("13.0", "12.9", "refused"),
        (None, "12.9", "ok"),
        ("13.0", "", "ok"),
    ],
)
def test_a_driver_too_old_for_torch_is_refused_with_both_numbers(
    torch_cuda: str | None, driver_cuda: str, state: str
) -> None:
    check = check_cuda(Machine(torch_cuda=torch_cuda, driver_cuda=driver_cuda))
    assert check.state == state
    if state == "refused":
        assert {"13.0", "12.9"} <= set(check.text.replace(",", "").split())


@pytest.mark.parametrize(
    ("torch_version", "packages", "state", "words"),
    [
        ("2.11.0+cu130", {"nvidia-cudnn-cu13": "9.19.0.56"}, "ok", "9.19.0.56"),
        ("2.9.1+cu130", {"nvidia-cudnn-cu13": "9.13.0.50"}, "warning", "9.13.0.50"),
        ("2.8.0+cu130", {"nvidia-cudnn-cu13": "9.10.2.21"}, "ok", "9.10.2.21"),
        ("2.9.1+cu130", {"nvidia-cudnn-cu12": "9.10.2.21"}, "ok", "no package tells"),
    ],
)
def test_a_cudnn_that_half_precision_convolutions_go_around_is_warned_of(
    torch_version: str, packages: Mapping[str, str], state: str, words: str
) -> None:
    machine = Machine(torch_version=torch_version, torch_cuda="13.0")
    check = check_cudnn(machine, lambda name: packages.get(name, ""))
    assert (check.state, words in check.text) == (state, True)


OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    ("environ", "state", "words"),
    [
        ({}, "ok", "torch's defaults"),
        ({NEW: "expandable_segments:True"}, "ok", "expandable_segments:True"),
        ({OLD: "roundup_power2_divisions:[256:1,>:4], backend:native"}, "ok", "[256:1,>:4]"),
        ({OLD: "max_split_size_mb:128", NEW: "max_split_size_mb: 128"}, "ok", "max_split_size_mb:128"),
        ({OLD: "max_split_size_mb:128", NEW: "max_split_size_mb:64"}, "refused", "differ"),
        ({OLD: "backend:cudaMallocAsync"}, "refused", "counters"),
        ({OLD: "expandable_segments:true"}, "refused", "expandable_segments:true"),
        ({OLD: "expandable_segments"}, "refused", "no value"),
        ({OLD: "expandable_segment:True"}, "warning", "expandable_segment "),
        ({OLD: "max_split_size_mb:64,max_split_size_mb:128"}, "warning", "to 64 and to 128"),
        ({OLD: "expandable_segments:True,max_split_size_mb:64"}, "warning", "does nothing"),
        ({OLD: "per_process_memory_fraction:0.5"}, "warning", "limits"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "0"}, "refused", "all peaks would read 0"),
    ],
)
def test_the_allocators_settings_are_stated_or_what_is_wrong_with_them(
    environ: Mapping[str, str], state: str, words: str
) -> None:
    (check,) = check_allocator(environ, "2.11.0+cu130")
    assert (check.state, words in check.text) == (state, True), check.text
    assert bool(check.advice) == (state != "ok")


def test_an_option_almost_known_is_guessed() -> None:
    (check,) = check_allocator({OLD: "max_split_size:64"}, "2.11.0")
    assert check.advice == "did you mean max_split_size_mb?"


@pytest.mark.parametrize(("torch_version", "state"), [("2.9.1", "warning"), ("2.11.0", "ok")])
def test_the_new_name_of_the_settings_is_warned_of_where_torch_passes_over_it(torch_version: str, state: str) -> None:
    (check,) = check_allocator({NEW: "expandable_segments:True"}, torch_version)
    assert check.state == state


@pytest.mark.parametrize(
    ("environ", "uses_gpu", "names"),
    [
        ({"CUDA_LAUNCH_BLOCKING": "1"}, True, ["CUDA_LAUNCH_BLOCKING"]),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, False, []),
        ({"CUDA_LAUNCH_BLOCKING": "0", "TORCH_LOGS": ""}, True, []),
        ({"NVIDIA_TF32_OVERRIDE": "0"}, True, ["NVIDIA_TF32_OVERRIDE"]),
        ({"TORCH_LOGS": "+dynamo", "PYTHONTRACEMALLOC": "1"}, False, ["TORCH_LOGS", "PYTHONTRACEMALLOC"]),
        ({"CUDA_MODULE_LOADING": "LAZY"}, True, []),
    ],
)
def test_variables_that_spoil_a_measurement_are_warned_of(
    environ: Mapping[str, str], names: list[str], *, uses_gpu: bool
) -> None:
    warned = [check for check in check_variables(environ, uses_gpu=uses_gpu) if check.state == "warning"]
    assert [check.advice for check in warned] == [f"unset {name}" for name in names]


@pytest.mark.parametrize(
    ("free", "num_jobs", "state"),
    [
        (16 * JOB_BYTES, 16, "ok"),
        (16 * JOB_BYTES - 1, 16, "warning"),
        (LEAST_BYTES, 1, "warning"),
        (LEAST_BYTES - 1, 1, "refused"),
    ],
)
def test_the_disk_needs_room_for_all_jobs(free: int, num_jobs: int, state: str) -> None:
    check = check_disk(Path("outputs"), free, num_jobs)
    assert (check.state, "output_root" in check.advice) == (state, state != "ok")


def test_the_disk_of_a_folder_that_is_not_there_yet_is_that_of_the_one_above(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize(
    ("available", "uses_gpu", "state"), [(4 * GIB, True, "ok"), (2 * GIB, True, "warning"), (2 * GIB, False, "ok")]
)
def test_a_worker_needs_host_memory(available: int, state: str, *, uses_gpu: bool) -> None:
    assert check_memory(available, uses_gpu=uses_gpu).state == state


@pytest.mark.parametrize(
    ("gpu", "state", "words"),
    [
        (QUIET, "ok", "compute mode default, ECC on"),
        (GpuState(index=0), "ok", "the driver tells nothing"),
        (GpuState(index=0, compute_mode="prohibited"), "refused", "prohibited"),
        (GpuState(index=0, is_split=True), "warning", "MIG"),
    ],
)
def test_a_gpu_must_be_free_to_compute_and_is_better_whole(gpu: GpuState, state: str, words: str) -> None:
    check = check_mode(gpu)
    assert (check.state, words in check.text) == (state, True)


def test_clocks_that_are_held_down_make_times_incomparable() -> None:
    hot = GpuState(index=0, slowdowns=("temperature",), temperature_c=91)
    check = check_speed(hot)
    assert (check.state, "91 degrees Celsius; its clocks are held down now: temperature" in check.text) == (
        "warning",
        True,
    )


@pytest.mark.parametrize(("limit", "state"), [(700_000, "ok"), (310_000, "warning"), (None, "ok")])
def test_a_lowered_power_limit_makes_times_incomparable(limit: int | None, state: str) -> None:
    gpu = GpuState(index=0, power_limit_mw=limit, default_power_limit_mw=700_000)
    assert check_speed(gpu).state == state


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["device=cpu", "precision=fp16,bf16"], 0, "the jobs run on the CPU"),
        (["device=gpu"], 2, "device=gpu cannot be: choose auto, cuda or cpu"),
        (["foreign_processes=kill"], 2, "foreign_processes=kill cannot be"),
    ],
)
def test_the_command_prints_a_table_and_its_exit_code_says_whether_to_go_on(
    arguments: list[str], exit_code: int, words: str, child_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "wan_sweep.checks", *arguments]
    environment = {**child_environment, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, words in done.stdout + done.stderr) == (exit_code, True), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
