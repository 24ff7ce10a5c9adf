"""The encoder: pixels to the channels from which mean and log variance are read, in three parts.

- high: the level of full resolution and the first downsampling. Convolutions only, as many frames out as in.
- mid: the levels between, down to the last downsampling. Four frames become one here. Convolutions only.
- low: everything at the latents' resolution, with the only attention. It needs whole frames and holds little.

As in the decoder, which has the same parts in the other order, the first two may be computed in tiles, and the first
one in any number of frames at a time.

Letters: B videos; C channels; T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8).
"""

from typing import cast

import torch
from torch import Tensor, nn

from wan21.models import VaeConfig
from wan21.vae.layers import AttentionBlock, CausalConv3d, Downsample, ResidualBlock, RmsNorm, norm_silu_conv
from wan21.vae.past import Past
from wan21.vae.tiles import Interval, Window, Windows


class Encoder(nn.Module):
    """Residual blocks with a downsampling between levels, then a block of attention between two more."""

    def __init__(self, config: VaeConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        dims = [config.base_dim * multiplier for multiplier in config.multipliers]
        self.conv1 = CausalConv3d(3, config.base_dim, dtype=dtype)
        layers: list[nn.Module] = []
        downsamplings = []
        dim = config.base_dim
        for level, level_dim in enumerate(dims):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(dim, level_dim, dtype=dtype))
                dim = level_dim
            if level < len(dims) - 1:
                downsamplings.append(len(layers))
                self.low_dim = dim
                layers.append(Downsample(dim, in_time=config.temporal_downsample[level], dtype=dtype))
        self.first_downsampling, self.last_downsampling = downsamplings[0], downsamplings[-1]
        self.downsamples = nn.ModuleList(layers)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(dim, dim, dtype=dtype),
                AttentionBlock(dim, dtype=dtype),
                ResidualBlock(dim, dim, dtype=dtype),
            ]
        )
        self.head = nn.ModuleDict(
            {"0": RmsNorm(dim, dtype=dtype), "2": CausalConv3d(dim, 2 * config.z_dim, dtype=dtype)}
        )

    def high(self, video: Tensor, past: Past, *, frames_at_once: int | None = None) -> Tensor:
        """Goes from the next frames [B, 3, T, H, W] to [B, C, T, H / 2, W / 2], C = base_dim for the default sizes.

        Args:
            video: one frame if it is the first, else a multiple of the temporal stride.
            past: of this pass.
            frames_at_once: with fewer than T, the frames are computed in parts, one after the other.

        Memory: at full resolution [B, C, 3T + 2, H, W] in a residual block, beside what `past` holds. In parts, T is
        that of a part, and the results wait.
        """
        if frames_at_once is None or frames_at_once >= video.shape[2]:
            x = past.extend(self.conv1, video)
            x = past.crop(self.conv1, self.conv1(x))
            for layer in self.downsamples[: self.first_downsampling + 1]:
                x = layer(x, past)
            return x
        is_last = past.is_last
        halved = []
        for start in range(0, video.shape[2], frames_at_once):
            stop = start + frames_at_once
            past.is_last = is_last and stop >= video.shape[2]
            halved.append(self.high(video[:, :, start:stop], past))
        return torch.cat(halved, dim=2)

    def mid(self, x: Tensor, past: Past) -> Tensor:
        """Goes on from what `high` returns, or from a tile of it, to features [B, C', 1, h, w] of one latent frame."""
        for layer in self.downsamples[self.first_downsampling + 1 : self.last_downsampling + 1]:
            x = layer(x, past)
        return x

    def low(self, x: Tensor, past: Past) -> Tensor:
        """Goes on from whole frames of what `mid` returns to [B, 2 * C, 1, h, w]."""
        for layer in self.downsamples[self.last_downsampling + 1 :]:
            x = layer(x, past)
        residual, attention, last_residual = self.middle
        x = residual(x, past)
        x = attention(x)
        x = last_residual(x, past)
        return norm_silu_conv(((self.head["0"], self.head["2"]),), x, past, overwrite=True)

    def forward(self, video: Tensor, past: Past) -> Tensor:
        """Encodes the next frames.

        Args:
            video: one frame if it is the first, else as many as the temporal stride, [B, 3, T, H, W].
            past: of this pass.

        Returns:
            [B, 2 * C, 1, h, w].

        Memory: that of the parts; at full resolution [B, C, 3T + 2, H, W] with C = base_dim, beside the past.
        """
        # Not named here: a name would keep what one part returns alive for as long as the next one runs.
        return self.low(self.mid(self.high(video, past), past), past)

    def windows(self, kept: Interval) -> tuple[Interval, Windows]:
        """What the rows (or columns) `kept` of the features behind the last downsampling need.

        Returns:
            The rows of pixels on which they depend, and what each layer computes for them.
        """
        into: Windows = {}
        needed = kept
        for layer in reversed(self.downsamples[: self.last_downsampling + 1]):
            if isinstance(layer, Downsample):
                into[layer] = Window(computed=needed, kept=needed)
                needed = needed.before_halving()
            else:
                needed = cast("ResidualBlock", layer).windows(needed, into)
        computed = needed.grown()
        into[self.conv1] = Window(computed=computed, kept=needed)
        return computed, into
