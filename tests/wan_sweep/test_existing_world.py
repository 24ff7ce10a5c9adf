"""`torchrun ... -m wan_sweep ...`: the sweep itself is started once per rank, on one machine and on two of them."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Clock
from wan_sweep.launch.process import Limits
from wan_sweep.launch.world import Leader, WorldError, follow, world_folder
from wan_sweep.place import Place, read_place
from wan_sweep.record import load_records
from wan_sweep.store import MEASURE, read_json, write_json

QUICK = ("model=tiny", "device=cpu", "save_video=false", "size=96*64", "frame_num=1", "sample_steps=1", "track=false")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture
def environment(child_environment: dict[str, str]) -> dict[str, str]:
    return {**child_environment, "OMP_NUM_THREADS": "1"}


def sweep_of(folder: Path) -> Path:
    (found,) = (folder / "outputs" / "sweep").iterdir()
    return found


@pytest.mark.slow
def test_two_machines_run_the_jobs_that_fit_their_world_and_refuse_the_others(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    sweep = ("-m", "wan_sweep", "-m", "ring_size=2,1", "ulysses_size=1,2", *QUICK)
    command = [*TORCHRUN, *rendezvous, "--rdzv-id=of-this-test", *sweep]
    machines = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    outputs = [machine.communicate(timeout=280)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    records = load_records(sweep_of(tmp_path))
    assert [record.outcome for record in records] == ["ok", "refused", "refused", "ok"]
    assert "makes 4 ranks, and torchrun has started 2" in records[1].reason
    assert "makes 1 rank, and torchrun has started 2" in records[2].reason
    assert [[rank["rank"] for rank in record.ranks] for record in records] == [[0, 1], [], [], [0, 1]]
    assert "".join(outputs).count("job 1 of 4") == 1  # only one of them speaks
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["sweep"]


# What the processes of a world tell each other, without torchrun: the followers are threads.

PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert not [name for name in os.environ if name.startswith("TORCHELASTIC")]
seen = os.path.join(sys.argv[1], "seen_")
with open(f"{seen}{rank}.unfinished", "w") as file:
    print(os.getpid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], file=file)
os.replace(f"{seen}{rank}.unfinished", f"{seen}{rank}")
def wait_for_other():
    while not os.path.exists(f"{seen}{1 - rank}"): time.sleep(0.05)
"""


class MadeUpWorld:
    """Two ranks."""

    def __init__(self, folder: Path) -> None:
        self.jobs = folder / "job"
        self.jobs.mkdir()
        self.folder = folder / "world"
        self.leader = Leader(self.folder, Place(size=2, local_size=2), meeting_s=120)
        self._program = folder / "program.py"
        self.code: int | None = None
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        place = Place(rank=1, size=2, local_rank=1, local_size=2)
        self.code = follow(self.folder, place, [sys.executable, str(self._program)])

    def run(
        self, body: str, *, limits: Limits | None = None, look: Callable[[], bool] = lambda: False
    ) -> tuple[int, str | None]:
        self._program.write_text(PROGRAM + body)
        command = [sys.executable, str(self._program)]
        limits = limits or Limits(timeout_s=200)
        ending = self.leader.run(self.jobs, MEASURE, command, limits=limits, look=look)
        return ending.exit_code, ending.limit

    def failures(self) -> dict[str, int]:
        found = read_json(self.jobs / "failed_ranks.json")["failures"]
        return {rank: failure["exit_code"] for rank, failure in found.items()}

    def pids(self) -> list[int]:
        return [int(seen[0]) for seen in self.seen()]

    def seen(self) -> list[list[str]]:
        """Process, address and port of each rank's worker."""
        return [(self.jobs / f"seen_{rank}").read_text().split() for rank in range(2)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpWorld]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made = MadeUpWorld(tmp_path)
    yield made
    made.leader.dismiss(7)
    made.thread.join(timeout=120)
    assert made.code == 7


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_every_rank_starts_its_worker_for_each_pass(world: MadeUpWorld) -> None:
    ports = []
    for _ in range(2):
        assert world.run("") == (0, None)
        (first, *meeting), (second, *same_meeting) = world.seen()
        assert first != second
        assert meeting == same_meeting
        ports.append(meeting[1])
    assert ports[0] != ports[1]  # the workers of a pass must not find those of the one before
    assert not (world.jobs / "failed_ranks.json").exists()


def test_when_another_rank_ends_badly_the_first_is_stopped(world: MadeUpWorld) -> None:
    _, limit = world.run("wait_for_other(); sys.exit(5) if rank else time.sleep(600)")
    assert (limit, world.failures()) == ("others", {"0": -15, "1": 5})
    assert all(is_gone(pid) for pid in world.pids())


def test_when_the_first_rank_ends_badly_the_others_are_stopped(world: MadeUpWorld) -> None:
    body = "wait_for_other(); time.sleep(600) if rank else os.kill(os.getpid(), signal.SIGKILL)"
    assert world.run(body) == (-signal.SIGKILL, None)
    assert world.failures() == {"0": -9, "1": -15}
    assert all(is_gone(pid) for pid in world.pids())


def test_a_limit_stops_all_ranks(world: MadeUpWorld, clock: Clock) -> None:
    def look() -> bool:
        if all((world.jobs / f"seen_{rank}").exists() for rank in range(2)):
            clock.let_pass(301)
        return False

    _, limit = world.run("time.sleep(600)", limits=Limits(timeout_s=300), look=look)
    assert limit == "time"
    assert all(is_gone(pid) for pid in world.pids())
    assert world.run("") == (0, None)


def test_a_sweep_without_a_job_lets_the_others_go(world: MadeUpWorld) -> None:
    world.leader.dismiss(7)
    world.thread.join(timeout=120)
    assert world.code == 7


def test_a_rank_that_does_not_come_is_named_with_the_way_out(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "world", Place(size=3), meeting_s=0.2)
    with pytest.raises(WorldError, match=r"rank 1, 2 did not come to .* choose an output_root=FOLDER"):
        leader.run(tmp_path, MEASURE, [], limits=Limits(), look=lambda: False)


def test_worlds_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for port in ("29500", "29501"):
        monkeypatch.setenv("MASTER_PORT", port)
        folders.append(world_folder(tmp_path))
    assert len(set(folders)) == 2


def test_a_place_is_known_only_where_all_of_it_is_told() -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert read_place({**told, "LOCAL_WORLD_SIZE": "2"}) == Place(rank=3, size=4, local_rank=1, local_size=2)
    assert read_place({name: value for name, value in told.items() if name != "LOCAL_RANK"}) is None
    assert read_place({**os.environ, "RANK": ""}) is None


def test_a_port_in_use_is_told_and_not_waited_for(tmp_path: Path, environment: dict[str, str]) -> None:
    """Where no torchrun keeps the store in which ranks meet, the first of them opens a port for it."""
    write_json(tmp_path / "job.json", {"knobs": {"model": "tiny", "device": "cpu", "ring_size": 2}})
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        command = [sys.executable, "-m", "wan_sweep.worker", str(tmp_path), "measure"]
        subprocess.run(command, env={**environment, **place, "MASTER_PORT": port}, timeout=240, check=False)
    told = read_json(tmp_path / "measurement.json")
    assert told["outcome"] == "failed"
    assert "address already in use" in told["reason"] or "EADDRINUSE" in told["failure"]["message"]
    assert told["failure"]["is_from_peers"]
