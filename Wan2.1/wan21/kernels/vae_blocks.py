"""How the convolution kernel cuts its work: a table by channels, frames and bytes of a number. No torch, no Triton.

The rows were measured on one H100 by `scripts/bench_vae.py`, which tries all `candidates`; a table rather than a search
at run time, so that every run does the same and none spends its first seconds trying.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from wan21.errors import UsageError

MIN_K = 16
"""The fewest rows, columns and numbers along the sum that a product takes in Triton."""

MOST_CHANNELS = 192
"""Output channels of a program: more sums than these do not fit its registers."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One way to cut a convolution.

    frames: output frames of a program.
    tile_h, tile_w: positions of a program in each of them.
    k: input channels that are multiplied at once.
    channels: output channels of a program, as a sum of two powers of two (the second may be 0).
    shares: an input frame's tile is read once for all output frames; else once for each, and products need not wait
        for one another.
    num_warps, num_stages: as Triton means them.
    """

    frames: int
    tile_h: int
    tile_w: int
    k: int
    channels: tuple[int, int]
    shares: bool
    num_warps: int
    num_stages: int


MULTIPROCESSORS = 132
"""Of a Hopper GPU, on which the table was measured."""

WARPS_AT_ONCE = 8
"""On a multiprocessor: a thread of these programs takes all registers that it may have, 255, and there are 65,536."""


def split_channels(count: int) -> tuple[int, int]:
    """Output channels as a sum of two powers of two, in as few equal parts as it takes; padded where nothing fits."""
    for part in (count // parts for parts in (1, 2, 3, 4) if count % parts == 0):
        largest = 1 << max(0, part.bit_length() - 1)
        rest = part - largest
        if largest >= MIN_K and part <= MOST_CHANNELS and (not rest or (rest >= MIN_K and rest & (rest - 1) == 0)):
            return largest, rest
    return max(MIN_K, min(128, 1 << (count - 1).bit_length())), 0


@cache
def fits_one_program(count: int) -> bool:
    """Whether a program holds all output channels of a position, so that it can normalise them."""
    return sum(split_channels(count)) >= count


def default_blocks(c_in: int, c_out: int, num_frames: int, itemsize: int) -> Blocks:
    """Blocks for sizes that were not measured: they fit registers and shared memory of a Hopper GPU."""
    channels = split_channels(c_out)
    largest_k = 64 // itemsize
    k = largest_k
    while k > MIN_K and c_in % k:
        k //= 2
    most_frames = 4 if sum(channels) <= 96 else 2
    frames = max(frames for frames in (1, 2, 4) if frames <= most_frames and num_frames % frames == 0)
    return Blocks(frames=frames, tile_h=8, tile_w=16, k=k, channels=channels, shares=True, num_warps=8, num_stages=3)


_SMALL = Blocks(frames=4, tile_h=8, tile_w=8, k=32, channels=(64, 32), shares=False, num_warps=4, num_stages=4)

MEASURED: dict[tuple[int, int, int, int], Blocks] = {
    (96, 96, 4, 2): _SMALL,
    (192, 96, 4, 2): _SMALL,
    (96, 3, 4, 2): replace(_SMALL, channels=(16, 0), shares=True, num_stages=3),
    (96, 96, 4, 4): replace(_SMALL, frames=2, k=16, shares=True, num_stages=3),
    (192, 96, 4, 4): replace(_SMALL, k=16, num_stages=3),
    (192, 384, 2, 4): replace(_SMALL, frames=2, k=16, channels=(128, 64), num_stages=3),
    (96, 3, 4, 4): replace(_SMALL, k=16, channels=(16, 0), shares=True),
}
"""By input and output channels, frames, and bytes of a number, where the default is not the fastest."""


@cache
def blocks_for(c_in: int, c_out: int, num_frames: int, itemsize: int, shared_bytes: int | None = None) -> Blocks:
    """The blocks to use for a convolution of `num_frames` output frames.

    Args:
        c_in: input channels.
        c_out: output channels.
        num_frames: of the chunk.
        itemsize: bytes of a number.
        shared_bytes: what a program may have of a multiprocessor's shared memory; None: as much as on Hopper.

    Raises:
        UsageError: there is too little of it for even the smallest blocks.
    """
    asked = MEASURED.get((c_in, c_out, num_frames, itemsize)) or default_blocks(c_in, c_out, num_frames, itemsize)
    limit = SHARED_BYTES if shared_bytes is None else shared_bytes
    for frames in (frames for frames in (4, 2, 1) if frames <= asked.frames and num_frames % frames == 0):
        for stages in range(asked.num_stages, 0, -1):
            blocks = replace(asked, frames=frames, num_stages=stages)
            if fits(blocks, itemsize, shared_bytes=limit):
                return blocks
    raise UsageError(
        f"kernels=fused needs more shared memory than the {limit} bytes of this GPU for a convolution from {c_in} to "
        f"{c_out} channels; choose kernels=torch"
    )


TILES = (((8, 16), 8), ((8, 8), 4), ((8, 16), 4), ((16, 16), 8))
"""Positions of a tile, and warps for it."""


def candidates(c_in: int, c_out: int, num_frames: int, itemsize: int, taps: int = 3) -> Iterator[Blocks]:
    """The blocks worth trying, the likeliest first."""
    base = default_blocks(c_in, c_out, num_frames, itemsize)
    yield base
    for frames, ((tile_h, tile_w), num_warps), shares in product((4, 2, 1), TILES, (True, False)):
        if num_frames % frames == 0 and (taps > 1 or not shares):
            one = replace(base, frames=frames, tile_h=tile_h, tile_w=tile_w, num_warps=num_warps, shares=shares)
            fitting = [
                blocks for stages in (4, 3, 2) if fits(blocks := replace(one, num_stages=stages), itemsize, taps)
            ]
            yield from (blocks for blocks in fitting[:2] if blocks != base)


def programs_at_once(blocks: Blocks) -> int:
    """How many programs run at a time. A launch takes rounds of so many, the last one as long as if it were full."""
    return MULTIPROCESSORS * max(1, WARPS_AT_ONCE // blocks.num_warps)


REGISTERS = 232
"""Of 255 in a thread those that sums may take, with some for addresses."""

SHARED_BYTES = 227 * 2**10
"""Of a multiprocessor since Hopper, for one program."""


def fits(blocks: Blocks, itemsize: int, taps: int = 3, *, shared_bytes: int = SHARED_BYTES) -> bool:
    """Whether sums fit the registers and tiles the shared memory."""
    rows = blocks.tile_h * blocks.tile_w
    sums = blocks.frames * rows * sum(blocks.channels) // (32 * blocks.num_warps)
    read_at_once = taps if blocks.shares else 1
    tiles = (blocks.frames + read_at_once - 1) * rows + read_at_once * sum(blocks.channels)
    return sums <= REGISTERS and tiles * blocks.k * itemsize * blocks.num_stages <= shared_bytes
