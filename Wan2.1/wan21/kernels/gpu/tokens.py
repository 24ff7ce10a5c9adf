"""The kernels of `wan21.kernels.tokens`.

A norm takes a row a program, in parts of a power of two that divides it: it goes over the parts several times, and all
but the first time they come from the cache. So no lane is idle, and many rows are under way at a time. An addition
takes a few rows, one after the other, each a vector of the next power of two.

How many rows and warps each takes was measured on an H200 (docs/log.md).
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

LARGEST_PART = 1024
"""Elements of a row that a program has at once."""

PART_OF_A_NORM = 512
"""The same of a layer norm, which keeps its sums for every element."""

MOST_OF_INT32 = 2**31 - 1

# Strides between videos stay out of these, as in `ring`: all are multiples of 16, and rows pass 16 bytes at a time.
_SIZES = ("num_rows", "rows_of_one")
"""Not looked at when compiling: one kernel for chunks of every length, so none is compiled within a run."""


def _largest_part(width: int, most: int) -> int:
    """A power of two that divides the width."""
    return min(width & -width, most)


@triton.jit(do_not_specialize=_SIZES)
def _modulate(
    x,
    scale,
    shift,
    out,
    rows_of_one,
    x_batch,
    x_row,
    scale_batch,
    shift_batch,
    eps,
    width: tl.constexpr,
    part: tl.constexpr,
    rounds: tl.constexpr,
):
    """A row a program, in parts: three times over it, twice from the cache."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // rows_of_one
    x += batch * x_batch + (row - batch * rows_of_one) * x_row
    out += row * width
    scale += batch * scale_batch
    shift += batch * shift_batch
    cols = tl.arange(0, part)
    sums = tl.zeros((part,), dtype=tl.float32)
    for start in tl.static_range(0, width, part):
        sums += tl.load(x + start + cols)
    mean = tl.sum(sums, axis=0) / width
    squares = tl.zeros((part,), dtype=tl.float32)
    for start in tl.static_range(0, width, part):
        centred = tl.load(x + start + cols) - mean
        squares += centred * centred
    factor = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    for start in tl.static_range(0, width, part):
        normed = (tl.load(x + start + cols) - mean) * factor
        if rounds:
            normed = normed.to(out.dtype.element_ty).to(tl.float32)
        result = normed * tl.load(scale + start + cols) + tl.load(shift + start + cols)
        tl.store(out + start + cols, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=_SIZES)
def _rms_heads(
    out,
    x,
    weight,
    turns,
    rows_of_one,
    out_batch,
    out_row,
    out_member,
    head_width,
    eps,
    width: tl.constexpr,
    member_width: tl.constexpr,
    part: tl.constexpr,
    is_turned: tl.constexpr,
    is_far: tl.constexpr,
):
    """A row a program, in parts: twice over it, the second time from the cache. Columns may go to groups of heads."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // rows_of_one
    inside = row - batch * rows_of_one
    x += row * width
    out += batch * out_batch + inside * out_row
    cols = tl.arange(0, part)
    squares = tl.zeros((part,), dtype=tl.float32)
    for start in tl.static_range(0, width, part):
        values = tl.load(x + start + cols).to(tl.float32)
        squares += values * values
    factor = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    for start in tl.static_range(0, width, part):
        values = tl.load(x + start + cols)
        normed = (values.to(tl.float32) * factor).to(x.dtype.element_ty).to(tl.float32)
        normed = normed * tl.load(weight + start + cols)
        if is_turned:
            turn = tl.load(turns + inside * head_width + (start + cols) % head_width)
            real, imaginary = tl.split(tl.reshape(normed, (part // 2, 2)))
            cosine, sine = tl.split(tl.reshape(turn, (part // 2, 2)))
            turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
            normed = tl.reshape(turned, (part,))
        member = (start + cols) // member_width
        if is_far:
            member = member.to(tl.int64)
        places = member * out_member + (start + cols) % member_width
        tl.store(out + places, normed.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=_SIZES)
def _add_gated(
    x,
    branch,
    gate,
    num_rows,
    rows_of_one,
    width,
    x_batch,
    x_row,
    gate_batch,
    block: tl.constexpr,
    rows: tl.constexpr,
    is_gated: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    batch = first // rows_of_one
    cols = tl.arange(0, block)
    mask = cols < width
    factor = tl.load(gate + batch * gate_batch + cols, mask=mask, other=0.0) if is_gated else 1.0
    for offset in range(rows):
        inside = first - batch * rows_of_one + offset
        is_there = mask & (inside < num_rows)
        place = x + batch * x_batch + inside * x_row + cols
        addend = tl.load(branch + (batch * num_rows + inside) * width + cols, mask=is_there, other=0.0).to(tl.float32)
        tl.store(place, tl.load(place, mask=is_there, other=0.0) + addend * factor, mask=is_there)


def _programs(x: Tensor, rows: int) -> tuple[int, int]:
    """How many programs of so many rows each take all, and the rows of one video rounded up to whole programs."""
    rows_of_one = triton.cdiv(x.shape[1], rows) * rows
    return x.shape[0] * rows_of_one // rows, rows_of_one


def _batch_stride(x: Tensor) -> int:
    """Between videos, in a [B or 1, 1, D]."""
    return x.stride(0) if x.shape[0] > 1 else 0


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, norm_dtype: torch.dtype
) -> Tensor:
    """`tokens.modulate` on CUDA."""
    batch_size, num_rows, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale, shift = scale.contiguous(), shift.contiguous()
    part = _largest_part(width, PART_OF_A_NORM)
    _modulate[(batch_size * num_rows,)](
        x, scale, shift, out, num_rows, x.stride(0), x.stride(1), _batch_stride(scale), _batch_stride(shift), eps,
        width=width, part=part, rounds=norm_dtype != torch.float32, num_warps=max(1, part // 128),
    )  # fmt: skip
    return out


def rms_heads_(out: Tensor, x: Tensor, weight: Tensor, turns: Tensor | None, eps: float) -> None:
    """`tokens.rms_heads_` on CUDA."""
    batch_size, num_rows, width = x.shape
    part = _largest_part(width, LARGEST_PART)
    _rms_heads[(batch_size * num_rows,)](
        out, x, weight, x if turns is None else turns, num_rows, out.stride(0), out.stride(1), out.stride(2),
        out.shape[4], eps, width=width, member_width=out.shape[3] * out.shape[4], part=part,
        is_turned=turns is not None, is_far=out.shape[2] * out.stride(2) > MOST_OF_INT32,
        num_warps=part // 256 if part > 512 else 1,
    )  # fmt: skip


def add_gated_(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    """`tokens.add_gated_` on CUDA."""
    block = triton.next_power_of_2(x.shape[2])
    rows = 8 if block > 2048 else 2
    programs, rows_of_one = _programs(x, rows)
    factor = x if gate is None else gate.contiguous()
    _add_gated[(programs,)](
        x, branch, factor, x.shape[1], rows_of_one, x.shape[2], x.stride(0), x.stride(1), _batch_stride(factor),
        is_gated=gate is not None, block=block, rows=rows, num_warps=8 if block > 4096 else 4,
    )  # fmt: skip
