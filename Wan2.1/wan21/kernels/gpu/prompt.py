"""Attention to few keys: `wan21.kernels.tokens.attend_counted`.

A program takes a block of queries of one head and goes over all keys, a block at a time, as in FlashAttention
(arXiv 2205.14135). With as few keys as a prompt has, reading queries and writing results is what takes the time.
"""

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

QUERIES = 64
KEYS = 32
"""Of a block; small ones, so that many are under way at a time (measured on an H200, docs/log.md)."""

_SIZES = ("num_queries", "num_keys", "raised")
"""Not looked at when compiling: one kernel for prompts and chunks of every length."""


@triton.jit(do_not_specialize=_SIZES)
def _attend(
    q,
    k,
    v,
    out,
    num_queries,
    num_keys,
    raised,
    scale,
    num_heads: tl.constexpr,
    head_width: tl.constexpr,
    width: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
    precision: tl.constexpr,
):
    """Scores are in powers of two: `scale` and `raised` hold the factor log2(e)."""
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    row_width: tl.constexpr = num_heads * head_width
    rows = tl.program_id(0) * queries + tl.arange(0, queries)
    cols = tl.arange(0, width)
    is_row = rows[:, None] < num_queries
    is_col = cols[None, :] < head_width
    places = (batch.to(tl.int64) * num_queries + rows[:, None]) * row_width + head * head_width + cols[None, :]
    query = tl.load(q + places, mask=is_row & is_col, other=0.0)
    first = batch.to(tl.int64) * num_keys * row_width + head * head_width
    largest = tl.full((queries,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((queries,), dtype=tl.float32)
    result = tl.zeros((queries, width), dtype=tl.float32)
    for start in range(0, num_keys, keys):
        numbers = start + tl.arange(0, keys)
        is_key = numbers < num_keys
        key_places = first + numbers[:, None] * row_width + cols[None, :]
        key = tl.load(k + key_places, mask=is_key[:, None] & is_col, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        scores += tl.where(numbers == num_keys - 1, raised, 0.0)[None, :]
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrunk = tl.exp2(largest - larger)
        total = total * shrunk + tl.sum(weights, axis=1)
        value = tl.load(v + key_places, mask=is_key[:, None] & is_col, other=0.0)
        result = result * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=precision)
        largest = larger
    tl.store(out + places, (result / total[:, None]).to(out.dtype.element_ty), mask=is_row & is_col)


def attend_counted(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    """`tokens.attend_counted` on CUDA; float32 products keep float32."""
    batch_size, num_queries, num_heads, head_width = q.shape
    out = torch.empty((batch_size, num_queries, num_heads * head_width), dtype=q.dtype, device=q.device)
    _attend[(triton.cdiv(num_queries, QUERIES), batch_size * num_heads)](
        q.contiguous(), k.contiguous(), v.contiguous(), out, num_queries, k.shape[1],
        math.log2(repeats), math.log2(math.e) / math.sqrt(head_width), num_heads=num_heads, head_width=head_width,
        width=max(16, triton.next_power_of_2(head_width)), queries=QUERIES, keys=KEYS,
        precision="tf32" if q.dtype.itemsize == 2 else "ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
