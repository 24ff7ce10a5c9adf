"""The encoder: pixels to the channels from which mean and log variance are read, in two parts.

- high: from full resolution down to the latents'. Convolutions only, so it may be computed in tiles; the level of full
  resolution, which leaves the number of frames alone, in any number of frames at a time.
- low: everything at the latents' resolution, with the only attention. It needs whole frames and holds little.

Letters: B videos; C channels; T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8).
"""

import torch
from torch import Tensor, nn

from wan21.config import VaeConfig
from wan21.vae.layers import AttentionBlock, CausalConv3d, Downsample, ResidualBlock, RmsNorm, norm_silu_conv
from wan21.vae.past import Past
from wan21.vae.tiles import Interval


class Encoder(nn.Module):
    """Residual blocks with a downsampling between levels, then a block of attention between two more."""

    def __init__(self, config: VaeConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.latent_dim = config.z_dim
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
                self.high_dim = dim
                layers.append(Downsample(dim, in_time=config.temporal_downsample[level], dtype=dtype))
        self.first_downsampling, self.last_downsampling = downsamplings[0], downsamplings[-1]
        self.num_downsamplings = len(downsamplings)
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
        """Goes from the next frames, or a tile of them, to features at the latents' resolution.

        Args:
            video: one frame if it is the first, else a multiple of the temporal stride, [B, 3, T, H, W].
            past: of this pass.
            frames_at_once: with fewer than T, the level of full resolution is computed in parts, one after the other.

        Returns:
            [B, high_dim, t, h, w], where t is 1 for the first frame.

        Memory: at full resolution [B, C, 3T + 2, H, W] with C = base_dim, beside what `past` holds. In parts, T is that
        of a part, and what it gives waits.
        """
        x = self._full(video, past, frames_at_once)
        for layer in self.downsamples[self.first_downsampling + 1 : self.last_downsampling + 1]:
            x = layer(x, past)
        return x

    def _full(self, video: Tensor, past: Past, frames_at_once: int | None) -> Tensor:
        """The level of full resolution, and the downsampling behind it."""
        if frames_at_once is None or frames_at_once >= video.shape[2]:
            x = past.extend(self.conv1, video)
            x = self.conv1(x)
            for layer in self.downsamples[: self.first_downsampling + 1]:
                x = layer(x, past)
            return x
        is_last = past.is_last
        parts = []
        for start in range(0, video.shape[2], frames_at_once):
            stop = start + frames_at_once
            past.is_last = is_last and stop >= video.shape[2]
            parts.append(self._full(video[:, :, start:stop], past, None))
        return torch.cat(parts, dim=2)

    def low(self, x: Tensor, past: Past) -> Tensor:
        """Goes on from what `high` returns for whole frames, [B, high_dim, t, h, w], to [B, 2 * C, t, h, w]."""
        for layer in self.downsamples[self.last_downsampling + 1 :]:
            x = layer(x, past)
        residual, attention, last_residual = self.middle
        x = residual(x, past)
        x = attention(x)
        x = last_residual(x, past)
        return norm_silu_conv(((self.head["0"], self.head["2"]),), x, past, overwrite=True)

    def forward(self, video: Tensor, past: Past) -> Tensor:
        """Encodes the next frames [B, 3, T, H, W] to [B, 2 * C, t, h, w], where t is 1 for the first frame."""
        # Not named here: a name would keep what one part returns alive for as long as the next one runs.
        return self.low(self.high(video, past), past)

    def needs(self, kept: Interval) -> Interval:
        """The pixels in a row (or column) on which the latents `kept` depend, from and to multiples of their size.

        Where the interval ends inside the frame, a convolution there sees zeros in place of neighbours. What it makes
        of them stays in the halo, since all that `kept` reads is inside.
        """
        needed = kept
        for layer in reversed(self.downsamples[: self.last_downsampling + 1]):
            if isinstance(layer, Downsample):
                doubled = needed.doubled()  # three taps, the first of them at twice the position
                needed = Interval(doubled.start, min(doubled.size, doubled.stop + 1), doubled.size)
            else:
                needed = needed.grown().grown()
        needed = needed.grown()
        unit = 2**self.num_downsamplings
        return Interval(needed.start // unit * unit, -(-needed.stop // unit) * unit, needed.size)
