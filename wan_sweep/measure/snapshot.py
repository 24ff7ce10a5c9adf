"""The allocator's own history on CUDA, in a file that PyTorch's memory_viz opens."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MOST_ENTRIES = 1_000_000
"""So many entries of the history are kept, the latest; an allocation makes three (taken, given back, free again).

A step of the 1.3B transformer at 832 x 480 x 81 makes 118,000 with guidance, one of the 14B at 1280 x 720 x 81 makes
370,000. An entry takes some 100 bytes in the file.
"""

MOST_ENTRIES_WITH_STACKS = 200_000
"""A stack takes kilobytes of the host's memory, and hundreds of bytes in the file."""

Tagger = Callable[[str], None]


@contextmanager
def history(*, stacks: bool = False) -> Iterator[None]:
    """Lets the CUDA allocator write down what it does; `write_snapshot` has to be called inside.

    Args:
        stacks: whether each entry has Python's stack, too; costs microseconds an allocation, and much host memory.

    Raises:
        RuntimeError: torch has no CUDA.
    """
    record: Any = torch.cuda.memory._record_memory_history  # noqa: SLF001  # torch documents it under this name
    num_entries = MOST_ENTRIES_WITH_STACKS if stacks else MOST_ENTRIES
    record("all", context="all" if stacks else None, stacks="python", max_entries=num_entries)
    try:
        yield
    finally:
        record(None)


def write_snapshot(path: Path, take: Callable[[], object] | None = None) -> None:
    """Writes what the allocator holds and what it did, whole or not at all.

    Args:
        path: of the pickle; torch's own tools and pages read it.
        take: what gives the snapshot; the CUDA allocator's unless told otherwise.

    Raises:
        OSError: the disk is full, or the folder not writable; an older file stays as it was.
    """
    snapshot = (take or torch.cuda.memory._snapshot)()  # noqa: SLF001  # torch documents it under this name
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            pickle.dump(snapshot, file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tagger(device: torch.device) -> Tagger:
    """What puts a tag on the history's later entries; it does nothing where the allocator takes none."""
    tag: Tagger | None = getattr(torch.cuda.memory, "_set_memory_metadata", None)  # torch 2.6 has none
    return tag if tag is not None and device.type == "cuda" else _untagged


def _untagged(tag: str) -> None:
    """Takes a tag to nowhere."""
