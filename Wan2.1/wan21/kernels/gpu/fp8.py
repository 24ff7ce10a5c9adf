"""The kernels of `wan21.kernels.fp8`.

A program that looks for a row's largest number holds the whole row, a vector of the next power of two. The cast to e4m3
saturates, and nothing exceeds it: the largest number becomes 448 itself, rounded.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from wan21.kernels.fp8 import FP8, LARGEST, SMALLEST_PEAK
from wan21.kernels.gpu.tokens import _batch_stride, _programs

ROWS_PER_PROGRAM = 8
"""Enough that what rows share costs little, few enough that a chunk of 2048 rows fills the chip."""

# Strides between videos stay out of these, as in `tokens`.
_SIZES = ("num_rows", "rows_of_one")
"""Not looked at when compiling: one kernel for chunks of every length, so none is compiled within a run."""

PARTS = 1024
"""Elements of a token that a program of `_affine` has: eight for each thread of four warps."""


@triton.jit(do_not_specialize=_SIZES)
def _modulate(
    x,
    scale,
    shift,
    out,
    out_scale,
    num_rows,
    rows_of_one,
    width,
    x_batch,
    x_row,
    scale_batch,
    shift_batch,
    eps,
    largest: tl.constexpr,
    smallest_peak: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    rounds_to: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    batch = first // rows_of_one  # a program's rows are of one video: `rows_of_one` is a multiple of rows
    cols = tl.arange(0, block)
    mask = cols < width
    factor = tl.load(scale + batch * scale_batch + cols, mask=mask, other=0.0)
    summand = tl.load(shift + batch * shift_batch + cols, mask=mask, other=0.0)
    for offset in range(rows):
        inside = first - batch * rows_of_one + offset
        is_there = mask & (inside < num_rows)
        row = tl.load(x + batch * x_batch + inside * x_row + cols, mask=is_there, other=0.0)
        mean = tl.sum(row, axis=0) / width
        centred = tl.where(mask, row - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / width
        normed = centred * tl.rsqrt(variance + eps)
        if rounds_to is not None:
            normed = normed.to(rounds_to).to(tl.float32)
        result = normed * factor + summand  # zero beyond the width, where factor and summand are
        peak = tl.maximum(tl.max(tl.abs(result), axis=0), smallest_peak)
        place = batch * num_rows + inside
        values = (result * (largest / peak)).to(out.dtype.element_ty)
        tl.store(out + place * width + cols, values, mask=is_there)
        tl.store(out_scale + place, peak / largest, mask=inside < num_rows)


@triton.jit(do_not_specialize=_SIZES)
def _quantize_rows(
    x,
    out,
    out_scale,
    rows_of_one,
    width,
    x_batch,
    x_row,
    largest: tl.constexpr,
    smallest_peak: tl.constexpr,
    block: tl.constexpr,
    has_gelu: tl.constexpr,
):
    """A row a program."""
    place = tl.program_id(0).to(tl.int64)
    batch = place // rows_of_one
    cols = tl.arange(0, block)
    mask = cols < width
    row = tl.load(x + batch * x_batch + (place - batch * rows_of_one) * x_row + cols, mask=mask, other=0.0)
    row = row.to(tl.float32)
    if has_gelu:  # (1 + tanh(z)) / 2 is the sigmoid of 2 z, and z = sqrt(2 / pi) (x + 0.044715 x^3)
        row = row * tl.sigmoid(1.5957691216057308 * (row + 0.044715 * row * row * row))
    peak = tl.maximum(tl.max(tl.abs(row), axis=0), smallest_peak)
    tl.store(out + place * width + cols, (row * (largest / peak)).to(out.dtype.element_ty), mask=mask)
    tl.store(out_scale + place, peak / largest)


@triton.jit(do_not_specialize=_SIZES)
def _affine(
    x,
    factor,
    summand,
    out,
    num_rows,
    rows_of_one,
    width,
    x_batch,
    x_row,
    scale_batch,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    """Some columns of several rows a program."""
    first = tl.program_id(0).to(tl.int64) * rows
    batch = first // rows_of_one
    cols = tl.program_id(1) * block + tl.arange(0, block)
    mask = cols < width
    times = tl.load(factor + batch * scale_batch + cols, mask=mask, other=0.0)
    plus = tl.load(summand + batch * scale_batch + cols, mask=mask, other=0.0)
    for offset in range(rows):
        inside = first - batch * rows_of_one + offset
        is_there = mask & (inside < num_rows)
        row = tl.load(x + batch * x_batch + inside * x_row + cols, mask=is_there, other=0.0).to(tl.float32)
        values = (row * times + plus).to(out.dtype.element_ty)
        tl.store(out + (batch * num_rows + inside) * width + cols, values, mask=is_there)


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


_LIMITS = {"largest": LARGEST, "smallest_peak": SMALLEST_PEAK}
_ROUNDED = {torch.float32: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, norm_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`fp8.modulate` on CUDA."""
    values, row_scale = _results(x)
    scale, shift = scale.contiguous(), shift.contiguous()
    programs, rows_of_one = _programs(x, ROWS_PER_PROGRAM)
    block = triton.next_power_of_2(x.shape[2])
    _modulate[(programs,)](
        x, scale, shift, values, row_scale, x.shape[1], rows_of_one, x.shape[2], x.stride(0), x.stride(1),
        _batch_stride(scale), _batch_stride(shift), eps, rounds_to=_ROUNDED[norm_dtype], **_LIMITS,
        block=block, rows=ROWS_PER_PROGRAM, num_warps=8 if block > 4096 else 4,
    )  # fmt: skip
    return values, row_scale


def quantize_rows(x: Tensor, *, has_gelu: bool) -> tuple[Tensor, Tensor]:
    """`fp8.quantize_rows` and `fp8.gelu` on CUDA."""
    values, row_scale = _results(x)
    block = triton.next_power_of_2(x.shape[2])
    _quantize_rows[(x.shape[0] * x.shape[1],)](
        x, values, row_scale, x.shape[1], x.shape[2], x.stride(0), x.stride(1), block=block, has_gelu=has_gelu,
        num_warps=min(16, max(1, block // 512)), **_LIMITS,
    )  # fmt: skip
    return values, row_scale


def affine(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """The operator `affine_fp8` on CUDA."""
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    programs, rows_of_one = _programs(x, ROWS_PER_PROGRAM)
    block = min(triton.next_power_of_2(x.shape[2]), PARTS)
    _affine[(programs, triton.cdiv(x.shape[2], block))](
        x, factor, summand, out, x.shape[1], rows_of_one, x.shape[2], x.stride(0), x.stride(1), _batch_stride(factor),
        block=block, rows=ROWS_PER_PROGRAM,
    )  # fmt: skip
    return out
