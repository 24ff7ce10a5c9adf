"""Real jobs that end badly: nothing measured is lost, no process survives, the others are ok, the exit code tells."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from tests.conftest import wait_for
from tests.wan_sweep.halting_worker import HaltingWorker
from wan_sweep.record import Record, load_records
from wan_sweep.track.ledger import read_entry

pytestmark = [
    pytest.mark.slow,
    # Inside MLflow, where it sets up its tables with SQLAlchemy 2.1; not ours to mend.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

QUICK = ("model=tiny", "device=cpu", "save_video=false")
SMALL = ("size=96*64", "frame_num=1")
LONG = "sample_steps=3"  # halts at the second one
NOWHERE = "http://127.0.0.1:9"

# On top of `import torch` a job of the largest size needs at least 0.23 GiB, in the end; until it decodes, 0.09 GiB.
TOO_LITTLE_GIB = 0.13


@dataclass(frozen=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


class Started:
    """The command with `-m` on quick jobs, under way."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - as in a terminal
        )

    def done(self) -> Done:
        """Waits for the end."""
        stdout, stderr = self.process.communicate(timeout=240)
        assert "Traceback" not in stdout + stderr
        return Done(code=self.process.returncode, stdout=stdout, stderr=stderr)


class Start(Protocol):
    """Starts the command with some arguments and environment variables."""

    def __call__(self, *arguments: str, **variables: str) -> Started: ...


