"""Jobs of several ranks under torchrun, and how they end badly: the right rank is named, and nothing is left of any.

Each rank is a few lines of Python without torch; what one of them would wait for in a collective it waits for here in a
module whose path is like that of torch's.
"""

import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Clock, wait_for
from wan_sweep.launch import Interrupted, Limits, Result, launch, worker_environment
from wan_sweep.launch.command import command_of
from wan_sweep.launch.events import Event
from wan_sweep.launch.tree import MARK, marked
from wan_sweep.store import MEASURE, rank_folder

pytestmark = pytest.mark.slow

PREAMBLE = """
import faulthandler, json, os, signal, sys, time
from pathlib import Path
job = Path(sys.argv[1])
rank = int(os.environ["RANK"])
folder = job / f"rank{rank}" if rank else job
if rank:
    log = open(folder / "log.txt", "a", buffering=1)
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
faulthandler.register(signal.SIGUSR1, all_threads=True)
(folder / "pid").write_text(str(os.getpid()))
def say(event, kind, name, index=None, total=None):
    with (folder / "events.jsonl").open("a") as file:
        print(json.dumps(dict(time=0.0, event=event, kind=kind, name=name, index=index, total=total)), file=file)
def tell(outcome="ok", reason="", **more):
    (folder / "unfinished").write_text(json.dumps(dict(outcome=outcome, reason=reason, **more)))
    (folder / "unfinished").replace(folder / "measurement.json")
def fail(reason, **failure):
    tell("failed", reason, failure=dict(time=time.time(), **failure))
    os._exit(1)
def fall_silent():
    say("end", "block", "block")
    time.sleep(600)
def wait_for_others():
    path = job / "site" / "torch" / "distributed" / "collectives.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    exec(compile("fall_silent()", str(path), "exec"), globals())
def peers_are_there():
    homes = [job / f"rank{one}" if one else job for one in range(int(os.environ["WORLD_SIZE"]))]
    while not all(has_told(home / "events.jsonl") for home in homes): time.sleep(0.02)
def has_told(path):
    return path.exists() and path.read_text().count("\\n") >= 2
say("begin", "phase", "denoise")
say("begin", "step", "step", 1 + rank, 4)
peers_are_there()
"""


def write_program(folder: Path, body: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(PREAMBLE + textwrap.dedent(body))
    return [sys.executable, str(path)]


def run_ranks(
    folder: Path, body: str, limits: Limits | None = None, on_event: Callable[[Event], None] = lambda _: None
) -> Result:
    command = write_program(folder, body)
    return launch(folder, limits=limits or Limits(timeout_s=200), on_event=on_event, command=command, num_ranks=2)


def rank_pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in (folder / "pid", folder / "rank1" / "pid")]


