"""The decoder: latents to pixels, in a low and a high part.

The low part ends with the last temporal upsampling; one latent frame becomes 1 or 4 frames there. The high part, the
levels of high resolution, takes any number of frames and returns as many, so the two can be driven at different paces.

Letters: B videos; C channels; T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8).
"""

import torch
from torch import Tensor, nn

from wan21.config import VaeConfig
from wan21.vae.layers import AttentionBlock, CausalConv3d, ResidualBlock, RmsNorm, Upsample, norm_silu_conv
from wan21.vae.past import Past


class Decoder(nn.Module):
    """A block of attention between two residual ones, then residual blocks with an upsampling between levels."""

    def __init__(self, config: VaeConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        dims = [config.base_dim * multiplier for multiplier in reversed(config.multipliers)]
        in_time = tuple(reversed(config.temporal_downsample))
        dim = dims[0]
        self.conv1 = CausalConv3d(config.z_dim, dim, dtype=dtype)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(dim, dim, dtype=dtype),
                AttentionBlock(dim, dtype=dtype),
                ResidualBlock(dim, dim, dtype=dtype),
            ]
        )
        layers: list[nn.Module] = []
        self.num_low_layers = 0
        for level, level_dim in enumerate(dims):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(dim, level_dim, dtype=dtype))
                dim = level_dim
            if level < len(dims) - 1:
                layers.append(Upsample(dim, in_time=in_time[level], dtype=dtype))
                dim //= 2
                if in_time[level]:
                    self.num_low_layers = len(layers)
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": RmsNorm(dim, dtype=dtype), "2": CausalConv3d(dim, 3, dtype=dtype)})

    def low(self, z: Tensor, past: Past) -> Tensor:
        """Goes from the next latent frame [B, C, 1, h, w] to frames at the resolution where their number is final.

        Returns:
            [B, C', T, H / 2, W / 2] for the default sizes; T is 1 for the first latent frame, else 4.
        """
        x = past.extend(self.conv1, z)
        x = self.conv1(x)
        residual, attention, last_residual = self.middle
        x = residual(x, past)
        x = attention(x)
        x = last_residual(x, past)
        for layer in self.upsamples[: self.num_low_layers]:
            x = layer(x, past)
        return x

    def high(self, x: Tensor, past: Past) -> Tensor:
        """Goes on from what `low` returns, or from some of its frames, to pixels [B, 3, T, H, W], not clamped.

        Memory: at full resolution [B, C, 3T + 2, H, W] with C = base_dim in a residual block, and as much at T = 4 for
        input, enlarged input and output of the last upsampling, beside what `past` holds.
        """
        for layer in self.upsamples[self.num_low_layers :]:
            x = layer(x, past)
        return norm_silu_conv(((self.head["0"], self.head["2"]),), x, past, overwrite=True)

    def forward(self, z: Tensor, past: Past) -> Tensor:
        """Decodes the next latent frame [B, C, 1, h, w] to [B, 3, T, H, W], where T is 1 for the first, else 4."""
        # Not named here: a name would keep what `low` returns alive for as long as `high` runs.
        return self.high(self.low(z, past), past)
