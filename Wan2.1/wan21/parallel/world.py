"""This process's place among those that make a video together."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

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
    mesh: the grid, with dimensions "cfg", "ring" and "ulysses"; None for a process by itself.
    """

    layout: Layout = SINGLE
    rank: int = 0
    everyone: Group = field(default_factory=Group)
    cfg: Group = field(default_factory=Group)
    ring: Group = field(default_factory=Group)
    ulysses: Group = field(default_factory=Group)
    sequence: Group = field(default_factory=Group)
    mesh: "DeviceMesh | None" = None
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
        dist.init_process_group("nccl", device_id=runtime.device, timeout=LONGEST_WAIT)
    elif owns_processes:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    from torch.distributed.device_mesh import init_device_mesh

    shape = (layout.cfg, layout.ring, layout.ulysses)
    mesh = init_device_mesh(runtime.device.type, shape, mesh_dim_names=("cfg", "ring", "ulysses"))
    flat = init_device_mesh(runtime.device.type, (layout.cfg, layout.sequence), mesh_dim_names=("cfg", "sequence"))
    rank = dist.get_rank()
    return World(
        layout=layout,
        rank=rank,
        everyone=_group(dist.group.WORLD),
        cfg=_group(mesh.get_group("cfg")),
        ring=_group(mesh.get_group("ring")),
        ulysses=_group(mesh.get_group("ulysses")),
        sequence=_group(flat.get_group("sequence")),
        mesh=mesh,
        owns_processes=owns_processes,
    )


def local_device(device: str) -> str:
    """The device of this process: of the GPUs of its machine the one with its number, if "cuda" is asked for."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _group(handle: dist.ProcessGroup | None) -> Group:
    ranks = tuple(dist.get_process_group_ranks(handle))
    return Group(ranks, ranks.index(dist.get_rank()), handle)