def assert_none_is_left(folder: Path) -> None:
    for pid in rank_pids(folder):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ranks_are_told_together_and_one_by_one(tmp_path: Path) -> None:
    body = """
    tell(metrics={"memory/peak/allocated_bytes": 10 + rank, "time/total_s": 2.0 - rank,
                  "threads": int(os.environ["OMP_NUM_THREADS"])}, series={"step/seconds": [rank, 1 - rank]},
         warnings=[{"code": "c", "text": "odd", "advice": "none"}] if rank else [])
    """
    result = run_ranks(tmp_path, body)
    assert (result.outcome, result.reason) == ("ok", "")
    metrics = result.measurement["metrics"]
    assert (metrics["memory/peak/allocated_bytes"], metrics["ranks/peak_rank"]) == (11, 1)
    assert (metrics["time/total_s"], metrics["ranks/slowest_rank"], metrics["ranks/num"]) == (2.0, 0, 2)
    assert result.measurement["series"] == {"step/seconds": [1, 1]}
    assert [one["metrics"]["memory/peak/allocated_bytes"] for one in result.measurement["ranks"]] == [10, 11]
    assert [warning["text"] for warning in result.measurement["warnings"]] == ["rank 1: odd"]
    assert_none_is_left(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_though_its_peer_complains_first(tmp_path: Path, rank: int) -> None:
    body = f"""
    if rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    peer = int((job / "pid" if rank else job / "rank1" / "pid").read_text())
    while Path(f"/proc/{{peer}}/cmdline").exists() and Path(f"/proc/{{peer}}/cmdline").read_bytes(): time.sleep(0.01)
    fail("the connection was closed by a peer", is_from_peers=True)
    """
    result = run_ranks(tmp_path, body)
    assert result.outcome == "failed"
    assert result.reason.startswith(f"rank {rank}: killed by SIGKILL in denoise, step {2 + rank} of 4; the kernel's")
    assert result.failure is not None
    assert (result.failure["rank"], result.failure["exit_code"]) == (rank, -9)
    assert_none_is_left(tmp_path)


def test_a_rank_that_raises_is_named_and_not_the_one_that_waits_for_it(tmp_path: Path) -> None:
    result = run_ranks(tmp_path, "fail('ValueError: boom') if rank else wait_for_others()")
    assert (result.outcome, result.reason) == ("failed", "rank 1: ValueError: boom")
    assert_none_is_left(tmp_path)


def test_a_rank_that_runs_out_of_memory_makes_the_job_an_oom(tmp_path: Path) -> None:
    body = """
    if rank:
        tell("oom", "out of memory in denoise", failure={"time": time.time() + 60}, metrics={"memory/num_ooms": 1})
        sys.exit(3)
    while not (job / "rank1" / "measurement.json").exists(): time.sleep(0.01)
    fail("the connection was reset", is_from_peers=True)
    """
    result = run_ranks(tmp_path, body)
    assert (result.outcome, result.reason) == ("oom", "rank 1: out of memory in denoise")
    assert result.measurement["metrics"]["memory/num_ooms"] == 1


def test_a_rank_that_dies_without_a_word_is_told_by_its_own_log(tmp_path: Path) -> None:
    result = run_ranks(tmp_path, "if rank: raise ImportError('no such library')\nwait_for_others()")
    assert result.reason == "rank 1: exit code 1 in denoise, step 3 of 4: ImportError: no such library"


def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(tmp_path: Path, clock: Clock) -> None:
    def is_silent(rank: int) -> bool:
        events = rank_folder(tmp_path, rank) / "events.jsonl"
        if not events.exists() or events.read_text().count("\n") < 3:
            return False
        return psutil.Process(rank_pids(tmp_path)[rank]).status() == psutil.STATUS_SLEEPING

    def hear(event: Event) -> None:
        if event.kind == "block":
            wait_for(lambda: all(is_silent(rank) for rank in range(2)))
            clock.let_pass(301)

    body = """
    def stuck():
        say("end", "block", "block"), time.sleep(600)
    wait_for_others() if rank == 0 else stuck()
    """
    result = run_ranks(tmp_path, body, Limits(stall_timeout_s=300), hear)
    assert result.outcome == "timeout"
    assert result.reason.startswith("rank 1: no event for 300 s in denoise, step 3 of 4 at program.py:")
    assert result.reason.endswith(", stuck; raise stall_timeout_s if that is expected")
    assert_none_is_left(tmp_path)


def test_a_killed_torchrun_takes_its_ranks_along(tmp_path: Path) -> None:
    body = """
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if rank: os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    """
    result = run_ranks(tmp_path, body)
    assert result.reason.startswith("torchrun: killed by SIGKILL in denoise, step 2 of 4")
    assert_none_is_left(tmp_path)


def test_an_interrupted_parent_leaves_no_rank(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "block":  # by then both have said which process they are
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="denoise, step 2 of 4"):
        run_ranks(tmp_path, "fall_silent()", on_event=interrupt)
    assert_none_is_left(tmp_path)


def test_torchrun_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "rank1").mkdir()
    command = command_of(tmp_path, MEASURE, write_program(tmp_path, "time.sleep(600)"), 2)
    starter = f"import subprocess, time; p = subprocess.Popen({command!r}); time.sleep(600)"
    mark = uuid.uuid4().hex
    environment = {**worker_environment(num_ranks=2), MARK: mark}
    process = subprocess.Popen([sys.executable, "-c", starter], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "rank1" / "events.jsonl").exists)
        (agent,) = (one for one in marked(mark) if "wan_sweep.torchrun" in one.cmdline())
        process.kill()
        _, alive = psutil.wait_procs([agent], timeout=60)
        assert alive == []
    finally:
        process.kill()
        process.wait()
        for one in marked(mark):
            one.kill()


def test_a_worker_that_runs_alone_hears_nothing_of_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    environment = worker_environment(["GPU-1"])
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_a_damaged_result_of_one_rank_is_a_failure_that_says_so(tmp_path: Path) -> None:
    body = "(folder / 'measurement.json').write_text('{') if rank else tell()"
    result = run_ranks(tmp_path, body)
    assert result.outcome == "failed"
    assert "measurement.json is damaged" in result.reason
