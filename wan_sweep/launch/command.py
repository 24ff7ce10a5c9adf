"""What is started for a pass: a worker, or torchrun with one for each rank."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from wan_sweep.environment import num_cpu_cores, package_folder
from wan_sweep.store import FAILED_RANKS_FILE, Pass

# The job's folder and the name of the pass are appended.
WORKER: tuple[str, ...] = (sys.executable, "-m", "wan_sweep.worker")
TORCHRUN: tuple[str, ...] = (sys.executable, "-m", "wan_sweep.torchrun")

_MONITOR_INTERVAL_S = 0.1

# What would make a worker that runs alone believe that it is one of several, or torchrun that it is inside another one.
_OF_A_WORLD = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
_OF_A_WORLD_TOO = ("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")


def command_of(folder: Path, one: Pass, command: Sequence[str], num_ranks: int) -> list[str]:
    """The command line of a pass.

    Args:
        folder: The job's folder.
        one: Which pass.
        command: What does the work of a rank; the folder and the name of the pass are appended.
        num_ranks: How many of them.
    """
    work = [*command, str(folder), one.name]
    if num_ranks == 1:
        return work
    settings = {
        "nproc-per-node": num_ranks,
        "max-restarts": 0,  # a second try would measure something else
        "monitor-interval": _MONITOR_INTERVAL_S,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [*TORCHRUN, str(folder / FAILED_RANKS_FILE), "--standalone", *options, "--no-python", *work]


def worker_environment(devices: Sequence[str] = (), num_ranks: int = 1) -> dict[str, str]:
    """The parent's environment, made such that a child in another folder imports the same packages.

    Args:
        devices: GPUs that it may use; all that the parent may, if none are given.
        num_ranks: How many workers there will be.
    """
    ours = [str(package_folder(package).parent) for package in ("wan_sweep", "wan21")]
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    theirs = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    folders = dict.fromkeys(entry for entry in [*ours, *theirs] if entry not in installed)
    values = {
        name: value
        for name, value in os.environ.items()
        if name not in {*_OF_A_WORLD, *_OF_A_WORLD_TOO} and not name.startswith("TORCHELASTIC_")
    }
    values |= {
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONSAFEPATH": "1",  # nothing in the job's folder is code
        "PYTHONFAULTHANDLER": "1",  # a crash leaves its stack in log.txt
        "PYTHONUNBUFFERED": "1",
    }
    if devices:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if num_ranks > 1:
        # torchrun would give each rank a single thread, which a text encoder on the CPU would feel.
        values.setdefault("OMP_NUM_THREADS", str(max(1, num_cpu_cores() // num_ranks)))
    return values
