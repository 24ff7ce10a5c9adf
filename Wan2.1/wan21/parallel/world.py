"""This process's place among those that make a video together."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from wan21.errors import UsageError
from wan21.layout import SINGLE, Layout
from wan21.runtime import Runtime

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LONGEST_WAIT = timedelta(minutes=30)
"""For a process that another one waits for, such as one that loads weights from a slow disk."""


@dataclass(frozen=True)
class Group:
    """Processes that exchange with each other.

    ranks: of all members in the world, in the group's order.
    rank: which of the members this process is.
    handle: what torch calls them; None for a process by itself.
    """

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.ranks)

    @property
    def others(self) -> list[int]:
        """The members but this process, by rank in the group."""
        return [member for member in range(self.size) if member != self.rank]


@dataclass(frozen=True)
class World:
    """This process's place.

    layout: how the run is spread.
    rank: of this process.
    everyone: all processes.
    cfg, ring, ulysses: those that differ from this one in this coordinate of the grid alone.
    sequence: those that share a video's tokens with it: ring x ulysses.
    line: everyone, as torch's FSDP wants to be told of them; None where no weights are sharded.
    """

    layout: Layout = SINGLE
    rank: int = 0
    everyone: Group = field(default_factory=Group)
    cfg: Group = field(default_factory=Group)
    ring: Group = field(default_factory=Group)
    ulysses: Group = field(default_factory=Group)
    sequence: Group = field(default_factory=Group)
    line: "DeviceMesh | None" = None
    owns_processes: bool = False

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.everyone.size

    def close(self) -> None:
        """Takes leave of the others, if `connect` made the acquaintance; all processes have to."""
        if self.owns_processes:
            dist.destroy_process_group()


ALONE = World()


def connect(layout: Layout, runtime: Runtime) -> World:
    """Joins the processes that torchrun has started, and finds this one's place.

    Torch's process group is made if there is none, with NCCL for a GPU and gloo for a CPU, and is then the world's to
    close. A layout of one process needs neither torchrun nor a group.

    Weights, text and tiles are for everyone; each other way to speak that a layout has gets a group of its own, so that
    tokens never queue behind weights, and no group is made twice: a communicator of NCCL takes hundreds of MiB. Torch's
    DeviceMesh would make one for each dimension, also where nobody is to speak to.

    Args:
        layout: how the run is spread.
        runtime: where this process computes; one GPU for each process.

    Raises:
        UsageError: there are more or fewer processes than the layout has.
    """
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if started != layout.world_size:
        raise UsageError(
            f"{layout.words()} needs {layout.world_size} processes and there are {started}; start them with "
            f"torchrun --nproc-per-node={layout.world_size}, or choose sizes whose product is {started}"
        )
    if started == 1:
        return ALONE
    owns_processes = not dist.is_initialized()
    if owns_processes and runtime.device.type == "cuda":
        dist.init_process_group("nccl", device_id=runtime.device, timeout=LONGEST_WAIT, pg_options=_urgent())
    elif owns_processes:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    grid = torch.arange(layout.world_size).view(layout.cfg, layout.ring, layout.ulysses)
    sequence = _group(grid.flatten(1))
    has_both = layout.ring > 1 and layout.ulysses > 1
    alone = Group((dist.get_rank(),))
    return World(
        layout=layout,
        rank=dist.get_rank(),
        everyone=Group(tuple(range(layout.world_size)), dist.get_rank(), dist.group.WORLD),
        cfg=_group(grid.flatten(1).t()),
        ring=_group(grid.transpose(1, 2).flatten(0, 1)) if has_both else sequence if layout.ring > 1 else alone,
        ulysses=_group(grid.flatten(0, 1)) if has_both else sequence if layout.ulysses > 1 else alone,
        sequence=sequence,
        line=_line(layout, runtime),
        owns_processes=owns_processes,
    )


def local_device(device: str) -> str:
    """The device of this process: of the GPUs of its machine the one with its number, if "cuda" is asked for."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _group(members: torch.Tensor) -> Group:
    """This process's of the groups of a division, [groups, members]; all processes have to ask for it."""
    rank = dist.get_rank()
    ranks = [tuple(row) for row in members.tolist()]
    own = next(row for row in ranks if rank in row)
    if len(own) == 1:
        return Group(own)
    options = _urgent() if dist.get_backend() == "nccl" else None
    handles = [dist.new_group(list(row), timeout=LONGEST_WAIT, pg_options=options) for row in ranks]
    return Group(own, own.index(rank), handles[ranks.index(own)])


def _line(layout: Layout, runtime: Runtime) -> "DeviceMesh | None":
    """Of all processes, which torch has a group for already."""
    if not (layout.dit_fsdp or layout.t5_fsdp):
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(runtime.device.type, list(range(layout.world_size)))


def _urgent() -> "dist.ProcessGroupNCCL.Options":
    """Messages before products: a kernel of attention fills a GPU, and messages would wait until its last part ends."""
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options._timeout = LONGEST_WAIT  # noqa: SLF001  # torch warns where it differs from that of the group
    return options
