"""Which job may use which GPU: a lock file for each, held by the processes of the job that uses it.

Jobs that run at the same time, of one sweep or of several, of one user or of several, so get GPUs of their own and wait
for them. The system frees the locks of whoever ends, however that happens.
"""

import contextlib
import fcntl
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wan_sweep.errors import UsageError

LOOKS_PER_SECOND = 5
_FOR_ALL_USERS = 0o1777
_TURN = "turn"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a job holds while it runs.

    Attributes:
        devices: The GPUs, as CUDA_VISIBLE_DEVICES names them; none for a job on the CPU.
        indices: Their places among those that this process may use; empty where their memory is nobody's measure.
        locks: Open files whose locks keep others away; its processes hold them, too, as long as they live.
    """

    devices: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    locks: tuple[int, ...] = ()


NOTHING = Lease()


def lock_folder() -> Path:
    """Where the locks of this machine lie."""
    return Path(tempfile.gettempdir()) / "wan_sweep_gpus"


class Slots:
    """The GPUs of which jobs take theirs.

    Args:
        folder: of the lock files, which all who are to keep apart share.
        gpus: identity by the name that CUDA_VISIBLE_DEVICES has for it; one GPU can have several names.
    """

    def __init__(self, folder: Path, gpus: Mapping[str, str]) -> None:
        self._folder = folder
        self._gpus = dict(gpus)

    @contextmanager
    def take(self, num: int, *, shares: bool = False, on_wait: Callable[[], None] = lambda: None) -> Iterator[Lease]:
        """Waits for so many GPUs, and gives them back at the end.

        Args:
            num: how many.
            shares: whether others who share, too, may have them at the same time.
            on_wait: is told, once, that they are not free yet.

        Raises:
            UsageError: there are not so many, or the locks cannot be made.
        """
        if num > len(self._gpus):
            raise UsageError(
                f"{num} GPU{'s' if num > 1 else ''} needed, and this process may use {len(self._gpus)}; "
                "see CUDA_VISIBLE_DEVICES"
            )
        self._make_folder()
        held: dict[str, int] = {}
        try:
            with self._turn(on_wait) if num > 1 else contextlib.nullcontext():
                has_waited = False
                while not self._fill(held, num, shares=shares):
                    if not has_waited:
                        has_waited = True
                        on_wait()
                    time.sleep(1 / LOOKS_PER_SECOND)
            names = sorted(held, key=list(self._gpus).index)
            yield Lease(
                devices=tuple(names),
                indices=() if shares else tuple(list(self._gpus).index(name) for name in names),
                locks=tuple(held[name] for name in names),
            )
        finally:
            for file in held.values():
                fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were given the file
                os.close(file)

    def _fill(self, held: dict[str, int], num: int, *, shares: bool) -> bool:
        """Takes what is free, as much as is needed; returns whether that is enough."""
        free = [name for name in self._gpus if name not in held]
        for name in free:
            if len(held) < num and (file := self._lock(self._gpus[name], fcntl.LOCK_EX)) is not None:
                held[name] = file
                if shares:
                    fcntl.flock(file, fcntl.LOCK_SH)
        for name in random.sample(free, len(free)) if shares else []:  # nobody has the first one more often
            if len(held) < num and name not in held:
                file = self._lock(self._gpus[name], fcntl.LOCK_SH)
                if file is not None:
                    held[name] = file
        return len(held) == num

    @contextmanager
    def _turn(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Only one gathers several GPUs at a time: two that each hold what the other lacks would wait for ever."""
        file = self._lock(_TURN, fcntl.LOCK_EX)
        if file is None:
            on_wait()
        while file is None:
            time.sleep(1 / LOOKS_PER_SECOND)
            file = self._lock(_TURN, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(file)

    def _lock(self, identity: str, kind: int) -> int | None:
        """An open file with the lock of a GPU; None while somebody else has it."""
        path = self._folder / f"{identity}.lock"
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            with _as_usage_error(path):
                file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            with _as_usage_error(path):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        return file

    def _make_folder(self) -> None:
        if not self._folder.is_dir():
            with _as_usage_error(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # somebody else was faster, and has seen to it
                self._folder.chmod(_FOR_ALL_USERS)


@contextmanager
def _as_usage_error(path: Path) -> Iterator[None]:
    """Says where locks cannot be made, and what to do."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise UsageError(
            f"{path}, by which jobs keep GPUs apart, cannot be made: {error.strerror or error}; "
            "let TMPDIR name a folder on this machine that can be written"
        ) from error
