"""Jobs in a world that is there already: torchrun has started this program several times, once for each rank.

Rank 0 plans, writes and reports as ever; the others follow. For each pass of a job rank 0 leaves an order in a folder
that all of them see, every process starts the worker of its own rank, and tells there how that ended. So each job has
fresh processes here, too, and no process of the sweep imports torch, through which they could meet otherwise.

The folder's files: join_<rank>.json and members.json while they meet; order_<n>.json, stop_<n>.json and
end_<n>_<rank>.json for each pass; over.json at the end.
"""

import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wan_sweep.errors import SweepError
from wan_sweep.launch.command import WORKER, worker_environment
from wan_sweep.launch.process import Ending, Limits, StopError, run_process
from wan_sweep.place import Place
from wan_sweep.schema import digest
from wan_sweep.store import FAILED_RANKS_FILE, PASSES, Pass, rank_folder, read_json, write_json

MEETING_S = 120.0
ENDING_S = 60.0
_LOOK_S = 0.1
_EXIT_LOST = 1
_WHICH_WORLD = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
_MEMBERS, _OVER = "members.json", "over.json"


class WorldError(SweepError):
    """The processes of a world do not find each other."""


def world_folder(output_root: Path) -> Path:
    """Where the processes of this process's world meet."""
    return output_root / f".world_{digest([os.environ.get(name, '') for name in _WHICH_WORLD])}"


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def worker_variables(place: Place, port: int) -> dict[str, str]:
    """What tells a worker its place in this world.

    Args:
        place: of this process, and so of the worker that it starts.
        port: on the machine of rank 0, at which the workers of this pass meet. The store that torchrun keeps open is of
            no use: it remembers where the workers of the pass before were.
    """
    return {
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": str(port),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


class Leader:
    """Rank 0 of a world.

    Args:
        folder: that `world_folder` names; what an earlier world left there is removed.
        place: of this process.
        meeting_s: how long to wait for the others, in seconds.
    """

    def __init__(self, folder: Path, place: Place, *, meeting_s: float = MEETING_S) -> None:
        self._folder = folder
        self._place = place
        self._meeting_s = meeting_s
        self._number = 0
        self._has_met = False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @property
    def num_here(self) -> int:
        """How many processes of the world this machine has."""
        return self._place.local_size

    def run(
        self, job_folder: Path, one: Pass, command: Sequence[str], *, limits: Limits, look: Callable[[], bool]
    ) -> Ending:
        """Has a pass run by all ranks; returns how the first one's worker ended, and leaves how the others did.

        Raises:
            WorldError: the others have not come.
            OSError: the worker cannot be started.
        """
        self._meet()
        self._number += 1
        number = self._number
        port = _free_port()
        order = {"folder": str(job_folder), "pass": one.name, "port": port}
        write_json(self._folder / f"order_{number}.json", order)

        def look_around() -> bool:
            if any(self._ends(number).values()):
                raise StopError
            return look()

        try:
            ending = run_process(
                [*command, str(job_folder), one.name],
                folder=job_folder,
                log=job_folder / one.log,
                environment={**worker_environment(), **worker_variables(self._place, port)},
                limits=limits,
                look=look_around,
            )
        except BaseException:
            write_json(self._folder / f"stop_{number}.json", {})
            raise
        if ending.exit_code == 0 and ending.limit is None:
            _wait_for(lambda: self._has_ended(number) or any(self._ends(number).values()), ENDING_S)
        write_json(self._folder / f"stop_{number}.json", {})
        _wait_for(lambda: self._has_ended(number), ENDING_S)
        own = -signal.SIGTERM if ending.limit == "others" else ending.exit_code
        ends = {0: own, **self._ends(number)}
        failures = {str(rank): {"exit_code": code} for rank, code in ends.items() if code}
        if failures and ending.limit not in {"time", "silence"}:
            write_json(job_folder / FAILED_RANKS_FILE, {"failures": failures})
        return ending

    def dismiss(self, exit_code: int) -> None:
        """Lets the others go, with this exit code."""
        write_json(self._folder / _OVER, {"exit_code": exit_code})
        if self._has_met:
            others = range(1, self._place.size)
            _wait_for(lambda: not any((self._folder / f"join_{rank}.json").exists() for rank in others), ENDING_S)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _meet(self) -> None:
        if self._has_met:
            return
        joins = {rank: self._folder / f"join_{rank}.json" for rank in range(1, self._place.size)}
        if not _wait_for(lambda: all(path.exists() for path in joins.values()), self._meeting_s):
            missing = ", ".join(str(rank) for rank, path in joins.items() if not path.exists())
            raise WorldError(
                f"rank {missing} did not come to {self._folder} within {self._meeting_s:g} s; "
                "choose an output_root=FOLDER that all machines of the world share"
            )
        write_json(self._folder / _MEMBERS, {str(rank): read_json(path)["token"] for rank, path in joins.items()})
        self._has_met = True

    def _ends(self, number: int) -> dict[int, int]:
        """Exit codes of the other ranks' workers that have ended."""
        paths = {rank: self._folder / f"end_{number}_{rank}.json" for rank in range(1, self._place.size)}
        return {rank: int(read_json(path)["exit_code"]) for rank, path in paths.items() if path.exists()}

    def _has_ended(self, number: int) -> bool:
        return len(self._ends(number)) == self._place.size - 1


def follow(folder: Path, place: Place, command: Sequence[str] = WORKER) -> int:
    """Does what rank 0 orders until it says that all is over.

    Args:
        folder: that `world_folder` names.
        place: of this process.
        command: what does the work of a rank.

    Returns:
        The exit code of the whole program.
    """
    join, token = folder / f"join_{place.rank}.json", uuid.uuid4().hex
    while not _is_member(folder, place.rank, token):
        if (folder / _OVER).exists():
            return _code(folder)
        # Rank 0 may come later, and clears the folder when it does.
        if folder.is_dir() and not join.exists():
            _attempt(lambda: write_json(join, {"token": token}))
        time.sleep(_LOOK_S)
    number = 1
    while not (folder / _OVER).exists():
        path = folder / f"order_{number}.json"
        if path.exists():
            exit_code = _obey(read_json(path), folder, place, number, command)
            write_json(folder / f"end_{number}_{place.rank}.json", {"exit_code": exit_code})
            number += 1
        else:
            time.sleep(_LOOK_S)
    code = _code(folder)
    join.unlink(missing_ok=True)
    return code


def _code(folder: Path) -> int:
    return int(read_json(folder / _OVER)["exit_code"])


def _is_member(folder: Path, rank: int, token: str) -> bool:
    path = folder / _MEMBERS
    return path.exists() and read_json(path).get(str(rank)) == token


def _attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except FileNotFoundError:
        return  # rank 0 has just cleared the folder


def _obey(order: dict[str, Any], folder: Path, place: Place, number: int, command: Sequence[str]) -> int:
    job_folder, one = Path(order["folder"]), PASSES[order["pass"]]
    home = rank_folder(job_folder, place.rank)

    def look() -> bool:
        if (folder / f"stop_{number}.json").exists():
            raise StopError
        return False

    try:
        home.mkdir(exist_ok=True)
        ending = run_process(
            [*command, str(job_folder), one.name],
            folder=home,
            log=home / one.log,
            environment={**worker_environment(), **worker_variables(place, int(order["port"]))},
            limits=Limits(),
            look=look,
        )
    except OSError:
        return _EXIT_LOST
    return -signal.SIGTERM if ending.limit == "others" else ending.exit_code
