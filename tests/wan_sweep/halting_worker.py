"""The real command line with the real worker, except that the worker halts in the middle of longer jobs.

What a test does to a job under way is then done at the same place of the job, however slow the machine is.
"""

import os
import sys
from pathlib import Path

import psutil

from tests.conftest import CLOCK, wait_for

# Halts the last rank at the second step of jobs with three steps or more, once it has told of it.
WORKER = """
import json, os, sys, time
from pathlib import Path

from wan_sweep import worker

here, write = Path(__file__).parent, worker.EventFile.write
is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

def write_and_halt(self, event, *, is_urgent):
    write(self, event, is_urgent=is_urgent)
    if is_last and (event["kind"], event["event"], event["index"]) == ("step", "begin", 1) and event["total"] >= 3:
        number = Path(sys.argv[1]).name.partition("_")[0]
        (here / "unfinished").write_text(str(os.getpid()))
        (here / "unfinished").replace(here / f"halted_{number}")
        while not (here / "go_on").exists():
            time.sleep(0.02)

worker.EventFile.write = write_and_halt
sys.exit(worker.main(sys.argv[1:]))
"""

DRIVER = (
    CLOCK
    + """
from wan_sweep import cli

sys.exit(cli.run(sys.argv[2:], worker=(sys.executable, sys.argv[1])))
"""
)


class HaltingWorker:
    """Jobs of three steps or more halt at the second one.

    Args:
        folder: an empty one, for what such jobs and the test tell each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "worker.py").write_text(WORKER)

    @property
    def command(self) -> list[str]:
        """The command line; arguments are appended."""
        return [sys.executable, "-c", DRIVER, str(self._folder / "worker.py")]

    def wait_for(self, number: int) -> psutil.Process:
        """The process that has halted in the job with this number; of several ranks the last one's."""
        halted = self._folder / f"halted_{number}"
        wait_for(halted.exists)
        return psutil.Process(int(halted.read_text()))

    def let_time_pass(self, worker: psutil.Process) -> None:
        """Makes hours of the seconds in which this worker, which has halted, says nothing."""
        (self._folder / "hangs").write_text(str(worker.pid))

    def go_on(self) -> None:
        """Nothing halts any more."""
        (self._folder / "go_on").touch()

    def ranks(self) -> list[psutil.Process]:
        """The processes of workers under way."""
        found = [process for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid()]
        words = [sys.executable, str(self._folder / "worker.py")]
        return [process for process in found if (process.info["cmdline"] or [])[:2] == words]
