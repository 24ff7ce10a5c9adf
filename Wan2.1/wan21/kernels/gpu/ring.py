"""Joining attention over parts of the keys: `wan21.kernels.tokens.join_attention`."""

import triton
from torch import Tensor
from triton import language as tl

HEADS_PER_PROGRAM = 16
"""Heads of tokens, one after the other; each of them is a row of the head's width."""

# Strides of rows of the head's width stay out of these: knowing them to be multiples of 16, Triton loads and stores 16
# bytes at a time. One that it does not know costs that for the whole kernel, and five times the registers.
_PLACES = [f"{name}_{size}" for name in ("lse", "more_lse", "joint") for size in ("batch", "row", "head")]
_SIZES = ("num_rows", "rows_of_one", "num_heads", *_PLACES)
"""Not looked at when compiling: one kernel for every length and number of heads, so none is compiled within a run."""


@triton.jit(do_not_specialize=_SIZES)
def _join(
    result,
    joint_lse,
    out,
    lse,
    more,
    more_lse,
    num_rows,
    rows_of_one,
    num_heads,
    result_batch,
    result_row,
    result_head,
    joint_batch,
    joint_row,
    joint_head,
    out_batch,
    out_row,
    out_head,
    lse_batch,
    lse_row,
    lse_head,
    more_batch,
    more_row,
    more_head,
    more_lse_batch,
    more_lse_row,
    more_lse_head,
    head_width: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
):
    """A row is one head of one token."""
    numbers = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    is_row = numbers < num_rows
    head = numbers % num_heads
    token = numbers // num_heads % rows_of_one
    batch = numbers // num_heads // rows_of_one
    cols = tl.arange(0, width)
    mask = is_row[:, None] & (cols < head_width)[None, :]
    one = tl.load(lse + batch * lse_batch + token * lse_row + head * lse_head, mask=is_row, other=0.0)
    other = tl.load(
        more_lse + batch * more_lse_batch + token * more_lse_row + head * more_lse_head, mask=is_row, other=0.0
    )
    larger = tl.maximum(one, other)
    joint = larger + tl.log(tl.exp(one - larger) + tl.exp(other - larger))
    share = tl.exp(other - joint)[:, None]
    first = tl.load(
        out + (batch * out_batch + token * out_row + head * out_head)[:, None] + cols[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    second = tl.load(
        more + (batch * more_batch + token * more_row + head * more_head)[:, None] + cols[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    place = result + (batch * result_batch + token * result_row + head * result_head)[:, None] + cols[None, :]
    tl.store(place, (first + (second - first) * share).to(result.dtype.element_ty), mask=mask)
    tl.store(joint_lse + batch * joint_batch + token * joint_row + head * joint_head, joint, mask=is_row)


def join_attention(result: Tensor, joint_lse: Tensor, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """`tokens.join_attention` on CUDA."""
    batch_size, num_tokens, num_heads, head_width = result.shape
    num_rows = batch_size * num_tokens * num_heads
    strides = [stride for x in (result, joint_lse, out, lse, more, more_lse) for stride in x.stride()[:3]]
    _join[(triton.cdiv(num_rows, HEADS_PER_PROGRAM),)](
        result, joint_lse, out, lse, more, more_lse, num_rows, num_tokens, num_heads, *strides,
        head_width=head_width, width=triton.next_power_of_2(head_width), rows=HEADS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
