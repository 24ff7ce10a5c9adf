"""Work that is shared out among processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from wan_sweep.estimate.processes import shared_out

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # pytest's own


def squares(numbers: Sequence[int]) -> dict[int, tuple[int, int]]:
    return {number: (number**2, os.getpid()) for number in numbers}


@pytest.mark.parametrize("num_processes", [1, 2, 3, 9])
def test_all_items_are_worked_on_in_their_order(num_processes: int) -> None:
    made = shared_out(squares, range(5), num_processes)
    assert [(item, square) for item, (square, _) in made.items()] == [(n, n**2) for n in range(5)]
    processes = {process for _, process in made.values()}
    assert made[0][1] == os.getpid()
    assert len(processes) == (min(num_processes, 5) if sys.platform == "linux" else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")
def test_a_fork_that_fails_is_named_with_its_items(capfd: pytest.CaptureFixture[str]) -> None:
    def fail_elsewhere(numbers: Sequence[int]) -> dict[int, int]:
        if 0 not in numbers:
            raise ValueError("no such card")
        return dict.fromkeys(numbers, 0)

    with pytest.raises(RuntimeError, match=r"the process for 1, 3 ended with 1 and without a result"):
        shared_out(fail_elsewhere, range(4), 2)
    assert "ValueError: no such card" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")
def test_no_fork_outlives_a_failure_here() -> None:
    import psutil

    def wait_elsewhere(numbers: Sequence[int]) -> dict[int, int]:
        if 0 in numbers:
            raise ValueError("no such card")
        import time

        time.sleep(600)
        return dict.fromkeys(numbers, 0)

    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="no such card"):
        shared_out(wait_elsewhere, range(4), 4)
    assert set(psutil.Process().children()) <= before


ESTIMATE = """
import json, sys
from wan_sweep.cards import card_named
from wan_sweep.estimate.ranks import estimate_ranks
from wan_sweep.schema import Job

job = Job(model="tiny", device="cuda", frame_num=5, sample_steps=1, ulysses_size=2, dit_fsdp=True, t5_fsdp=True)
told = estimate_ranks(job, card_named("H100-80GB"), num_processes=int(sys.argv[1]))
del told["estimate"]["seconds"]
print(json.dumps(told))
"""


def test_ranks_that_are_gone_through_at_the_same_time_say_the_same() -> None:
    """In processes of their own: the one of these tests may have threads of torch that a fork would miss."""
    one, two = (
        json.loads(subprocess.run([sys.executable, "-c", ESTIMATE, number], capture_output=True, check=True).stdout)
        for number in ("1", "2")
    )
    assert one["estimate"]["gone_through"] == {"0": 0, "1": 1}
    assert one == two