def processes_in(folder: Path) -> list[psutil.Process]:
    """Living processes that were started with something of this folder: the workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.pid != os.getpid() and any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def halting(tmp_path_factory: pytest.TempPathFactory) -> HaltingWorker:
    return HaltingWorker(tmp_path_factory.mktemp("worker"))


@pytest.fixture
def start(tmp_path: Path, child_environment: dict[str, str], halting: HaltingWorker) -> Iterator[Start]:
    """Starts commands in an empty folder; one thread, since two jobs at once on two cores would fight for them."""
    all_started: list[Started] = []

    def begin(*arguments: str, **variables: str) -> Started:
        command = [*halting.command, "-m", *QUICK, *arguments]
        all_started.append(Started(tmp_path, command, {**child_environment, "OMP_NUM_THREADS": "1", **variables}))
        return all_started[-1]

    yield begin
    for one in all_started:
        with one.process:
            one.process.kill()
    for process in processes_in(tmp_path):
        process.kill()


def sweeps(folder: Path) -> list[Path]:
    return sorted((folder / "outputs" / "sweep").iterdir())


def outcomes(records: list[Record]) -> list[tuple[int, str]]:
    return [(record.number, record.outcome) for record in records]


def data_gib_of_torch(environment: dict[str, str]) -> float:
    """Data memory of a process that has imported torch and done nothing, as RLIMIT_DATA counts it."""
    code = "import torch; print(next(x for x in open('/proc/self/status') if x.startswith('VmData')).split()[1])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    return int(done.stdout) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all data memory on Linux only")
def test_a_job_out_of_memory_says_where_and_how_much_and_the_next_one_is_ok(
    start: Start, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    limit = data_gib_of_torch({**child_environment, "OMP_NUM_THREADS": "1"}) + TOO_LITTLE_GIB
    settings = ("size=256*160", "frame_num=5", "sample_steps=1", "track=false")
    done = start(f"memory_limit_gib={limit:.3f},8", *settings).done()
    assert done.code == 0, done.stdout
    short, other = load_records(sweeps(tmp_path)[0])
    assert (short.outcome, other.outcome) == ("oom", "ok")
    assert "decode" in short.reason
    assert "MiB" in short.reason
    assert short.failure is not None
    assert short.failure["phase"] == "decode"
    assert "you tried to allocate" in short.failure["message"]
    assert short.metrics["memory/base/dit_bytes"] > 0
    for place in (done.stdout, (sweeps(tmp_path)[0] / "results.csv").read_text()):
        assert short.reason in place


def test_a_worker_that_is_killed_or_hangs_is_one_row_with_its_place_and_the_next_job_runs(
    start: Start, halting: HaltingWorker, tmp_path: Path
) -> None:
    started = start(f"{LONG},4,1", *SMALL, "stall_timeout_s=300", "track=false")
    halting.wait_for(1).kill()
    worker = halting.wait_for(2)
    worker.suspend()
    halting.let_time_pass(worker)
    done = started.done()
    assert done.code == 1
    killed, hung, other = load_records(sweeps(tmp_path)[0])
    assert (killed.outcome, hung.outcome, other.outcome) == ("failed", "timeout", "ok")
    assert killed.reason.startswith("killed by SIGKILL in denoise")
    assert killed.failure is not None
    assert killed.failure["exit_code"] == -signal.SIGKILL
    assert killed.reason.partition(";")[0] in done.stdout
    assert hung.reason.startswith("no event for 300 s in denoise")
    assert not worker.is_running()
    assert processes_in(tmp_path) == []


def test_ctrl_c_leaves_no_process_and_the_same_command_does_the_rest(
    start: Start, halting: HaltingWorker, tmp_path: Path
) -> None:
    command = ("sample_steps=1,3,2", *SMALL, "track=false")
    started = start(*command)
    halting.wait_for(2)
    os.kill(started.process.pid, signal.SIGINT)
    done = started.done()
    assert done.code == 130
    assert processes_in(tmp_path) == []
    records = load_records(sweeps(tmp_path)[0])
    assert outcomes(records) == [(1, "ok"), (2, "failed")]
    assert records[1].reason.startswith("interrupted in denoise")
    assert "the same command runs what is missing" in done.stdout
    halting.go_on()
    assert start(*command).done().code == 0
    rest = load_records(sweeps(tmp_path)[1])
    assert outcomes(rest) == [(1, "skipped"), (2, "ok"), (3, "ok")]
    assert rest[0].metrics == records[0].metrics


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_worker_dies_with_its_parent(start: Start, halting: HaltingWorker, tmp_path: Path) -> None:
    started = start(LONG, *SMALL, "track=false")
    worker = halting.wait_for(1)
    assert processes_in(tmp_path) == [worker]
    started.process.kill()
    wait_for(lambda: processes_in(tmp_path) == [], seconds=60)


def test_an_output_folder_that_cannot_be_made_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = start("sample_steps=1,2", *SMALL, "output_root=file/results").done()
    assert done.code == 2
    assert f"{tmp_path / 'file' / 'results'}" in done.stderr
    assert "cannot be made" in done.stderr
    assert "choose a writable place with output_root=FOLDER" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def set_file_limit(process: psutil.Process, num_bytes: int) -> None:
    process.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Started, psutil.Process], None]]:
    """Puts outputs/ on a small disk where that is allowed; call it to fill the disk, else no file grows any more."""
    disk = tmp_path / "outputs"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(started: Started, worker: psutil.Process) -> None:
        if not is_mounted:
            set_file_limit(worker, 0)
            set_file_limit(psutil.Process(started.process.pid), 0)
            return
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    yield fill
    if is_mounted:
        undo = ["umount", "--lazy", str(disk)]
        subprocess.run(undo, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process can be set on Linux only")
def test_a_disk_that_fills_up_loses_nothing_that_was_measured(
    small_disk: Callable[[Started, psutil.Process], None], start: Start, halting: HaltingWorker, tmp_path: Path
) -> None:
    started = start("sample_steps=1,3,2", *SMALL, "track=false")
    small_disk(started, halting.wait_for(2))
    halting.go_on()
    done = started.done()
    assert done.code == 1
    (record,) = load_records(sweeps(tmp_path)[0])
    assert (record.outcome, record.metrics["time/total_s"] > 0) == ("ok", True)
    assert "job 2 sample_steps=3: failed" in done.stdout
    assert "job 3 sample_steps=2: failed" in done.stdout
    assert f"peak {record.metrics['memory/peak/allocated_bytes'] / 2**20:.1f} MiB" in done.stdout
    assert "could not be written: " in done.stdout
    assert "make space and run the command again" in done.stdout
    assert processes_in(tmp_path) == []


def client_of(database: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database}")


def test_an_mlflow_server_that_is_not_there_costs_no_result(
    start: Start, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    done = start("sample_steps=1", *SMALL, MLFLOW_TRACKING_URI=NOWHERE).done()
    assert done.code == 0
    assert NOWHERE in done.stderr
    assert "wan_sweep.track.sync" in done.stderr
    (sweep,) = sweeps(tmp_path)
    (record,) = load_records(sweep)
    assert record.outcome == "ok"
    job = sweep / record.name
    assert [entry.state for entry in map(read_entry, (job, sweep)) if entry] == ["pending", "pending"]

    reachable = {**child_environment, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'reachable.db'}"}
    command = [sys.executable, "-m", "wan_sweep.track.sync", str(sweep)]
    sync = subprocess.run(
        command, cwd=tmp_path, env=reachable, capture_output=True, text=True, timeout=240, check=False
    )
    assert sync.returncode == 0, sync.stderr
    assert [entry.state for entry in map(read_entry, (job, sweep)) if entry] == ["sent", "sent"]
    runs = client_of(tmp_path / "reachable.db").search_runs(["1"])
    assert sorted(run.data.tags["role"] for run in runs) == ["job", "sweep"]
    (run,) = (run for run in runs if run.data.tags["role"] == "job")
    assert run.data.params["sample_steps"] == "1"
    assert run.data.metrics["time/total_s"] == pytest.approx(record.metrics["time/total_s"])
