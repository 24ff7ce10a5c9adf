"""Requests for memory that failed, with their sizes, which stand nowhere but in the file of a torch profile."""

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

DEVICE_TYPES = {"cpu": 0, "cuda": 1}
"""Numbers that torch's traces write for kinds of devices."""


class Savable(Protocol):
    """A finished profile."""

    def save(self, path: str) -> None:
        """Writes its trace."""


@dataclass(frozen=True, order=True)
class FailedRequest:
    """A request that failed; the time is that of the trace."""

    time: float
    num_bytes: int
    device_type: int
    device_index: int

    def is_of(self, device: torch.device) -> bool:
        """Whether this device was asked."""
        is_alike = self.device_type == DEVICE_TYPES[device.type]
        return is_alike and (device.index is None or device.index == self.device_index)


def failed_requests(profile: Savable) -> list[FailedRequest]:
    """All of a profile, in the order of time; none if its trace cannot be written, which is no reason to lose more."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.save(str(path))
            with path.open(encoding="utf-8") as lines:
                return sorted(parse(lines))
    except OSError:
        return []


def parse(lines: Iterable[str]) -> Iterator[FailedRequest]:
    """The failed requests in a trace, which is read line by line and never held as a whole."""
    time: float | None = None
    is_inside = False
    for line in lines:
        if '"[OutOfMemory]"' in line:
            is_inside, time = True, None
        elif is_inside and time is None and (stamp := re.search(r'"ts": ([\d.]+)', line)):
            time = float(stamp[1])
        elif is_inside and time is not None and '"Bytes"' in line:
            values = {name: int(value) for name, value in re.findall(r'"(Bytes|Device Type|Device Id)": (-?\d+)', line)}
            yield FailedRequest(time, values["Bytes"], values["Device Type"], values["Device Id"])
            is_inside = False
