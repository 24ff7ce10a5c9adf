"""How a video is decoded: in how many tiles, how many frames at a time, and what that takes.

Most of the decoder's memory is what its causal convolutions remember, two frames of each one's input. In the released
sizes these are, for one position of the latents (8 x 8 pixels), and in float32:

| part | level | channels | convolutions | numbers | MB at 832 x 480 | MB at 1280 x 720 |
| --- | --- | --- | --: | --: | --: | --: |
| low | h x w | 16, 384 | 11 | 7,712 | 192 | 444 |
| mid | h x w | 384 | 1 | 768 | 19 | 44 |
| mid | 2h x 2w | 192, 384 | 7 | 19,968 | 498 | 1,150 |
| mid | 4h x 4w | 192 | 6 | 36,864 | 920 | 2,123 |
| high | 8h x 8w | 96 | 7 | 86,016 | 2,147 | 4,954 |

What comes and goes beside it is at most 14 frames of the full-resolution level: in a residual block, 4 of the input, 6
of a convolution's input with its past, 4 of its result (2,147 and 4,954 MB; with one frame at a time 5, and 2 for the
frames that wait).

The layers of the mid and high parts are local in space. So a tile of the picture can be taken through the whole video
before the next one begins, and only one tile's past is alive. For that the low part is computed first, for all latent
frames, with a past of its own that is gone when the tiles begin; its results stay. They are 384 numbers for each latent
position and frame (201 MB at 832 x 480 with 81 frames, 464 MB at 1280 x 720), and alone grow with the length of the
video. Nowhere else is there less to keep: one level higher it would be eight times as much, and to start each tile from
the latents would repeat the attention, which sees whole frames.

A tile depends on a halo around it, which its neighbours compute again: 7 pixels at full resolution (three blocks of two
convolutions, and the last one), 10 positions at half of it (4 for these 7 and the upsampling's one; and 6), 12 at a
quarter (6 and 6), and 7 at the latents'. Each convolution uses one of them up, and what is used up is cut off at once,
so on average it is about half as much. `wan21.vae.budget` counts both, bytes and multiply-adds, for any plan (of the
multiply-adds without tiles the low part has 4 %, the mid part 57 %, the high part 39 %):

| tiles | GiB, 832 x 480, float32 | work | GiB, 1280 x 720, float32 | work |
| --- | --: | --: | --: | --: |
| 1 | 5.53 | 1.00 | 12.75 | 1.00 |
| 1, single frames | 4.60 | 1.00 | 10.61 | 1.00 |
| 2 x 2 | 1.62 | 1.10 | 3.67 | 1.07 |
| 2 x 3 | 1.20 | 1.14 | 2.66 | 1.09 |
| 3 x 4 | 0.75 | 1.25 | 1.64 | 1.16 |
| 3 x 5 | 0.65 | 1.29 | 1.42 | 1.19 |

With kernels of our own a tile costs more than its work: a launch takes whole rounds of programs, one or two on each
multiprocessor, and at half and a quarter of the resolution a small tile has programs for one round or two. There plans
are compared by the rounds of their launches (`Budget.cost`). In bf16 at 832 x 480, beside whole frames:

| tiles | GiB | work | cost |
| --- | --: | --: | --: |
| 1 x 3 | 1.01 | 1.06 | 1.31 |
| 2 x 2 | 0.77 | 1.09 | 1.37 |
| 1 x 5 | 0.67 | 1.12 | 1.32 |
| 2 x 3 | 0.57 | 1.12 | 1.49 |

Bands of rows that hand the last two rows of each layer's input on to the next band would repeat nothing. But what they
hand on is 1.6 GB at 832 x 480 (for 81 frames, two rows of the input of each convolution and each block), which would
have to live on the host and travel there and back for each band. Halos are the simpler bargain.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from wan21.errors import UsageError
from wan21.vae.decoder import Decoder
from wan21.vae.tiles import Crops, Interval, Windows, split_evenly


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """What is decoded, or encoded, at once. The default is everything: whole frames, and all of a latent frame.

    num_tile_rows: into how many rows of tiles the picture is cut; their heights differ by 8 pixels at most.
    num_tile_cols: likewise.
    frames_at_once: of the 4 frames that belong to a latent frame, how many go through the level of full resolution
        together; None is all. One at a time takes less memory, and longer: each is joined to two earlier ones.

    Raises:
        UsageError: a count is below 1.
    """

    num_tile_rows: int = 1
    num_tile_cols: int = 1
    frames_at_once: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_tile_rows", "num_tile_cols", "frames_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} is not a count; choose an integer of at least 1")

    @property
    def num_tiles(self) -> int:
        """All of them."""
        return self.num_tile_rows * self.num_tile_cols

    def latent_frames(self, num_frames: int) -> Iterable[int]:
        """Which latent frames are gone through, in order: all of them, unless memory is all that is asked for."""
        return range(num_frames)

    def tiles(self, every: Iterable["Tile"]) -> Iterable["Tile"]:
        """Which tiles are gone through, in order: likewise."""
        return every


WHOLE = DecodePlan()


@dataclass(frozen=True)
class Piece:
    """Some frames of one tile, and where they belong in the video.

    pixels: [B, 3, T, H, W] of the piece, float32, clamped to [-1, 1]; strides are the decoder's: channels last.
    """

    frames: slice
    rows: slice
    cols: slice
    pixels: Tensor


@dataclass(frozen=True)
class Strip:
    """One row or one column of tiles: its pixels, what of the low part's features belongs to them, and by layer.

    Decoding gives the pixels and reads the features with a halo; encoding is the other way round.
    """

    pixels: Interval
    features: Interval
    windows: Windows


def strips(decoder: Decoder, size: int, count: int, name: str) -> list[Strip]:
    """The rows (or columns) of tiles over `size` rows of latents, `count` of them.

    Raises:
        UsageError: there are fewer rows than tiles; `name` says of which count.
    """
    found = []
    for interval in split_latents(size, count, name):
        pixels = interval
        for _ in range(decoder.num_upsamplings):
            pixels = pixels.doubled()
        found.append(Strip(pixels, *decoder.windows(pixels)))
    return found


def split_latents(size: int, count: int, name: str) -> list[Interval]:
    """`size` rows (or columns) of latents in `count` parts.

    Raises:
        UsageError: there are fewer rows than parts; `name` says of which count.
    """
    if count > size:
        raise UsageError(f"{name}={count} is more than the {size} latent positions on that side; choose {size} or less")
    return split_evenly(size, count)


@dataclass(frozen=True)
class Tile:
    """One tile: a row and a column of them crossed."""

    rows: Strip
    cols: Strip

    def num_positions(self) -> int:
        """Positions that its layers compute, all together."""
        cols = self.cols.windows
        return sum(len(window.computed) * len(cols[layer].computed) for layer, window in self.rows.windows.items())

    def crops(self) -> Crops:
        """What layers keep of their results."""
        return Crops(self.rows.windows, self.cols.windows)


def tiles(decoder: Decoder, plan: DecodePlan, height: int, width: int) -> list[Tile]:
    """The tiles of latents [h, w], those that compute most first, else row by row.

    So the first tile takes what the rest will: an allocator holds no more from the second one on.

    Raises:
        UsageError: the plan has more tiles on a side than there are latents.
    """
    all_rows = strips(decoder, height, plan.num_tile_rows, "num_tile_rows")
    all_cols = strips(decoder, width, plan.num_tile_cols, "num_tile_cols")
    return sorted((Tile(rows, cols) for rows in all_rows for cols in all_cols), key=Tile.num_positions, reverse=True)
