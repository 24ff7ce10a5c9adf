"""What stood when the history begins, rebuilt by walking the history back from the final segments.

A history begins late if it was switched on late, or if it is a ring buffer that lost its beginning. Blocks that are
still there at the end, or that the history allocates, are known exactly. Of blocks that stood and were freed the
history tells only what was requested: their size follows from the rules, up to a tail that may not have been split off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from wan_sweep.allocator import Layout, Settings
from wan_sweep.analyze.snapshot.contents import DeviceSnapshot, FinalBlock
from wan_sweep.units import MIB


@dataclass(frozen=True, kw_only=True)
class StandingBlock:
    """A block that stood at the beginning.

    Attributes:
        num_bytes: None where only the rules can tell.
        final: The same block at the end, if it is still there.
    """

    address: int
    requested_bytes: int
    num_bytes: int | None
    is_awaiting_free: bool
    final: FinalBlock | None = None


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Memory from the driver."""

    address: int
    end: int
    stream: int
    is_expandable: bool


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The memory and the blocks at the beginning."""

    mapped: Sequence[Mapped]
    blocks: Mapping[int, StandingBlock]


def walk_back(snapshot: DeviceSnapshot) -> Standing:
    """Undoes the history, from its end to its beginning."""
    blocks: dict[int, StandingBlock] = {}
    mapped: list[Mapped] = []
    for segment in snapshot.segments:
        mapped.append(
            Mapped(
                address=segment.address,
                end=segment.address + segment.num_bytes,
                stream=segment.stream,
                is_expandable=segment.is_expandable,
            )
        )
        for block in segment.blocks:
            blocks[block.address] = StandingBlock(
                address=block.address,
                requested_bytes=block.requested_bytes,
                num_bytes=block.num_bytes,
                is_awaiting_free=block.is_awaiting_free,
                final=block,
            )
    for entry in reversed(snapshot.entries):
        action = entry["action"]
        if action == "alloc":
            blocks.pop(entry["addr"], None)
        elif action == "free_completed":
            blocks[entry["addr"]] = StandingBlock(
                address=entry["addr"], requested_bytes=entry["size"], num_bytes=None, is_awaiting_free=True
            )
        elif action == "free_requested" and (freed := blocks.get(entry["addr"])) is not None:
            blocks[entry["addr"]] = StandingBlock(
                address=freed.address,
                requested_bytes=freed.requested_bytes,
                num_bytes=freed.num_bytes,
                is_awaiting_free=False,
                final=freed.final,
            )
        elif action in {"segment_alloc", "segment_map"}:
            mapped = _without(mapped, entry["addr"], entry["addr"] + entry["size"])
        elif action in {"segment_free", "segment_unmap"}:
            mapped.append(
                Mapped(
                    address=entry["addr"],
                    end=entry["addr"] + entry["size"],
                    stream=entry.get("stream", 0),
                    is_expandable=action == "segment_unmap",
                )
            )
    return Standing(mapped=sorted(mapped, key=lambda piece: piece.address), blocks=blocks)


def _without(mapped: Sequence[Mapped], start: int, end: int) -> list[Mapped]:
    """The mapped memory but for these addresses."""
    left = []
    for piece in mapped:
        if piece.end <= start or end <= piece.address:
            left.append(piece)
            continue
        for first, last in ((piece.address, start), (end, piece.end)):
            if first < last:
                left.append(Mapped(address=first, end=last, stream=piece.stream, is_expandable=piece.is_expandable))
    return left


def lay_out(standing: Standing, settings: Settings, learned: Mapping[int, int]) -> tuple[Layout, dict[int, int]]:
    """The layout at the beginning, and by how much blocks of unknown size may be larger than it says.

    Args:
        standing: What stood.
        settings: Of the allocator.
        learned: Sizes of blocks, by address, that the history has given away.
    """
    layout = Layout(settings)
    for piece in standing.mapped:
        layout.map(piece.address, piece.end - piece.address, piece.stream, is_expandable=piece.is_expandable)
    blocks = sorted(standing.blocks.values(), key=lambda block: block.address)
    gaps: list[int] = []
    doubts: dict[int, int] = {}
    for block, following in zip_longest(blocks, blocks[1:]):
        free = layout.block_at(block.address)
        if free is None or free.state != "free":
            continue
        if free.address < block.address:
            gap = block.address - free.address
            layout.take(free.address, gap, num_bytes=gap)
            gaps.append(free.address)
            free = layout.block(block.address, "free")
        room = min(free.end, following.address if following is not None else free.end) - block.address
        num_bytes = block.num_bytes or learned.get(block.address)
        if num_bytes is None:
            num_bytes = settings.rounded(block.requested_bytes)
            if not settings.splits(room, num_bytes):
                num_bytes = room
            elif not settings.expandable_segments and num_bytes > MIB:
                doubts[block.address] = min(MIB, room - num_bytes - MIB)
        layout.take(block.address, block.requested_bytes, num_bytes=num_bytes)
        if block.is_awaiting_free:
            layout.request_free(block.address)
    for address in gaps:
        layout.request_free(address)
        layout.complete_free(address)
    return layout, doubts
