"""Attention to keys and values that go round: each member attends with its own queries to everybody's keys.

Letters: B videos; Lq queries and Lk keys of one member; N heads; K head width.

A softmax over all keys is a weighted mean of softmaxes over parts of them, weighted by their denominators, whose logs
the kernels give. So each member needs one member's keys and values at a time, and while it attends to them the next
ones arrive. Heads go round in groups, one group after the other, so that what travels takes at most a quarter of what
all heads would.

Reference: Ring Attention (arXiv 2310.01889); online softmax (arXiv 1805.02867).
"""

from collections.abc import Iterator, Sequence

import torch

from wan21.attention import AttentionWithLse
from wan21.kernels import tokens
from wan21.parallel.exchange import Messages, send_and_receive
from wan21.parallel.world import Group

FEWEST_GROUPS = 4
"""Heads travel in so many groups at the least, so that a quarter of them at most has a second place."""

ROWS_OF_A_TILE = 128
TILES_AT_ONCE = 132
"""A kernel of attention takes so many queries of a head at a time, and so many of these at once: as on an H100. On
other GPUs the groups are as good as any."""


def heads_at_once(num_heads: int, num_rows: int) -> int:
    """How many heads to take in a group, so that kernels of attention leave the GPU idle the least."""
    tiles = -(-num_rows // ROWS_OF_A_TILE)

    def rounds(size: int) -> int:
        groups = [size] * (num_heads // size) + [num_heads % size]
        return sum(-(-heads * tiles // TILES_AT_ONCE) for heads in groups)

    return min(range(-(-num_heads // FEWEST_GROUPS), 0, -1), key=rounds)


class Mean:
    """The weighted mean of attention over parts of the keys; in float32 while more than two parts are joined.

    Args:
        result: where it goes, [B, Lq, N, K].
        num_parts: how many there are.
        is_fused: whether two are joined in a kernel of our own.
    """

    def __init__(self, result: torch.Tensor, num_parts: int, *, is_fused: bool = False) -> None:
        self._result = result
        self._left = num_parts
        self._join = tokens.join_attention if is_fused else tokens.join_attention_plainly
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Takes in attention over some more keys; the last one completes the result.

        Args:
            out: [B, Lq, N, K].
            lse: log of its denominator, [B, Lq, N, 1], float32.
        """
        self._left -= 1
        if self._parts is None:
            self._parts = out, lse
            if not self._left:
                self._result.copy_(out)
            return
        mean, denominator = self._parts
        if self._left and mean.dtype != torch.float32:
            mean = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        place = mean if self._left else self._result
        self._join(*self._parts, out, lse, place, denominator)
        self._parts = mean, denominator


class Ring:
    """Attention over the keys of all members.

    Args:
        group: the members.
        num_keys: how many of each member's keys count; those behind them are passed over. It may be none.
        attention: the kernel.
        is_fused: whether parts are joined in a kernel of our own.

    Memory: beside queries, keys, values and result, for a quarter of the heads twice keys and values, two results, and,
    of more than two members, one in float32.

    Raises:
        ValueError: no member has a key.
    """

    def __init__(
        self, group: Group, num_keys: Sequence[int], attention: AttentionWithLse, *, is_fused: bool = False
    ) -> None:
        if not any(num_keys):
            raise ValueError(f"num_keys={list(num_keys)}: there is no key to attend to")
        self._group = group
        self._attention = attention
        self._num_keys = num_keys
        self._is_fused = is_fused
        self._buffers: list[torch.Tensor] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of this member's queries.

        Args:
            q: [B, Lq, N, K].
            k: [B, Lk, N, K], as many for each member, same dtype.
            v: [B, Lk, N, K], same dtype.

        Returns:
            [B, Lq, N, K].
        """
        result = torch.empty_like(q)
        num_heads = q.shape[2]
        at_once = heads_at_once(num_heads, k.shape[1])
        num_parts = sum(count > 0 for count in self._num_keys)
        buffers = self._places(k, at_once)
        for first in range(0, num_heads, at_once):
            heads = slice(first, min(first + at_once, num_heads))
            mean = Mean(result[:, :, heads], num_parts, is_fused=self._is_fused)
            for owner, keys, values in self._go_round(k[:, :, heads], v[:, :, heads], buffers):
                count = self._num_keys[owner]
                if count:
                    mean.add(*self._attention(q[:, :, heads], keys[:, :count], values[:, :count]))
        return result

    def _places(self, k: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
        """For what is here and what arrives: the same ones for all layers.

        Messages between two keep torch's allocator from giving memory away until they have arrived, so with new places
        in each layer a host that is ahead of its GPU would hold those of many. They go with the ring, after a video.
        """
        shape = (2, *k.shape[:2], num_heads, k.shape[3])
        if not self._buffers or self._buffers[0].shape != shape or self._buffers[0].dtype != k.dtype:
            self._buffers = []
            self._buffers = [k.new_empty(shape) for _ in range(2)]
        return self._buffers

    def _go_round(
        self, k: torch.Tensor, v: torch.Tensor, buffers: list[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Whose keys, keys and values: first this member's, then those of the one before it, and so on."""
        group = self._group
        behind, ahead = (group.rank - 1) % group.size, (group.rank + 1) % group.size
        shape = (2, *k.shape)
        here, there = (buffer.view(-1)[: 2 * k.numel()].view(shape) for buffer in buffers)
        here[0].copy_(k)
        here[1].copy_(v)
        for step in range(group.size):
            messages: Messages | None = None
            if step < group.size - 1:
                messages = send_and_receive(group, [(ahead, here)], [(behind, there)])
            yield (group.rank - step) % group.size, here[0], here[1]
            if messages is not None:
                messages.wait()
            here, there = there, here
