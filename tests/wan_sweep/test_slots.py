"""GPUs of a made-up pool of two: whoever has one has it alone, whatever becomes of the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_for
from wan_sweep import passes
from wan_sweep.errors import UsageError
from wan_sweep.launch import worker_environment
from wan_sweep.launch.slots import NOTHING, Lease, Slots
from wan_sweep.passes import Passes
from wan_sweep.plan import Plan, PlannedJob
from wan_sweep.schema import Job

POOL = {"0": "GPU-a", "1": "GPU-b"}

HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from wan_sweep.launch.slots import Slots
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[5])
num, rounds = int(sys.argv[3]), int(sys.argv[4])
slots = Slots(folder / "locks", {"0": "GPU-a", "1": "GPU-b"})
def tell(what, words):
    (folder / f"{name}_unfinished").write_text(words)
    (folder / f"{name}_unfinished").replace(folder / f"{name}_{what}")
for _ in range(rounds):
    with slots.take(num, on_wait=lambda: (folder / f"{name}_waits").touch()) as lease:
        files = [os.open(folder / f"used_{device}", os.O_CREAT | os.O_EXCL) for device in lease.devices]
        tell("has", ",".join(lease.devices))
        if "child" in name:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=lease.locks)
            tell("pid", str(child.pid))
        time.sleep(seconds)
        for device in lease.devices:
            (folder / f"used_{device}").unlink()
"""


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "locks", POOL)


class Holders:
    """Processes that take GPUs; a file marks each GPU in use, and making it fails if it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, num: int, *, rounds: int = 1, seconds: float = 600.0) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLDER, str(self.folder), name, str(num), str(rounds), str(seconds)]
        self.started.append(subprocess.Popen(command, env=worker_environment()))
        return self.started[-1]

    def wait_for(self, name: str) -> None:
        wait_for((self.folder / name).exists)


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    made = Holders(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()


def test_jobs_at_the_same_time_never_have_the_same_gpu(holders: Holders) -> None:
    processes = [holders.start(f"one{number}", 1, rounds=4, seconds=0.05) for number in range(4)]
    processes += [holders.start(f"two{number}", 2, rounds=2, seconds=0.05) for number in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0] * 6


def test_the_gpus_of_a_killed_holder_are_free_at_once(holders: Holders, tmp_path: Path) -> None:
    first = holders.start("first", 2)
    holders.wait_for("first_has")
    second = holders.start("second", 2, seconds=0.0)
    holders.wait_for("second_waits")
    assert not (tmp_path / "second_has").exists()
    for device in POOL:
        (tmp_path / f"used_{device}").unlink()
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=240) == 0
    assert (tmp_path / "second_has").read_text() == "0,1"


def test_the_gpus_of_a_killed_holder_stay_taken_while_its_job_lives(holders: Holders, tmp_path: Path) -> None:
    first = holders.start("with_child", 2)
    holders.wait_for("with_child_pid")
    first.send_signal(signal.SIGKILL)
    first.wait()
    holders.start("second", 1)
    holders.wait_for("second_waits")
    time.sleep(0.5)
    assert not (tmp_path / "second_has").exists()
    (tmp_path / "used_0").unlink()
    os.kill(int((tmp_path / "with_child_pid").read_text()), signal.SIGKILL)
    holders.wait_for("second_has")


def test_a_gpu_is_given_back_at_the_end_also_after_an_error(slots: Slots) -> None:
    with pytest.raises(RuntimeError, match="boom"), slots.take(2):
        raise RuntimeError("boom")
    with slots.take(2) as lease:
        assert (lease.devices, lease.indices, len(lease.locks)) == (("0", "1"), (0, 1), 2)


def test_jobs_that_share_are_spread_and_keep_only_those_away_that_do_not(
    slots: Slots, holders: Holders, tmp_path: Path
) -> None:
    with slots.take(1, shares=True) as one, slots.take(1, shares=True) as two, slots.take(1, shares=True) as three:
        assert {*one.devices, *two.devices} == {"0", "1"}
        assert set(three.devices) < {"0", "1"}
        assert three.indices == ()
        holders.start("alone", 1)
        holders.wait_for("alone_waits")
        assert not (tmp_path / "alone_has").exists()
    holders.wait_for("alone_has")


def test_more_gpus_than_there_are_is_refused_and_not_waited_for(slots: Slots) -> None:
    with pytest.raises(UsageError, match="3 GPUs needed, and this process may use 2"), slots.take(3):
        pass


def test_a_place_without_locks_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be made: .*TMPDIR"), Slots(tmp_path / "file" / "locks", POOL).take(1):
        pass


def make_passes(tmp_path: Path) -> Passes:
    plan = Plan(name="sweep", id="now", folder=tmp_path, code_version="", environment={})
    return Passes(plan, lambda _: None)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Slots]:
    monkeypatch.setattr(passes, "visible_gpus", lambda: POOL)
    monkeypatch.setattr(passes, "lock_folder", lambda: tmp_path / "locks")
    return lambda: Slots(tmp_path / "locks", POOL)


def test_a_job_sees_the_gpus_that_it_has_and_no_others(tmp_path: Path, two_gpus: Callable[[], Slots]) -> None:
    job = Job(model="tiny", device="cuda")
    entry = PlannedJob(number=1, key="key", asked="", repeat=0, name="1_job", job=job)
    body = "import os, sys; open(sys.argv[1] + '/log.txt', 'a').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    runner = make_passes(tmp_path)
    with two_gpus().take(1), runner.on_gpus(job, lambda: None) as lease:
        assert lease.devices == ("1",)
        runner.measure(entry, [sys.executable, "-c", body])
    assert (tmp_path / "1_job" / "log.txt").read_text() == "1"


def test_a_job_takes_as_many_gpus_as_it_has_ranks_and_none_on_the_cpu(
    tmp_path: Path, two_gpus: Callable[[], Slots]
) -> None:
    def devices(job: Job) -> Lease:
        with make_passes(tmp_path).on_gpus(job, lambda: None) as lease:
            return lease

    assert devices(Job(device="cuda", ulysses_size=2)).devices == ("0", "1")
    assert devices(Job(device="cpu", ulysses_size=2)) == NOTHING
    with pytest.raises(UsageError, match="4 GPUs needed"):
        devices(Job(device="cuda", ulysses_size=2, cfg_parallel=True))
