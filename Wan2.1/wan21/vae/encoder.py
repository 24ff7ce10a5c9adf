"""The encoder: pixels to the channels from which mean and log variance are read.

Letters: B videos; C channels; T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8).
"""

import torch
from torch import Tensor, nn

from wan21.config import VaeConfig
from wan21.vae.layers import AttentionBlock, CausalConv3d, Downsample, ResidualBlock, RmsNorm, norm_silu_conv
from wan21.vae.past import Past


class Encoder(nn.Module):
    """Residual blocks with a downsampling between levels, then a block of attention between two more."""

    def __init__(self, config: VaeConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        dims = [config.base_dim * multiplier for multiplier in config.multipliers]
        self.conv1 = CausalConv3d(3, config.base_dim, dtype=dtype)
        layers: list[nn.Module] = []
        dim = config.base_dim
        for level, level_dim in enumerate(dims):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(dim, level_dim, dtype=dtype))
                dim = level_dim
            if level < len(dims) - 1:
                layers.append(Downsample(dim, in_time=config.temporal_downsample[level], dtype=dtype))
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

    def forward(self, video: Tensor, past: Past) -> Tensor:
        """Encodes the next frames.

        Args:
            video: one frame if it is the first, else a multiple of the temporal stride, [B, 3, T, H, W].
            past: of this pass.

        Returns:
            [B, 2 * C, t, h, w], where t is 1 for the first frame.

        Memory: at full resolution [B, C, 3T + 2, H, W] with C = base_dim, beside what `past` holds.
        """
        x = past.extend(self.conv1, video)
        x = self.conv1(x)
        for layer in self.downsamples:
            x = layer(x, past)
        residual, attention, last_residual = self.middle
        x = residual(x, past)
        x = attention(x)
        x = last_residual(x, past)
        return norm_silu_conv(((self.head["0"], self.head["2"]),), x, past, overwrite=True)
