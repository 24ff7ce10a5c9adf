"""Linear layers whose weights are stored in eight bits.

Letters: R rows, D width of the input, M width of the result.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from wan21.kernels.fp8 import FP8, ScaledRows

WIDENED_BYTES = 2**25
"""So much of a weight stands in the compute dtype at a time; enough rows for a product that fills the chip."""


class ScaledLinear(nn.Module):
    """A linear layer with weights in eight bits and a scale for each output row; called, it computes in its own dtype.

    Keeps no gradients of its weights.

    Args:
        like: the layer, on the meta device, whose place it takes; its dtype is the compute dtype.
        dtype: of the stored weights: e4m3 or int8.
    """

    def __init__(self, like: nn.Linear, dtype: torch.dtype = FP8) -> None:
        super().__init__()
        out_features = like.out_features
        self.weight = _frozen(like.weight.new_empty((out_features, like.in_features), dtype=dtype))
        self.weight_scale = _frozen(like.weight.new_empty((out_features, 1), dtype=torch.float32))
        self.bias = _frozen(like.bias.detach())

    @property
    def scaled(self) -> ScaledRows:
        """The weight, [M, D], with its scales, [M, 1]."""
        return ScaledRows(self.weight, self.weight_scale)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[..., R, D] to [..., R, M] in the compute dtype, or `out`, of that shape, which is written to.

        Memory: the result, and WIDENED_BYTES of the weight in the compute dtype; all of it where gradients are kept.
        """
        if torch.is_grad_enabled():
            return functional.linear(x, self._widened(slice(None)), self.bias)
        if out is None:
            out = x.new_empty((*x.shape[:-1], self.weight.shape[0]))
        rows, columns = x.flatten(0, -2), out.flatten(0, -2)
        size = max(1, WIDENED_BYTES // (self.weight.shape[1] * self.bias.element_size()))
        for start in range(0, self.weight.shape[0], size):
            part = slice(start, start + size)
            torch.addmm(self.bias[part], rows, self._widened(part).t(), out=columns[:, part])
        return out

    def _widened(self, rows: slice) -> Tensor:
        return self.weight[rows].to(self.bias.dtype).mul_(self.weight_scale[rows])


Linear: TypeAlias = nn.Linear | ScaledLinear


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def store_in_eight_bits(blocks: Mapping[str, nn.Module], dtype: torch.dtype = FP8) -> list[str]:
    """Puts scaled layers in the places of all linear layers of modules on the meta device.

    Args:
        blocks: by name.
        dtype: of the stored weights: e4m3 or int8.

    Returns:
        The names of the weights, from those of the blocks on.
    """
    layers = {
        (block, name): layer
        for block, module in blocks.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    for (block, name), layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(blocks[block].get_submodule(owner), leaf, ScaledLinear(layer, dtype))
    return [f"{block}.{name}.weight" for block, name in layers]
