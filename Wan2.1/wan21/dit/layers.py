"""The parts of a DiT block.

Letters: B videos, L tokens, S prompt tokens, D model width, N heads, K head width, M feed-forward width.

All per-token work goes over the tokens in chunks of rows and adds into the residual in place, so no temporary
but keys, values and queries is as long as the video. With gradients kept there is one chunk and nothing is in place.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import nn

from wan21.attention import Attention
from wan21.dit.context import Context
from wan21.dit.linear import Linear
from wan21.dit.operations import Activations, Modulation, Operations, RmsNorm
from wan21.dit.residual import Outs, Residual, chunks, windows
from wan21.dit.tokens import ALL, Tokens
from wan21.models import DitConfig
from wan21.parts import Enter

FEWEST_ROWS = 64
"""Below this the loop costs more than the memory is worth."""


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """Into what a block cuts its work; none of it changes what is computed.

    most_queries: how many tokens of each video self attention reads for at once; None: all of them.
    most_rows: how many tokens, of all videos of a batch together, pass through norms and linear layers at once.
    tokens: those that are here, and how attention reaches others.
    """

    most_queries: int | None = None
    most_rows: int = 4096
    tokens: Tokens = ALL


def chunk_rows(shape: torch.Size, most_rows: int) -> int:
    """How many tokens of each video of a [B, L, D] are handled at once; the last ones may be fewer."""
    batch_size, num_rows = shape[:2]
    return min(max(FEWEST_ROWS, most_rows // batch_size), num_rows)


def lent(room: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A tensor of that shape in the memory of keys and values, while nobody reads them.

    Args:
        room: all of that memory, from the tokens' `room`; None where gradients are kept.
        shape: what is needed.

    Returns:
        The tensor, contiguous; None where the room is too small, or there is none.
    """
    if room is None or room.numel() < math.prod(shape):
        return None
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return room.as_strided(shape, strides)


