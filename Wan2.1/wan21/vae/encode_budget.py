"""What a plan for encoding takes, in bytes and in work; as `wan21.vae.budget` counts, which has what both ways share.

Letters: C channels; T frames at the layer at hand; P positions that it computes; t, h, w of the latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from wan21.vae.budget import SINGLE_FRAME_WORK, TileBudget, chain
from wan21.vae.encode_plan import encode_strips
from wan21.vae.encoder import Encoder
from wan21.vae.need import Need, macs_of
from wan21.vae.plan import DecodePlan, Strip

if TYPE_CHECKING:
    from torch import nn

    from wan21.vae.layers import Downsample

LATENT_BYTES = 4
"""The latents are float32 whatever the VAE computes in."""

FRAMES = 4
"""Of the video for each latent frame but the first."""


@dataclass(frozen=True)
class _Parts:
    """What the encoder's three parts take, for one latent frame.

    waiting: numbers of the frames at hand, and of those that are halved, while the high part runs.
    num_frames: how many go in.
    """

    high: Need
    mid: Need
    low: Need
    waiting: int
    num_frames: int


class EncodeBudget(TileBudget):
    """Bytes and work of plans for encoding one video.

    Args:
        encoder: its layers are counted; it may be on the meta device.
        latent_shape: (t, h, w).
        itemsize: bytes of a number in the encoder's format.
        batch_size: videos encoded together.
    """

    verb = "encode"

    def __init__(
        self, encoder: Encoder, latent_shape: tuple[int, int, int], *, itemsize: int, batch_size: int = 1
    ) -> None:
        super().__init__(latent_shape, itemsize=itemsize, batch_size=batch_size)
        self._encoder = encoder

    def num_bytes(self, plan: DecodePlan) -> int:
        """The most that `Vae.encode_pixels` takes at a time, beside weights and what it is given of the video."""
        t, h, w = self._shape
        parts = self._parts(plan, largest=True)
        high, mid, low = parts.high, parts.mid, parts.low
        tile = high.past + mid.past + max(high.passing + parts.waiting, mid.passing)
        if plan.num_tiles == 1:
            most = low.past + max(tile, high.past + mid.past + low.passing)
        else:
            most = self._encoder.low_dim * t * h * w + max(tile, low.past + low.passing)
        head = cast("nn.Conv3d", self._encoder.head["2"])
        latents = head.out_channels // 2 * t * h * w
        return most * self._bytes_per_number + latents * LATENT_BYTES * self._batch_size

    def work(self, plan: DecodePlan, num_ranks: int = 1) -> float:
        parts = self._parts(plan, largest=False)
        of_one = -(-plan.num_tiles // num_ranks) / plan.num_tiles
        macs = (parts.high.macs + parts.mid.macs) * of_one + parts.low.macs
        return macs * (SINGLE_FRAME_WORK if plan.frames_at_once == 1 and parts.num_frames > 1 else 1)

    def _strips(self, size: int, count: int, name: str) -> Sequence[Strip]:
        return encode_strips(self._encoder, size, count, name)

    def _parts(self, plan: DecodePlan, *, largest: bool) -> _Parts:
        _, h, w = self._shape
        encoder, past = self._encoder, self._past
        positions = self._positions(plan, largest=largest)
        frames = FRAMES if past else 1
        at_once = min(frames, plan.frames_at_once or frames)

        first, pixels = encoder.conv1, positions[encoder.conv1]
        joined, made = (at_once + past) * first.in_channels * pixels, at_once * first.out_channels * pixels
        high = Need(past * first.in_channels * pixels, joined + made, at_once * macs_of(first, pixels))
        layers = encoder.downsamples[: encoder.first_downsampling + 1]
        blocks, _, stored = chain(layers, positions, at_once, past, pixels)
        high = high.then(blocks)
        waiting = frames * first.in_channels * pixels
        if at_once < frames:
            waiting += frames * cast("nn.Conv2d", cast("Downsample", layers[-1]).resample[1]).out_channels * stored
            # All of it is done as often as it takes.
            high = Need(high.past, high.passing, high.macs * frames // at_once)

        layers = encoder.downsamples[encoder.first_downsampling + 1 : encoder.last_downsampling + 1]
        mid, _, _ = chain(layers, positions, frames, past, stored)

        whole = dict.fromkeys(encoder.modules(), h * w)
        low, _, _ = chain(
            (*encoder.downsamples[encoder.last_downsampling + 1 :], *encoder.middle), whole, 1, past, h * w
        )
        head = cast("nn.Conv3d", encoder.head["2"])
        computed = head.in_channels * h * w
        low = low.then(Need(past * computed, (2 + past) * computed, macs_of(head, h * w)))
        return _Parts(high, mid, low, waiting, frames)
