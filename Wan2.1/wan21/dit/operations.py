"""What a DiT block does to its tokens between the large products: plainly, or in fused kernels.

Letters: B videos, L tokens, R rows (some of the tokens), S keys, D model width, N heads, K head width, M feed-forward
width.

Number formats follow what upstream computes under bfloat16 autocast (docs/parity.md): the residual stream, norms,
modulation and gates are float32; linear layers and attention run in the module's compute dtype.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from wan21.attention import Attention, attend, attend_with_fa3_fp8
from wan21.dit.linear import Linear, ScaledLinear
from wan21.dit.residual import Residual
from wan21.kernels import tokens
from wan21.kernels.fp8 import ScaledRows
from wan21.models import DitConfig
from wan21.rope import rotate

Activations: TypeAlias = Tensor | ScaledRows
"""What passes through a linear layer: rows in the compute dtype, or quantised ones for layers that take them."""


@dataclass(frozen=True)
class Modulation:
    """What the timestep does to one branch; each [B or 1, 1, D], float32.

    shift: added to the normed input.
    scale: what the normed input is multiplied by: one plus the network's scale.
    gate: what the branch's result is multiplied by; None for the head, which is no branch.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


class RmsNorm(nn.Module):
    """Weights of a root-mean-square norm over the whole width, before the split into heads.

    Reference: arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))


class Operations:
    """Torch's own operators, one after the other. With gradients kept nothing is in place.

    Args:
        attention: the kernel of self attention.

    COUNTS_PADDING: whether `read` takes one token of a prompt's padding for all of them.
    """

    COUNTS_PADDING: ClassVar[bool] = False

    def __init__(self, attention: Attention = attend) -> None:
        self.attend = attention

    def warm_up(self, config: DitConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Has everything compiled that a forward will need."""
        if self.attend is attend_with_fa3_fp8:  # the only one that has kernels of our own
            heads = torch.zeros((1, 1, config.num_heads, config.head_dim), dtype=dtype, device=device)
            self.attend(heads, heads, heads)

    def warm_up_groups(self, config: DitConfig, dtype: torch.dtype, device: torch.device, num_groups: int) -> None:
        """Likewise, where heads are written to so many groups, each in a place of its own."""

    def modulated(
        self,
        x: Tensor,
        modulation: Modulation,
        eps: float,
        dtype: torch.dtype,
        norm_dtype: torch.dtype = torch.float32,
    ) -> Activations:
        """The normed residual, scaled and shifted in float32, then rounded to the compute dtype.

        Args:
            x: [B, R, D], float32.
            modulation: shift and scale.
            eps: of the norm.
            dtype: of the result.
            norm_dtype: what the norm's output is rounded to before it is scaled.

        Returns:
            [B, R, D].

        Memory: one [B, R, D] in float32 beside the result; one more where the norm's output is rounded.
        """
        normed = functional.layer_norm(x, (x.shape[-1],), eps=eps).to(norm_dtype).float()
        if torch.is_grad_enabled():
            return torch.addcmul(modulation.shift, normed, modulation.scale).to(dtype)
        return torch.addcmul(modulation.shift, normed, modulation.scale, out=normed).to(dtype)

    def normed(self, x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Activations:
        """The residual [B, R, D] through a layer norm with weights, rounded to the compute dtype."""
        return norm(x).to(dtype)

    def linear(self, layer: Linear, x: Activations, out: Tensor | None = None) -> Tensor:
        """[B, R, D] through a linear layer.

        Args:
            layer: with or without a bias.
            x: rows.
            out: where to write the result, if it is to go somewhere: [B, R, ...], of as many elements. Its columns may
                lie in several places, as those of [B, R, G, N / G, K] that are written to G groups.

        Returns:
            [B, R, D], or `out`.
        """
        result: Tensor = layer(x)
        return result if out is None else out.copy_(result.view(out.shape))

    def heads(
        self, x: Tensor, norm: RmsNorm, num_heads: int, turns: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Queries or keys: normed over the whole width, split into heads, and turned.

        Normalised in float32, rounded to the input's dtype, multiplied by the float32 weight, turned, rounded again.

        Args:
            x: [B, R, D] in the compute dtype; may be overwritten.
            norm: its weights.
            num_heads: N.
            turns: rotary positions, [R, 1, K/2], complex64; None: no positions.
            out: where to write the result, if it is to go somewhere: [B, R, N, K], or [B, R, G, N / G, K] with the
                heads of each of G groups in a place of their own.

        Returns:
            [B, R, N, K] in the compute dtype, or `out`.
        """
        normed = functional.rms_norm(x, (x.shape[-1],), eps=norm.eps)
        heads = (normed * norm.weight).unflatten(-1, (num_heads, -1))
        del normed
        if turns is not None:
            heads = rotate(heads, turns)
        return heads.to(x.dtype) if out is None else out.copy_(heads.view(out.shape))

    def projected(
        self, layer: Linear, x: Activations, norm: RmsNorm, num_heads: int, turns: Tensor, out: Tensor | None
    ) -> Tensor:
        """Queries or keys of rows: through a linear layer, and then what `heads` does."""
        return self.heads(self.linear(layer, x), norm, num_heads, turns, out)

    def read(self, q: Tensor, k: Tensor, v: Tensor, repeats: int = 1) -> Tensor:
        """What queries read from the prompt, or from pictures.

        Args:
            q: [B, R, N, K].
            k: [B, S, N, K].
            v: likewise.
            repeats: how often the last key counts; only where `COUNTS_PADDING` may it be more than once.

        Returns:
            [B, R, D].

        Raises:
            ValueError: the last key counts more than once, which torch's kernels do not know.
        """
        if repeats != 1:
            raise ValueError(f"repeats={repeats}: torch's attention takes every key once; give all of them")
        return attend(q, k, v)

    def widened(self, layer: Linear, x: Activations, out: Tensor | None = None) -> Activations:
        """[B, R, D] through the first linear layer of the feed-forward, and a tanh-form GELU.

        Args:
            layer: to the width M.
            x: rows.
            out: a place for the result, [B, R, M] in the compute dtype, contiguous.

        Returns:
            [B, R, M], or `out`.

        Memory: the GELU works in place unless gradients are kept.
        """
        if torch.is_grad_enabled():
            return functional.gelu(layer(x), approximate="tanh")
        hidden: Tensor = torch.ops.aten.gelu_(self.into(layer, x, out), approximate="tanh")
        return hidden

    @staticmethod
    def into(layer: Linear, x: Activations, out: Tensor | None) -> Tensor:
        """[B, R, D] through a linear layer, without gradients: [B, R, M], or `out`, of that shape and contiguous."""
        if out is None:
            return layer(x)
        if isinstance(layer, ScaledLinear):
            return layer(x, out)
        torch.addmm(layer.bias, cast("Tensor", x).flatten(0, 1), layer.weight.t(), out=out.flatten(0, 1))
        return out

    def add(self, residual: Residual, window: Tensor, branch: Tensor, gate: Tensor | None = None) -> Residual:
        """The residual with a branch, times its gate, added to a window of it; in place unless gradients are kept.

        Args:
            residual: [B, L, D], float32.
            window: some tokens of it, [B, R, D]; all of them where gradients are kept.
            branch: [B, R, D] in the compute dtype.
            gate: [B or 1, 1, D], float32.

        Returns:
            The residual, [B, L, D].
        """
        if torch.is_grad_enabled():
            return window + (branch if gate is None else branch * gate)
        if gate is None:
            window.add_(branch)
        else:
            window.addcmul_(branch, gate)
        return residual


class FusedOperations(Operations):
    """One kernel for what lies between two products, without gradients.

    Promise: the same sums in another order, and the GELU on sums that were not yet rounded. A forward differs from the
    plain one by about as much as rounding to the compute dtype changes it (docs/parity.md).

    Memory: no float32 copies of a chunk, and results are written where they go.

    Args:
        attention: the kernel of self attention.
    """

    COUNTS_PADDING: ClassVar[bool] = True

    def warm_up(self, config: DitConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().warm_up(config, dtype, device)
        x = torch.zeros((1, 1, config.dim), dtype=torch.float32, device=device)
        for norm_dtype in {torch.float32, dtype}:
            branch = tokens.modulate(x, x, x, config.eps, dtype, norm_dtype)
        tokens.modulate(x, x, x, config.eps, torch.float32, torch.float32)  # the head's
        heads = branch.unflatten(-1, (config.num_heads, -1))
        tokens.rms_heads_(branch, x[0, 0], None, config.eps, heads)
        self.warm_up_groups(config, dtype, device, 1)
        for gate in (x, None):
            tokens.add_gated_(x, branch, gate)
        tokens.attend_counted(heads, heads, heads, 1)

    def warm_up_groups(self, config: DitConfig, dtype: torch.dtype, device: torch.device, num_groups: int) -> None:
        x = torch.zeros((1, 1, config.dim), dtype=dtype, device=device)
        weight = torch.zeros(config.dim, dtype=torch.float32, device=device)
        turns = torch.zeros((1, 1, config.head_dim // 2), dtype=torch.complex64, device=device)
        tokens.rms_heads_(x, weight, turns, config.eps, x.unflatten(-1, (num_groups, -1, config.head_dim)))

    def modulated(
        self,
        x: Tensor,
        modulation: Modulation,
        eps: float,
        dtype: torch.dtype,
        norm_dtype: torch.dtype = torch.float32,
    ) -> Activations:
        return tokens.modulate(x, modulation.scale, modulation.shift, eps, dtype, norm_dtype)

    def normed(self, x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Activations:
        weight, bias = norm.weight.view(1, 1, -1), norm.bias.view(1, 1, -1)
        return tokens.modulate(x, weight, bias, norm.eps, dtype, torch.float32)

    def linear(self, layer: Linear, x: Activations, out: Tensor | None = None) -> Tensor:
        if out is None or isinstance(layer, ScaledLinear) or isinstance(x, ScaledRows):
            return super().linear(layer, x, out)
        if x.shape[0] == 1:
            groups = out.unbind(2) if out.dim() == 5 else (out,)
            width = layer.out_features // len(groups)
            for start, place in enumerate(groups):
                of = slice(start * width, (start + 1) * width)
                torch.addmm(layer.bias[of], x[0], layer.weight[of].t(), out=place.view(x.shape[1], width))
            return out
        return out.copy_(layer(x).view(out.shape))  # the rows of several videos do not lie in one matrix

    def heads(
        self, x: Tensor, norm: RmsNorm, num_heads: int, turns: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = x.unflatten(-1, (num_heads, -1))
        tokens.rms_heads_(x, norm.weight, turns, norm.eps, out)
        return out

    def projected(
        self, layer: Linear, x: Activations, norm: RmsNorm, num_heads: int, turns: Tensor, out: Tensor | None
    ) -> Tensor:
        if out is None or out.dim() != 4 or not out.is_contiguous():
            return super().projected(layer, x, norm, num_heads, turns, out)
        self.linear(layer, x, out)
        tokens.rms_heads_(out.flatten(2), norm.weight, turns, norm.eps, out)  # where they lie
        return out

    def read(self, q: Tensor, k: Tensor, v: Tensor, repeats: int = 1) -> Tensor:
        return tokens.attend_counted(q, k, v, repeats)

    def widened(self, layer: Linear, x: Activations, out: Tensor | None = None) -> Activations:
        if isinstance(layer, ScaledLinear) or isinstance(x, ScaledRows):
            return super().widened(layer, x, out)
        place = None if out is None else out.flatten(0, 1)
        return tokens.linear_gelu(x.flatten(0, 1), layer.weight, layer.bias, place).view(*x.shape[:2], -1)

    def add(self, residual: Residual, window: Tensor, branch: Tensor, gate: Tensor | None = None) -> Residual:
        tokens.add_gated_(window, branch, gate)
        return residual
