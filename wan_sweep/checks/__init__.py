"""What is looked at before a sweep: driver, torch, CUDA, cuDNN, settings, room, other programs, the GPU's condition."""

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from wan_sweep.checks.allocator import check_allocator
from wan_sweep.checks.check import Check, State
from wan_sweep.checks.gpu import check_mode, check_speed
from wan_sweep.checks.host import check_disk, check_memory, existing
from wan_sweep.checks.processes import check_processes
from wan_sweep.checks.software import check_cuda, check_cudnn, check_driver, check_torch, wants_gpu
from wan_sweep.checks.variables import check_variables
from wan_sweep.environment import Machine, host_available_bytes, package_version
from wan_sweep.nvml import GpuState, read_gpu_states
from wan_sweep.schema import ForeignProcesses

__all__ = ["Check", "Probes", "State", "run_checks"]


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free


def _our_processes() -> set[int]:
    return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}


@dataclass(frozen=True, kw_only=True)
class Probes:
    """How the machine is read."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    package_version: Callable[[str], str] = package_version
    gpus: Callable[[], Sequence[GpuState]] = read_gpu_states
    our_processes: Callable[[], Collection[int]] = _our_processes
    free_bytes: Callable[[Path], int] = _free_bytes
    host_available_bytes: Callable[[], int] = host_available_bytes
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


def run_checks(
    machine: Machine,
    policy: ForeignProcesses,
    *,
    devices: Collection[str],
    output_root: Path,
    say: Callable[[str], None],
    num_jobs: int = 1,
    num_gpus: int = 1,
    probes: Probes | None = None,
) -> list[Check]:
    """Looks at everything that applies. If one of the checks is "refused", the sweep should not start.

    Args:
        machine: `environment.read_machine`.
        policy: What to do about other programs on the GPU; with "wait" this may take an hour.
        devices: The values of the knob `device` that the jobs ask for: auto, cuda, cpu.
        output_root: Where results go; it need not exist.
        say: Tells the user what is being waited for.
        num_jobs: How many jobs will run.
        num_gpus: How many of the visible GPUs they use, from the first.
        probes: How to read the machine.
    """
    probes = probes or Probes()
    uses_gpu = wants_gpu(devices) and machine.num_gpus > 0
    checks = [check_driver(machine, devices), check_torch(machine, devices)]
    if uses_gpu:
        checks += [check_cuda(machine), check_cudnn(machine, probes.package_version)]
        checks += check_allocator(probes.environ, machine.torch_version)
    checks += check_variables(probes.environ, uses_gpu=uses_gpu)
    checks += [
        check_disk(output_root, probes.free_bytes(output_root), num_jobs),
        check_memory(probes.host_available_bytes(), uses_gpu=uses_gpu),
    ]
    if uses_gpu:
        # Last, since it may wait; and after that, the GPU is as the jobs will find it.
        checks.append(
            check_processes(
                policy,
                lambda: probes.gpus()[:num_gpus],
                ours=probes.our_processes(),
                say=say,
                sleep=probes.sleep,
                clock=probes.clock,
            )
        )
        checks += [check(gpu) for gpu in probes.gpus()[:num_gpus] for check in (check_mode, check_speed)]
    return checks
