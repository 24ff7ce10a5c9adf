"""Blocks whose products are of eight-bit numbers.

Letters: B videos, R rows, D model width, M feed-forward width.

What passes through a linear layer is quantised row by row as it is made: in the kernel that norms and modulates, in the
one that takes the GELU, and by itself where attention made it. What lies between stays as in `FusedOperations`.
"""

import torch
from torch import Tensor, nn

from wan21.dit.linear import Linear, ScaledLinear
from wan21.dit.operations import Activations, FusedOperations, Modulation
from wan21.kernels import fp8
from wan21.kernels.fp8 import ScaledRows
from wan21.models import DitConfig


class Fp8Operations(FusedOperations):
    """Products in e4m3, accumulated in float32, for layers that are stored so.

    Approximate: each product's factors are within 2^-4 of what they stand for (docs/parity.md).

    Memory: what enters a layer takes half the bytes.
    """

    def warm_up(self, config: DitConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().warm_up(config, dtype, device)
        x = torch.zeros((1, 1, config.dim), dtype=torch.float32, device=device)
        for norm_dtype in {torch.float32, dtype}:
            fp8.modulate(x, x, x, config.eps, norm_dtype)
        fp8.quantize_rows(x.to(dtype))
        fp8.gelu(x.new_zeros((1, 1, config.ffn_dim), dtype=dtype))

    def modulated(
        self,
        x: Tensor,
        modulation: Modulation,
        eps: float,
        dtype: torch.dtype,
        norm_dtype: torch.dtype = torch.float32,
    ) -> Activations:
        if dtype == torch.float32:  # the head's, whose layer is float32 always
            return super().modulated(x, modulation, eps, dtype, norm_dtype)
        return fp8.modulate(x, modulation.scale, modulation.shift, eps, norm_dtype)

    def normed(self, x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Activations:  # noqa: ARG002 # it is e4m3
        return fp8.modulate(x, norm.weight.view(1, 1, -1), norm.bias.view(1, 1, -1), norm.eps, torch.float32)

    def linear(self, layer: Linear, x: Activations, out: Tensor | None = None) -> Tensor:
        if not isinstance(layer, ScaledLinear):
            return super().linear(layer, x, out)
        rows = x if isinstance(x, ScaledRows) else fp8.quantize_rows(x)
        if out is None or (rows.values.shape[0] == 1 and out.dim() < 5):
            flat = None if out is None else out.view(rows.values.shape[1], -1)
            result = fp8.scaled_linear(rows, layer.scaled, layer.bias, flat)
            return result if out is None else out
        return out.copy_(fp8.scaled_linear(rows, layer.scaled, layer.bias).view(out.shape))  # not in one matrix

    def widened(self, layer: Linear, x: Activations, out: Tensor | None = None) -> Activations:
        return fp8.gelu(self.linear(layer, x, out))
