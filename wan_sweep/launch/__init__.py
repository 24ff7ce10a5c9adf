"""How a job gets processes of its own, and how they end."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from wan_sweep.environment import device_used_bytes
from wan_sweep.launch.command import WORKER, command_of, worker_environment
from wan_sweep.launch.device import wait_for_baseline
from wan_sweep.launch.events import Ears, Event
from wan_sweep.launch.outcome import Result, classify
from wan_sweep.launch.process import Limits, run_process
from wan_sweep.launch.ranks import settle_ranks
from wan_sweep.launch.slots import NOTHING, Lease
from wan_sweep.launch.world import Leader
from wan_sweep.store import FAILED_RANKS_FILE, MEASURE, Pass, rank_folder

__all__ = ["WORKER", "Event", "Interrupted", "Limits", "Result", "launch", "worker_environment"]


class Interrupted(BaseException):
    """The sweep was told to stop while a job ran; its processes are gone. The cause is the interrupt itself."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


def launch(
    folder: Path,
    *,
    limits: Limits,
    on_event: Callable[[Event], None],
    command: Sequence[str] = WORKER,
    lease: Lease = NOTHING,
    one: Pass = MEASURE,
    num_ranks: int = 1,
    world: Leader | None = None,
) -> Result:
    """Runs a pass of the job in this folder, whose job.json is written, and tells what came of it.

    Args:
        folder: The job's folder.
        limits: When to stop it.
        on_event: Hears what the worker, of several the first, tells, soon after.
        command: What to start; the folder and the name of the pass are appended.
        lease: The GPUs that it may use; afterwards their memory is waited for to be back at what it was.
        one: Which pass.
        num_ranks: How many workers, which torchrun starts if there are several.
        world: Has them started instead where torchrun has started the sweep itself.

    Raises:
        WorldError: the other processes of the world have not come.
        Interrupted: Ctrl-C or SIGTERM came meanwhile; the job's processes are gone.
        OSError: the command cannot be started.
    """
    (folder / FAILED_RANKS_FILE).unlink(missing_ok=True)
    for rank in range(num_ranks):
        rank_folder(folder, rank).mkdir(exist_ok=True)
    ears = Ears([rank_folder(folder, rank) / one.events for rank in range(num_ranks)], on_event)
    baseline = _used_bytes(lease)
    try:
        if world is not None:
            ending = world.run(folder, one, command, limits=limits, look=ears.listen)
        else:
            ending = run_process(
                command_of(folder, one, command, num_ranks),
                folder=folder,
                log=folder / one.log,
                environment=worker_environment(lease.devices, num_ranks),
                limits=limits,
                look=ears.listen,
                pass_fds=lease.locks,
            )
    except (KeyboardInterrupt, SystemExit) as error:
        ears.catch_up()
        raise Interrupted(ears.wheres[0]) from error
    if num_ranks == 1:
        result = classify(folder, ending, limits, ears.wheres[0], one)
    else:
        result = settle_ranks(folder, ending, limits, ears.wheres, one)
    warning = wait_for_baseline(baseline, lambda: _used_bytes(lease))
    return result if warning is None else replace(result, warnings=(*result.warnings, warning))


def _used_bytes(lease: Lease) -> list[int]:
    """Memory in use on the GPUs of a job, by all processes."""
    if not lease.indices:
        return []
    used = device_used_bytes()
    return [used[index] for index in lease.indices if index < len(used)]
