from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from wan_sweep.checks.check import Check
from wan_sweep.checks.processes import LIMIT_S, LOOK_EVERY_S, SAY_EVERY_S, UNEXPLAINED_BYTES, check_processes, occupants
from wan_sweep.nvml import GpuProcess, GpuState
from wan_sweep.schema import ForeignProcesses
from wan_sweep.units import GIB, MIB

OURS = {10, 11}
FREE = GpuState(index=0, allocated_bytes=4 * MIB)
TRAINING = GpuProcess(pid=42, name="python", used_bytes=12 * GIB)
BUSY = GpuState(index=0, allocated_bytes=12 * GIB + 4 * MIB, processes=(TRAINING,))


@dataclass
class Hours:
    """A clock that only sleeping moves, and a GPU that is free from some second on."""

    free_at: float
    now: float = 0.0
    said: list[str] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def read(self) -> Sequence[GpuState]:
        return [FREE if self.now >= self.free_at else BUSY]

    def check(self, policy: ForeignProcesses) -> Check:
        return check_processes(
            policy, self.read, ours=OURS, say=self.said.append, sleep=self.sleep, clock=lambda: self.now
        )


@pytest.mark.parametrize("policy", ["warn", "refuse", "wait"])
def test_a_free_gpu_is_ok_at_once(policy: ForeignProcesses) -> None:
    hours = Hours(free_at=0)
    assert hours.check(policy).state == "ok"
    assert (hours.now, hours.said) == (0, [])


def test_others_are_warned_of_by_name_and_bytes() -> None:
    check = Hours(free_at=1).check("warn")
    assert check.state == "warning"
    assert "python (pid 42) with 12.00 GiB on GPU 0" in check.text
    assert "foreign_processes=wait" in check.advice


def test_others_are_refused_where_that_is_asked_for() -> None:
    hours = Hours(free_at=1)
    check = hours.check("refuse")
    assert (check.state, hours.now) == ("refused", 0)
    assert "python (pid 42)" in check.text
    assert "CUDA_VISIBLE_DEVICES" in check.advice


def test_waiting_ends_when_they_are_gone_and_says_so_meanwhile() -> None:
    hours = Hours(free_at=2 * SAY_EVERY_S + 1)
    check = hours.check("wait")
    assert check.state == "ok"
    assert hours.free_at <= hours.now < hours.free_at + LOOK_EVERY_S
    assert len(hours.said) == 3
    assert all("python (pid 42) with 12.00 GiB" in line for line in hours.said)
    assert "2 min 05 s" in check.text


def test_waiting_has_an_end_and_then_refuses() -> None:
    hours = Hours(free_at=2 * LIMIT_S)
    check = hours.check("wait")
    assert (check.state, hours.now) == ("refused", LIMIT_S)
    assert "1 h 00 min later" in check.text


def test_our_own_processes_are_nobody_else() -> None:
    ours = GpuProcess(pid=11, name="python", used_bytes=6 * GIB)
    gpu = GpuState(index=0, allocated_bytes=6 * GIB, processes=(ours,))
    assert occupants([gpu], OURS) == []


def test_one_who_draws_or_hides_its_name_or_its_bytes_is_told_as_far_as_known() -> None:
    seen = (GpuProcess(pid=7, name="Xorg", used_bytes=100 * MIB), GpuProcess(pid=8))
    gpu = GpuState(index=1, allocated_bytes=GIB, processes=seen)
    assert occupants([gpu], OURS) == [
        "Xorg (pid 7) with 100.0 MiB on GPU 1",
        "a process unseen from here (pid 8) on GPU 1",
    ]


@pytest.mark.parametrize(("more", "words"), [(0, []), (1, ["somebody unseen with 128.0 MiB on GPU 0"])])
def test_memory_that_nobody_is_seen_to_hold_is_somebodys(more: int, words: list[str]) -> None:
    gpu = GpuState(index=0, allocated_bytes=UNEXPLAINED_BYTES + more)
    assert occupants([gpu], OURS) == words


def test_memory_that_is_not_told_accuses_nobody() -> None:
    assert occupants([GpuState(index=0)], OURS) == []
