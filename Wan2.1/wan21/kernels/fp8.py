"""Operators that compute with eight-bit numbers: e4m3, with a float32 scale for what stands together.

Letters: B videos, R rows, L tokens, D width of a row, M width of a layer's result, N heads, K head width.

A number of e4m3 is within 2^-4 of what it stands for, relative, unless it is 2^-15 of the largest beside it or smaller.
None of the operators keeps gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of what e4m3 can tell. A cast of more gives no number."""

INT8_LARGEST = 127.0
"""Of what int8 can tell to both sides."""

SMALLEST_PEAK = 2.0**-100
"""Rows of zeros are divided by this rather than by zero."""

_LIBRARY = torch.library.Library("wan21", "FRAGMENT")  # the operators live as long as it does


class ScaledRows(NamedTuple):
    """Rows in eight bits; what they stand for is `values * scale`.

    values: [..., R, D], contiguous; e4m3, or of weights int8.
    scale: [..., R, 1], float32.
    """

    values: Tensor
    scale: Tensor


def scale_rows_(x: Tensor, dtype: torch.dtype = FP8) -> ScaledRows:
    """Quantises rows in torch's own words.

    Args:
        x: [..., R, D], float32; overwritten.
        dtype: e4m3 or int8, whose steps are equal: the nearest one is taken, halves to the even one.

    Memory: the result.
    """
    peak = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_(min=SMALLEST_PEAK)
    largest = LARGEST if dtype == FP8 else INT8_LARGEST
    x.mul_(largest / peak)
    return ScaledRows((x if dtype == FP8 else x.round_()).to(dtype), peak / largest)


def quantize_rows(x: Tensor) -> ScaledRows:
    """Quantises rows.

    Args:
        x: [B, R, D], rows contiguous.
    """
    return ScaledRows(*torch.ops.wan21.quantize_rows(x))


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, norm_dtype: torch.dtype) -> ScaledRows:
    """Layer norm without weights, times `scale`, plus `shift`, quantised; arguments as in `tokens.modulate`."""
    return ScaledRows(*torch.ops.wan21.modulate_fp8(x, scale, shift, eps, norm_dtype))


def gelu(x: Tensor) -> ScaledRows:
    """The tanh-form GELU, quantised.

    Args:
        x: [B, R, D], rows contiguous.
    """
    return ScaledRows(*torch.ops.wan21.gelu_fp8(x))


def scaled_linear(x: ScaledRows, weight: ScaledRows, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """A linear layer whose products are of eight-bit numbers.

    Args:
        x: [B, R, D].
        weight: [M, D].
        bias: [M].
        out: where to write the result, [B * R, M], contiguous.

    Returns:
        [B, R, M] in the dtype of the bias.
    """
    shape = (*x.values.shape[:-1], weight.values.shape[0])
    if out is None:
        out = bias.new_empty(shape).flatten(0, -2)
    torch.ops.wan21.scaled_linear(x.values.flatten(0, -2), x.scale.flatten(0, -2), *weight, bias, out)
    return out.view(shape)


def quantize_heads(x: Tensor, *, centred: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises queries, keys or values with a scale for each head.

    Args:
        x: [B, L, N, K], the last two dimensions contiguous.
        centred: take the mean over the tokens away before.

    Returns:
        [B, L, N, K] in e4m3, the scales [B, N], and what was taken away, [B, 1, N, K]; both float32.

    Memory: the result, and some [B, N, K].
    """
    low, high = torch.aminmax(x, dim=1)  # [B, N, K]
    mean = x.mean(dim=1, dtype=torch.float32) if centred else torch.zeros_like(low, dtype=torch.float32)
    peak = torch.maximum(high - mean, mean - low).amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_PEAK)  # [B, N, 1]
    factor = (LARGEST / peak).expand(mean.shape)
    rows = (part.unsqueeze(1).flatten(2).contiguous() for part in (factor, -mean * factor))
    values = torch.ops.wan21.affine_fp8(x.flatten(2), *rows)
    return values.view(x.shape), (peak / LARGEST).squeeze(-1), mean.unsqueeze(1)


def _quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return scale_rows_(x.to(torch.float32, copy=True))


def _modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    normed = functional.layer_norm(x, (x.shape[-1],), eps=eps).to(norm_dtype).float()
    return scale_rows_(torch.addcmul(shift, normed, scale))


def _gelu_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return scale_rows_(functional.gelu(x.float(), approximate="tanh"))


def _scaled_linear_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor
) -> None:
    out.copy_(functional.linear(x.float() * x_scale, weight.float() * weight_scale, bias.float()))


def _affine_reference(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    return torch.addcmul(summand, x.float(), factor).clamp_(-LARGEST, LARGEST).to(FP8)


def _scaled_linear_on_cuda(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor
) -> None:
    torch._scaled_mm(  # noqa: SLF001  # no public name before torch 2.10
        x, weight.t(), x_scale, weight_scale.t(), bias, out_dtype=out.dtype, use_fast_accum=True, out=out
    )


def _quantize_rows_on_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    from wan21.kernels.gpu import fp8

    return fp8.quantize_rows(x, has_gelu=False)


def _modulate_on_cuda(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from wan21.kernels.gpu import fp8

    return fp8.modulate(x, scale, shift, eps, norm_dtype)


def _gelu_on_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    from wan21.kernels.gpu import fp8

    return fp8.quantize_rows(x, has_gelu=True)


def _affine_on_cuda(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    from wan21.kernels.gpu import fp8

    return fp8.affine(x, factor, summand)


def _rows_shape(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _affine_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=FP8)


def _nothing(*_: object) -> None:
    """The shape of no result."""


_LIBRARY.define("quantize_rows(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define(
    "modulate_fp8(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType norm_dtype) -> (Tensor, Tensor)"
)
_LIBRARY.define("gelu_fp8(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define("affine_fp8(Tensor x, Tensor factor, Tensor summand) -> Tensor")
_LIBRARY.define(
    "scaled_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor bias, Tensor(a!) out) -> ()"
)
for _name, _reference, _cuda, _shape in (
    ("quantize_rows", _quantize_rows_reference, _quantize_rows_on_cuda, _rows_shape),
    ("modulate_fp8", _modulate_reference, _modulate_on_cuda, _rows_shape),
    ("gelu_fp8", _gelu_reference, _gelu_on_cuda, _rows_shape),
    ("affine_fp8", _affine_reference, _affine_on_cuda, _affine_shape),
    ("scaled_linear", _scaled_linear_reference, _scaled_linear_on_cuda, _nothing),
):
    _LIBRARY.impl(_name, _reference, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"wan21::{_name}", _shape, lib=_LIBRARY)
