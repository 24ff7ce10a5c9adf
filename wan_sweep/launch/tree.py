"""Ends a job's processes, all of them: children, their children, and those that left for a session of their own.

A process whose parent died is adopted by init and no longer found from above. So every job carries a mark of its own in
its environment, which children inherit; whoever carries it belongs to the job.
"""

import contextlib
import logging
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

MARK = "WAN_SWEEP_JOB"

_KILL_SECONDS = 10.0
_SECONDS_FOR_STACKS = 0.5
_LONGEST_UNTIL_ASKED = 5.0


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Children of a process, and theirs."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def ask_for_stacks(mark: str) -> None:
    """Lets the job's processes write down where they are, into their logs: those that listen to SIGUSR1, as workers do.

    A process that does not listen would be ended by the signal, so the kernel is asked first who does.
    """
    asked = []
    for process in marked(mark):
        if _is_in("SigCgt", process.pid):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGUSR1)
                asked.append(process.pid)
    if asked:
        # Where the machine is busy with something else, a process may not come to hear of it at once.
        deadline = time.monotonic() + _LONGEST_UNTIL_ASKED
        while any(_is_in("ShdPnd", pid) for pid in asked) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(_SECONDS_FOR_STACKS)


def _is_in(signals: str, pid: int) -> bool:
    """Whether SIGUSR1 is among these signals of a process: SigCgt it listens to, ShdPnd are on their way."""
    try:
        found = re.search(rf"^{signals}:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False  # it has ended, or this is not Linux
    return found is not None and bool(int(found[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def end_tree(process: subprocess.Popen[bytes], mark: str, *, grace_s: float) -> bool:
    """Asks the process to end, gives it time, then kills whatever is left of the job.

    Returns:
        Whether everything is gone. False means a process that even SIGKILL does not end, such as one inside a driver.
    """
    family = descendants(process.pid)
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_s)
    finally:
        # An impatient second Ctrl-C lands here.
        is_gone = _kill_all(process, mark, family)
    return is_gone


def _kill_all(process: subprocess.Popen[bytes], mark: str, family: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + _KILL_SECONDS
    while True:
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)
        left = list({one.pid: one for one in [*marked(mark), *filter(_is_alive, family)]}.values())
        if not left and process.poll() is not None:
            return True
        if time.monotonic() > deadline:
            logger.warning("processes of the job survive SIGKILL: %s", ", ".join(str(one.pid) for one in left))
            return False
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(left, timeout=0.5)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
