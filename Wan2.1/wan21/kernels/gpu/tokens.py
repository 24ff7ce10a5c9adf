"""The kernels of `wan21.kernels.tokens`.

A program takes several rows, one after the other, and keeps what they share (scale, shift, weight, gate) in registers:
read again for each row it would be twice the row's own bytes. A row is a vector of the next power of two.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

ROWS_PER_PROGRAM = 8
"""Enough that what rows share costs little, few enough that a chunk of 2048 rows fills the chip."""


LARGEST_PART = 1024
"""Elements of a row that a program has at once: eight for each thread of four warps."""

_SIZES = ("num_rows", "rows_of_one", "x_batch", "scale_batch", "shift_batch", "out_batch", "gate_batch")
"""Not looked at when compiling: one kernel for chunks of every length, so none is compiled within a run."""


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"block": block, "rows": ROWS_PER_PROGRAM, "num_warps": 8 if block > 4096 else 4}


@triton.jit(do_not_specialize=_SIZES)
def _modulate(
    x,
    scale,
    shift,
    out,
    num_rows,
    rows_of_one,
    width,
    x_batch,
    x_row,
    scale_batch,
    shift_batch,
    eps,
    block: tl.constexpr,
    rows: tl.constexpr,
    rounds: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    batch = first // rows_of_one  # a program's rows are of one video: `rows_of_one` is a multiple of rows, or the last
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
        if rounds:
            normed = normed.to(out.dtype.element_ty).to(tl.float32)
        result = normed * factor + summand
        tl.store(out + (batch * num_rows + inside) * width + cols, result.to(out.dtype.element_ty), mask=is_there)


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
):
    """A row a program, in parts: twice over it, the second time from the cache. Columns are dealt to members."""
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
        places = (start + cols) // member_width * out_member + (start + cols) % member_width
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


def _grid(x: Tensor) -> tuple[tuple[int], int]:
    """The number of programs, and the rows of one video rounded up to whole programs."""
    rows_of_one = triton.cdiv(x.shape[1], ROWS_PER_PROGRAM) * ROWS_PER_PROGRAM
    return (x.shape[0] * rows_of_one // ROWS_PER_PROGRAM,), rows_of_one


def _batch_stride(x: Tensor) -> int:
    """Between videos, in a [B or 1, 1, D]."""
    return x.stride(0) if x.shape[0] > 1 else 0


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, norm_dtype: torch.dtype
) -> Tensor:
    """`tokens.modulate` on CUDA."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale, shift = scale.contiguous(), shift.contiguous()
    grid, rows_of_one = _grid(x)
    _modulate[grid](
        x, scale, shift, out, x.shape[1], rows_of_one, x.shape[2], x.stride(0), x.stride(1), _batch_stride(scale),
        _batch_stride(shift), eps, rounds=norm_dtype != torch.float32, **_launch(x.shape[2]),
    )  # fmt: skip
    return out


def rms_heads_(out: Tensor, x: Tensor, weight: Tensor, turns: Tensor | None, eps: float) -> None:
    """`tokens.rms_heads_` on CUDA."""
    batch_size, num_rows, width = x.shape
    part = min(width & -width, LARGEST_PART)  # a power of two that divides the width
    _rms_heads[(batch_size * num_rows,)](
        out, x, weight, x if turns is None else turns, num_rows, out.stride(0), out.stride(1), out.stride(2),
        out.shape[4], eps, width=width, member_width=out.shape[3] * out.shape[4], part=part,
        is_turned=turns is not None, num_warps=max(1, part // 256),
    )  # fmt: skip


def add_gated_(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    """`tokens.add_gated_` on CUDA."""
    grid, rows_of_one = _grid(x)
    factor = x if gate is None else gate.contiguous()
    _add_gated[grid](
        x, branch, factor, x.shape[1], rows_of_one, x.shape[2], x.stride(0), x.stride(1), _batch_stride(factor),
        is_gated=gate is not None, **_launch(x.shape[2]),
    )  # fmt: skip