class SelfAttention(nn.Module):
    """Attention of the video's tokens to each other, with rotary positions."""

    def __init__(self, config: DitConfig, dtype: torch.dtype, operations: Operations) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.eps = config.eps
        self.dtype = dtype
        self.operations = operations
        dim = config.dim
        self.q = nn.Linear(dim, dim, dtype=dtype)
        self.k = nn.Linear(dim, dim, dtype=dtype)
        self.v = nn.Linear(dim, dim, dtype=dtype)
        self.o = nn.Linear(dim, dim, dtype=dtype)
        self.norm_q = RmsNorm(dim, config.eps)
        self.norm_k = RmsNorm(dim, config.eps)

    def forward(
        self,
        residual: Residual,
        modulation: Modulation,
        turns: torch.Tensor,
        slicing: Slicing,
        norm_dtype: torch.dtype,
        room: torch.Tensor | None,
        part: Enter,
        attend: Attention,
    ) -> Residual:
        """The residual with this branch added.

        Values and keys of all tokens come first, and the queries with them if they are not sliced. Each slice of
        queries is added to the residual before the next one is formed: a token's normed input depends on its own
        residual only.

        Args:
            residual: [B, L, D], float32; written to. One in windows has its queries sliced as it is.
            modulation: shift, scale and gate of this branch.
            turns: rotary positions, [L, 1, K/2], complex64.
            slicing: into what the work is cut.
            norm_dtype: what the norm's output is rounded to.
            room: for values and keys, from the tokens' `room`; None where gradients are kept.
            part: surrounds the use of weights: "keys" of k and v, "queries" of q and o.
            attend: the kernel.

        Returns:
            [B, L, D], float32.

        Memory: one slice of queries and of outputs, [B, L, D] each in the compute dtype, and chunks of rows.
        """
        run = self.operations
        num_tokens, tokens = residual.shape[1], slicing.tokens
        each = tokens.exchanges or attend is not run.attend  # somebody else is spoken with, or remembers
        size = tokens.window(chunk_rows(residual.shape, slicing.most_rows))
        most_queries = min(slicing.most_queries or num_tokens, num_tokens)
        whole = most_queries == num_tokens and isinstance(residual, torch.Tensor)

        def normed(window: torch.Tensor) -> Activations:
            return run.modulated(window, modulation, self.eps, self.dtype, norm_dtype)

        def queries(rows: slice, x: Activations, out: torch.Tensor | None) -> torch.Tensor:
            return run.projected(self.q, x, self.norm_q, self.num_heads, turns[rows], out)

        def form(rows: slice, window: torch.Tensor, outs: Outs) -> Iterator[torch.Tensor]:
            x = normed(window)
            yield self._values(x, outs[0])
            yield run.projected(self.k, x, self.norm_k, self.num_heads, turns[rows], outs[1])
            yield from (queries(rows, x, out) for out in outs[2:])

        def form_queries(rows: slice, window: torch.Tensor, outs: Outs) -> Iterator[torch.Tensor]:
            yield queries(rows, normed(window), outs[0])

        with ExitStack() as parts:
            with part("keys"):
                if whole:
                    parts.enter_context(part("queries"))
                v, k, *q = tokens.collect(windows(residual, size, each=each), form, _wholes(room, with_queries=whole))
            if not whole:
                parts.enter_context(part("queries"))
            for rows, window in windows(residual, most_queries, writes=True, each=each):
                if not whole:
                    shape = (*window.shape[:2], self.num_heads, window.shape[2] // self.num_heads)
                    room_of_slice = None if room is None else tokens.room(1, shape, room)[0]
                    q = [*tokens.collect(chunks(window, size, rows.start, each=each), form_queries, (room_of_slice,))]
                    del room_of_slice  # or it would stand beside the outputs
                for part_rows, heads in tokens.read(attend, q.pop(), k, v, size):
                    branch = run.linear(self.o, heads)
                    residual = run.add(residual, window[:, part_rows], branch, modulation.gate)
                    del branch, heads
        return residual

    def _values(self, x: Activations, out: torch.Tensor | None) -> torch.Tensor:
        """[B, rows, N, K], or `out`."""
        values = self.operations.linear(self.v, x, out)
        return values.unflatten(-1, (self.num_heads, -1)) if out is None else values


def _wholes(room: torch.Tensor | None, *, with_queries: bool) -> Outs:
    if room is None:
        return (None,) * (3 if with_queries else 2)
    return (*room, torch.empty_like(room[0])) if with_queries else tuple(room)


Read: TypeAlias = tuple[torch.Tensor, torch.Tensor, int]
"""Keys and values, [B, S, N, K] each, and how often the last of them counts."""


def read_each(operations: Operations, q: torch.Tensor, reads: Iterable[Read]) -> torch.Tensor:
    """What queries [B, L, N, K] read from each of these, added: [B, L, D]."""
    first, *others = reads
    attended = operations.read(q, *first)
    for read in others:
        # Rounded once, as the sum of two float32 tensors with such values would be.
        attended = attended + operations.read(q, *read)
    return attended


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the prompt; all text positions count, padding included, as upstream."""

    def __init__(self, config: DitConfig, dtype: torch.dtype, operations: Operations) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dtype = dtype
        self.operations = operations
        dim = config.dim
        self.q = nn.Linear(dim, dim, dtype=dtype)
        self.k = nn.Linear(dim, dim, dtype=dtype)
        self.v = nn.Linear(dim, dim, dtype=dtype)
        self.o = nn.Linear(dim, dim, dtype=dtype)
        self.norm_q = RmsNorm(dim, config.eps)
        self.norm_k = RmsNorm(dim, config.eps)

    def forward(self, residual: Residual, norm: nn.LayerNorm, context: Context, size: int, part: Enter) -> Residual:
        """The residual with this branch added.

        Keys and values of the prompt are worked out in every pass: that costs less than a thousandth of it, and kept
        for all layers they would take 0.4 GB for each prompt of the 14B model.

        Args:
            residual: [B, L, D], float32; written to.
            norm: what the queries' input passes first.
            context: what is read.
            size: tokens handled at once.
            part: surrounds the use of weights: "prompt" of k and v, "cross" of the norm, q and o.

        Returns:
            [B, L, D], float32.
        """
        run = self.operations
        with part("prompt"):
            reads = self.reads(context)
        with part("cross"):
            for _, window in windows(residual, size, writes=True):
                x = run.linear(self.q, run.normed(window, norm, self.dtype))
                x = run.heads(x, self.norm_q, self.num_heads)
                x = read_each(run, x, reads)
                branch = run.linear(self.o, x)
                residual = run.add(residual, window, branch)
                del x, branch
        return residual

    def reads(self, context: Context) -> list[Read]:
        """Each thing that is attended to by itself; the results are added."""
        return [(*self._heads(context.text, self.k, self.v, self.norm_k), context.repeats)]

    def _heads(self, context: torch.Tensor, k: Linear, v: Linear, norm_k: RmsNorm) -> tuple[torch.Tensor, torch.Tensor]:
        run = self.operations
        keys = run.heads(run.linear(k, context), norm_k, self.num_heads)
        return keys, run.linear(v, context).unflatten(-1, (self.num_heads, -1))


class FeedForward(nn.Sequential):
    """Two linear layers with a tanh-form GELU between them; numbered as in the checkpoint (0 and 2)."""

    def __init__(self, config: DitConfig, dtype: torch.dtype, operations: Operations) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim, dtype=dtype),
        )
        self.operations = operations

    def widened(self, x: Activations, out: torch.Tensor | None = None) -> Activations:
        """What lies between the two layers: [B, R, D] to [B, R, M], written to `out` if there is such a place."""
        return self.operations.widened(cast("Linear", self[0]), x, out)

    def narrowed(self, hidden: Activations) -> torch.Tensor:
        """[B, R, M] to [B, R, D]."""
        return self.operations.linear(cast("Linear", self[2]), hidden)
