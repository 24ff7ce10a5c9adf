"""Starts a job's process, sleeps until it ends or a limit is hit, and leaves nothing behind."""

import contextlib
import os
import select
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wan_sweep.launch.tree import MARK, ask_for_stacks, end_tree, marked

LOOKS_PER_SECOND = 5


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a job may take, and be silent; None is for ever. After SIGTERM it has `grace_s` to leave."""

    timeout_s: float | None = None
    stall_timeout_s: float | None = None
    grace_s: float = 5.0


class StopError(Exception):
    """Whoever looks after a process has seen a reason to stop it: others with which it works have ended."""


Limit = Literal["time", "silence", "others"]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process ended.

    Attributes:
        exit_code: As the process gave it; minus the number of the signal that killed it.
        limit: The limit that was hit, or "others" if it was stopped because of them; None if it ended by itself.
        is_clean: Whether no process of the job is left.
        num_left_behind: Processes that the job itself had not ended.
    """

    exit_code: int
    limit: Limit | None = None
    is_clean: bool = True
    num_left_behind: int = 0


def run_process(
    command: Sequence[str],
    *,
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    limits: Limits,
    look: Callable[[], bool],
    pass_fds: Sequence[int] = (),
) -> Ending:
    """Runs a command in a session of its own until its end.

    Whatever ends this function - the process, a limit, Ctrl-C, an error in `look` - no process of the job survives it.

    Args:
        command: Program and arguments; no shell is involved.
        folder: The folder it starts in.
        log: Takes all that it prints.
        environment: Its whole environment.
        limits: When to stop it.
        look: Called about five times a second; tells whether there was a sign of life, or raises StopError.
        pass_fds: Files that stay open in it, such as locks that it is to hold as long as it lives.

    Raises:
        OSError: the command cannot be started, or the log not be written.
    """
    mark = uuid.uuid4().hex
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    limit: Limit | None = None
    num_left_behind, is_clean = 0, True
    try:
        try:
            limit = _wait(process, limits, look)
        except StopError:
            limit = "others"
        if limit is None:
            num_left_behind = len(marked(mark))
        else:
            ask_for_stacks(mark)
    finally:
        is_clean = end_tree(process, mark, grace_s=limits.grace_s)
    with contextlib.suppress(StopError):
        look()
    exit_code = process.poll()
    return Ending(
        exit_code=-9 if exit_code is None else exit_code,
        limit=limit,
        is_clean=is_clean,
        num_left_behind=num_left_behind,
    )


def _wait(process: subprocess.Popen[bytes], limits: Limits, look: Callable[[], bool]) -> Limit | None:
    started = heard = time.monotonic()
    with _sleeper(process) as sleep:
        while not sleep(1 / LOOKS_PER_SECOND):
            now = time.monotonic()
            if look():
                heard = now
            if limits.timeout_s is not None and now - started > limits.timeout_s:
                return "time"
            if limits.stall_timeout_s is not None and now - heard > limits.stall_timeout_s:
                return "silence"
    return None


@contextmanager
def _sleeper(process: subprocess.Popen[bytes]) -> Iterator[Callable[[float], bool]]:
    """A sleep that ends early, and returns True, when the process does."""
    if not hasattr(os, "pidfd_open"):
        yield lambda seconds: _ends_within(process, seconds)
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        yield lambda seconds: bool(poll.poll(seconds * 1000)) or process.poll() is not None
    finally:
        os.close(descriptor)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
