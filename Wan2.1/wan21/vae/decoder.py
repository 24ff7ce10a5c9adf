"""The decoder: latents to pixels, in three parts that can be driven at different paces.

- low: everything at the latents' resolution, with the only attention. It needs whole frames and holds little.
- mid: from the first upsampling up to the last one. One frame becomes 1 or 4 here. Convolutions only.
- high: the last upsampling and the level of full resolution. Convolutions only, and as many frames out as in.

What is computed from whole frames of the low part's result may therefore be computed in tiles, and what comes after the
middle part in any number of frames at a time.

Letters: B videos; C channels; T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8).
"""

from typing import cast

import torch
from torch import Tensor, nn

from wan21.models import VaeConfig
from wan21.options import Kernels
from wan21.vae import fused
from wan21.vae.layers import AttentionBlock, CausalConv3d, ResidualBlock, RmsNorm, Upsample, norm_silu_conv
from wan21.vae.past import Past
from wan21.vae.tiles import Interval, Window, Windows


class Decoder(nn.Module):
    """A block of attention between two residual ones, then residual blocks with an upsampling between levels.

    Args:
        config: sizes.
        dtype: of the parameters.
        kernels: "torch" runs layer by layer; "fused" runs the middle and the high part with kernels of our own.
    """

    def __init__(self, config: VaeConfig, *, dtype: torch.dtype, kernels: Kernels = "torch") -> None:
        super().__init__()
        self.kernels = kernels
        self._is_laid_out = False
        dims = [config.base_dim * multiplier for multiplier in reversed(config.multipliers)]
        in_time = tuple(reversed(config.temporal_downsample))
        dim = dims[0]
        self.low_dim = dim
        self.conv1 = CausalConv3d(config.z_dim, dim, dtype=dtype)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(dim, dim, dtype=dtype),
                AttentionBlock(dim, dtype=dtype),
                ResidualBlock(dim, dim, dtype=dtype),
            ]
        )
        layers: list[nn.Module] = []
        upsamplings = []
        for level, level_dim in enumerate(dims):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(dim, level_dim, dtype=dtype))
                dim = level_dim
            if level < len(dims) - 1:
                upsamplings.append(len(layers))
                layers.append(Upsample(dim, in_time=in_time[level], dtype=dtype))
                dim //= 2
        self.first_upsampling, self.last_upsampling = upsamplings[0], upsamplings[-1]
        self.num_upsamplings = len(upsamplings)
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": RmsNorm(dim, dtype=dtype), "2": CausalConv3d(dim, 3, dtype=dtype)})

    def lay_out(self) -> None:
        """Readies the weights for kernels of our own, once; values change only as TF32 would change them anyway."""
        if self.kernels == "fused" and not self._is_laid_out and not self.conv1.weight.is_meta:
            fused.lay_out([*self.upsamples[self.first_upsampling :], self.head])
            self._is_laid_out = True

    def low(self, z: Tensor, past: Past) -> Tensor:
        """Goes from the next latent frame [B, C, 1, h, w] to features of the same resolution, [B, C', 1, h, w]."""
        x = past.extend(self.conv1, z)
        x = self.conv1(x)
        residual, attention, last_residual = self.middle
        x = residual(x, past)
        x = attention(x)
        x = last_residual(x, past)
        for layer in self.upsamples[: self.first_upsampling]:
            x = layer(x, past)
        return x

    def mid(self, x: Tensor, past: Past) -> Tensor:
        """Goes on from what `low` returns, or from a tile of it.

        Returns:
            [B, C', T, H / 2, W / 2] for the default sizes; T is 1 for the first latent frame, else 4.
        """
        layers = list(self.upsamples)[self.first_upsampling : self.last_upsampling]  # a ModuleList's slice is a module
        if self.kernels == "fused":
            given = [x]
            del x  # only the list holds it now
            return fused.run(layers, given, past)
        for layer in layers:
            x = layer(x, past)
        return x

    def high(self, x: Tensor, past: Past, *, frames_at_once: int | None = None) -> Tensor:
        """Goes on from what `mid` returns, or from some of its frames, to pixels [B, 3, T, H, W], not clamped.

        Args:
            x: [B, C', T, H / 2, W / 2] for the default sizes.
            past: of this pass.
            frames_at_once: with fewer than T, the frames are computed in parts, one after the other.

        Memory: at full resolution [B, C, 3T + 2, H, W] with C = base_dim in a residual block, and as much at T = 4 for
        input, enlarged input and output of the upsampling, beside what `past` holds. In parts, T is that of a part, and
        x stays.
        """
        if frames_at_once is None or frames_at_once >= x.shape[2]:
            layers = list(self.upsamples)[self.last_upsampling :]
            if self.kernels == "fused":
                given = [x]
                del x  # only the list holds it now
                return fused.run([*layers, self.head], given, past)
            for layer in layers:
                x = layer(x, past)
            return norm_silu_conv(((self.head["0"], self.head["2"]),), x, past, overwrite=True)
        is_last = past.is_last
        pixels = []
        for start in range(0, x.shape[2], frames_at_once):
            stop = start + frames_at_once
            past.is_last = is_last and stop >= x.shape[2]
            pixels.append(self.high(x[:, :, start:stop], past))
        return torch.cat(pixels, dim=2)

    def forward(self, z: Tensor, past: Past) -> Tensor:
        """Decodes the next latent frame [B, C, 1, h, w] to [B, 3, T, H, W], where T is 1 for the first, else 4."""
        # Not named here: a name would keep what one part returns alive for as long as the next one runs.
        return self.high(self.mid(self.low(z, past), past), past)

    def windows(self, kept: Interval) -> tuple[Interval, Windows]:
        """What the rows (or columns) `kept` of the pixels need.

        Returns:
            The rows of the low part's result on which they depend, and what each later layer computes for them.
        """
        into: Windows = {}
        needed = kept.grown()
        into[self.head["2"]] = Window(computed=needed, kept=kept)
        for layer in reversed(self.upsamples[self.first_upsampling :]):
            needed = cast("ResidualBlock | Upsample", layer).windows(needed, into)
        return needed, into
