"""How a job gets a process of its own, and how that ends."""

import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_sweep.environment import device_used_bytes, package_folder
from wan_sweep.launch.device import wait_for_baseline
from wan_sweep.launch.events import Event, EventTail, Position
from wan_sweep.launch.outcome import Result, classify
from wan_sweep.launch.process import Limits, run_process
from wan_sweep.store import MEASURE, Pass

__all__ = ["WORKER", "Event", "Interrupted", "Limits", "Result", "launch"]

# The job's folder and the name of the pass are appended. Other launchers, such as torchrun, put themselves in front.
WORKER: tuple[str, ...] = (sys.executable, "-m", "wan_sweep.worker")


class Interrupted(BaseException):
    """The sweep was told to stop while a job ran; its processes are gone. The cause is the interrupt itself."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


def worker_environment() -> dict[str, str]:
    """The parent's environment, made such that a child in another folder imports the same packages."""
    ours = [str(package_folder(package).parent) for package in ("wan_sweep", "wan21")]
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    theirs = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    folders = dict.fromkeys(entry for entry in [*ours, *theirs] if entry not in installed)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONSAFEPATH": "1",  # nothing in the job's folder is code
        "PYTHONFAULTHANDLER": "1",  # a crash leaves its stack in log.txt
        "PYTHONUNBUFFERED": "1",
    }


def launch(
    folder: Path,
    *,
    limits: Limits,
    on_event: Callable[[Event], None],
    command: Sequence[str] = WORKER,
    uses_gpu: bool = False,
    one: Pass = MEASURE,
) -> Result:
    """Runs a pass of the job in this folder, whose job.json is written, and tells what came of it.

    Args:
        folder: The job's folder.
        limits: When to stop it.
        on_event: Hears what the worker tells, soon after.
        command: What to start; the folder and the name of the pass are appended.
        uses_gpu: Whether to wait afterwards until device memory is back at what it was.
        one: Which pass.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came meanwhile; the job's processes are gone.
        OSError: the command cannot be started.
    """
    tail, position = EventTail(folder / one.events), Position()

    def look() -> bool:
        events = tail.read()
        for event in events:
            position.follow(event)
            on_event(event)
        return bool(events)

    baseline = device_used_bytes() if uses_gpu else []
    try:
        ending = run_process(
            [*command, str(folder), one.name],
            folder=folder,
            log=folder / one.log,
            environment=worker_environment(),
            limits=limits,
            look=look,
        )
    except (KeyboardInterrupt, SystemExit) as error:
        for event in tail.read():
            position.follow(event)
        raise Interrupted(str(position)) from error
    result = classify(folder, ending, limits, str(position), one)
    warning = wait_for_baseline(baseline, device_used_bytes)
    if warning is None:
        return result
    return Result(
        outcome=result.outcome,
        reason=result.reason,
        failure=result.failure,
        measurement=result.measurement,
        warnings=(*result.warnings, warning),
    )
