"""How a video is encoded within a number of bytes: in how many tiles, and how many frames at a time.

The high part of the encoder is local in space. So a tile of the picture can be taken through the whole video before the
next one begins, and only one tile's past is alive. What it gives is kept for all latent frames, 384 numbers for each
position (464 MB at 1280 x 720 with 81 frames in float32); then the low part goes over whole frames. A tile is taken
with a halo of 4 latents before it and 5 behind, which its neighbours compute again; nothing is blended.

`DecodePlan`'s three numbers say this, too; the frames at once are those of the 4 that make a latent frame.

| tiles | GiB, 832 x 480, float32 | work | GiB, 1280 x 720, float32 | work |
| --- | --: | --: | --: | --: |
| 1 | 4.13 | 1.00 | 9.53 | 1.00 |
| 1, single frames | 3.13 | 1.06 | 7.23 | 1.06 |
| 2 x 2 | 1.47 | 1.25 | 3.18 | 1.16 |
| 2 x 3 | 1.19 | 1.35 | 2.45 | 1.22 |
| 3 x 4 | 0.85 | 1.64 | 1.70 | 1.40 |
| 3 x 5 | 0.76 | 1.75 | 1.50 | 1.47 |
| 3 x 5, single frames | 0.62 | 1.85 | 1.25 | 1.56 |

Letters: T, H, W of the video; t, h, w of its latents; P positions at the layer at hand.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from wan21.errors import UsageError
from wan21.vae.budget import PAST, SINGLE_FRAME_WORK, all_plans, block_need
from wan21.vae.encoder import Encoder
from wan21.vae.layers import AttentionBlock, Downsample, ResidualBlock
from wan21.vae.need import NOTHING, Need
from wan21.vae.plan import DecodePlan
from wan21.vae.tiles import Interval, split_evenly

CHUNK = 4
"""Frames of a latent frame behind the first."""


@dataclass(frozen=True)
class EncodeStrip:
    """One row or one column of tiles: which latents it gives, and the pixels that it is computed from."""

    latents: Interval
    pixels: Interval

    def kept(self, stride: int) -> slice:
        """Where its latents are in what is computed from its pixels."""
        first = self.pixels.start // stride
        return slice(self.latents.start - first, self.latents.stop - first)


@dataclass(frozen=True)
class EncodeTile:
    """One tile: a row and a column of them crossed."""

    rows: EncodeStrip
    cols: EncodeStrip


def encode_strips(encoder: Encoder, size: int, count: int, name: str) -> list[EncodeStrip]:
    """The rows (or columns) of tiles over `size` rows of latents, `count` of them.

    Raises:
        UsageError: there are fewer rows than tiles; `name` says of which count.
    """
    if count > size:
        raise UsageError(f"{name}={count} is more than the {size} latent positions on that side; choose {size} or less")
    return [EncodeStrip(interval, encoder.needs(interval)) for interval in split_evenly(size, count)]


def encode_tiles(encoder: Encoder, plan: DecodePlan, height: int, width: int) -> Iterator[EncodeTile]:
    """The tiles of latents [h, w], row by row.

    Raises:
        UsageError: the plan has more tiles on a side than there are latents.
    """
    all_cols = encode_strips(encoder, width, plan.num_tile_cols, "num_tile_cols")
    for rows in encode_strips(encoder, height, plan.num_tile_rows, "num_tile_rows"):
        for cols in all_cols:
            yield EncodeTile(rows, cols)


class EncodeBudget:
    """Bytes and work of plans for one video; by arithmetic, nothing runs. Bytes are what tensors ask for.

    Args:
        encoder: its layers are counted; it may be on the meta device.
        latent_shape: (t, h, w).
        itemsize: bytes of a number in the encoder's format.
    """

    def __init__(self, encoder: Encoder, latent_shape: tuple[int, int, int], *, itemsize: int) -> None:
        self._encoder = encoder
        self._shape = latent_shape
        self._itemsize = itemsize
        self._past = PAST if latent_shape[0] > 1 else 0

    def num_bytes(self, plan: DecodePlan) -> int:
        """The most that `Vae.encode_chunks` takes at a time, beside weights, with the chunks of pixels it is given."""
        t, h, w = self._shape
        frames = CHUNK if t > 1 else 1
        stride = 2**self._encoder.num_downsamplings
        tile = max(self._tile_areas(plan))
        high, low = self._high(tile, frames, plan.frames_at_once), self._low(h * w)
        pixels = 3 * frames * tile  # in the encoder's format
        if plan.num_tiles == 1:
            most = low.past + high.past + max(high.passing + pixels, low.passing)
        else:
            features = self._encoder.high_dim * t * h * w
            most = features + max(high.past + high.passing + pixels, low.past + low.passing)
        chunk = 3 * frames * h * w * stride**2
        latents = self._encoder.latent_dim * t * h * w
        return most * self._itemsize + (chunk + latents) * 4  # float32 whatever the encoder's format is

    def work(self, plan: DecodePlan) -> float:
        """Pixels that are computed, halos included, in frames."""
        _, h, w = self._shape
        area = sum(self._tile_areas(plan)) / (h * w * 4**self._encoder.num_downsamplings)
        return area * (SINGLE_FRAME_WORK if plan.frames_at_once == 1 and self._shape[0] > 1 else 1)

    def least_bytes(self) -> int:
        """What the plan takes that takes least."""
        return min(map(self.num_bytes, self._plans(1)))

    def best_plan(self, budget_bytes: float) -> DecodePlan:
        """The plan of least work among those that take no more than `budget_bytes`.

        Raises:
            UsageError: there is none.
        """
        for frames_at_once in (None, 1):
            fitting = [plan for plan in self._plans(frames_at_once) if self.num_bytes(plan) <= budget_bytes]
            if fitting:
                return min(fitting, key=lambda plan: (self.work(plan), plan.num_tiles))
        t, h, w = self._shape
        raise UsageError(
            f"budget_bytes={budget_bytes} is too little to encode {t} x {h} x {w} latents: the smallest tiles need "
            f"{self.least_bytes()}; allow that, or choose a smaller number format, a smaller picture or fewer frames"
        )

    def _plans(self, frames_at_once: int | None) -> list[DecodePlan]:
        return all_plans(self._shape[1], self._shape[2], frames_at_once)

    def _tile_areas(self, plan: DecodePlan) -> list[int]:
        _, h, w = self._shape
        rows = encode_strips(self._encoder, h, plan.num_tile_rows, "num_tile_rows")
        cols = encode_strips(self._encoder, w, plan.num_tile_cols, "num_tile_cols")
        return [len(row.pixels) * len(col.pixels) for row in rows for col in cols]

    def _high(self, positions: int, frames: int, frames_at_once: int | None) -> Need:
        """Of the high part, over so many pixels."""
        layers = list(self._encoder.downsamples[: self._encoder.last_downsampling + 1])
        split = self._encoder.first_downsampling + 1
        at_once = min(frames, frames_at_once or frames)
        dim = self._encoder.conv1.out_channels
        first = Need(self._past * 3 * positions, (at_once + self._past) * 3 * positions + at_once * dim * positions, 0)
        full = first.then(self._chain(layers[:split], positions, at_once))
        waiting = 0 if at_once == frames else 2 * frames * dim * (positions // 4)
        full = Need(full.past, full.passing + waiting, 0)
        return full.then(self._chain(layers[split:], positions // 4, frames))

    def _low(self, positions: int) -> Need:
        layers = [*self._encoder.downsamples[self._encoder.last_downsampling + 1 :], *self._encoder.middle]
        dim = self._encoder.high_dim
        head = Need(self._past * dim * positions, (2 + self._past) * dim * positions, 0)
        return self._chain(layers, positions, 1).then(head)

    def _chain(self, layers: Iterable[nn.Module], positions: int, frames: int) -> Need:
        need = NOTHING
        for layer in layers:
            if isinstance(layer, ResidualBlock):
                need = need.then(
                    block_need(layer, dict.fromkeys(layer.modules(), positions), frames, self._past, positions)
                )
            elif isinstance(layer, AttentionBlock):
                need = need.then(Need(0, 5 * layer.proj.in_channels * frames * positions, 0))
            elif isinstance(layer, Downsample):
                need = need.then(self._downsample(layer, positions, frames))
                positions //= 4
                frames = max(1, frames // 2) if layer.time_conv is not None else frames
        return need

    def _downsample(self, layer: Downsample, positions: int, frames: int) -> Need:
        dim = cast("nn.Conv2d", layer.resample[1]).in_channels
        after = dim * positions // 4
        in_space = Need(0, 2 * frames * dim * positions + frames * after, 0)  # input, padded copy, result
        if layer.time_conv is None or not self._past:
            return in_space
        # It remembers one frame, and joins it to the others.
        return in_space.then(Need(after, (2 * frames + 1) * after, 0))
