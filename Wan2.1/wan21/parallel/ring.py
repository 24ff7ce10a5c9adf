"""Attention to keys and values that go round: each member attends with its own queries to everybody's keys.

Letters: B videos; Lq queries and Lk keys of one member; N heads; K head width.

A softmax over all keys is a weighted mean of softmaxes over parts of them, weighted by their denominators, whose logs
the kernels give. So each member needs one member's keys and values at a time, and while it attends to them the next
ones arrive. Heads go round in groups, one group after the other, so that what travels and the sum in float32 take a
quarter of what all heads would.

Reference: Ring Attention (arXiv 2310.01889); online softmax (arXiv 1805.02867).
"""

from collections.abc import Iterator, Sequence

import torch

from wan21.attention import AttentionWithLse
from wan21.parallel.exchange import Messages, send_and_receive
from wan21.parallel.world import Group

HEAD_GROUPS = 4
"""Heads travel in so many groups at most. More take less memory; fewer keep a large GPU busier."""


class Mean:
    """The weighted mean of attention over parts of the keys, in float32."""

    def __init__(self) -> None:
        self.out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Takes in attention over some more keys.

        Args:
            out: [B, Lq, N, K].
            lse: log of its denominator, [B, Lq, N, 1], float32.
        """
        if self.out is None or self._lse is None:
            self.out, self._lse = out.float(), lse
            return
        share = torch.sigmoid(lse - self._lse)  # of the new part in both together
        self.out.lerp_(out.float(), share)
        self._lse = torch.logaddexp(self._lse, lse)


class Ring:
    """Attention over the keys of all members.

    Args:
        group: the members.
        num_keys: how many of each member's keys count; those behind them are passed over. It may be none.
        attention: the kernel.

    Memory: beside queries, keys, values and result, for a quarter of the heads twice keys and values, and the result
    in float32.
    """

    def __init__(self, group: Group, num_keys: Sequence[int], attention: AttentionWithLse) -> None:
        self._group = group
        self._attention = attention
        self._num_keys = num_keys

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
        at_once = -(-num_heads // HEAD_GROUPS)
        buffers = [k.new_empty(2, *k.shape[:2], at_once, k.shape[3]) for _ in range(2)]
        for first in range(0, num_heads, at_once):
            heads = slice(first, min(first + at_once, num_heads))
            mean = Mean()
            for owner, keys, values in self._go_round(k[:, :, heads], v[:, :, heads], buffers):
                count = self._num_keys[owner]
                if count:
                    mean.add(*self._attention(q[:, :, heads], keys[:, :count], values[:, :count]))
            if mean.out is None:
                raise ValueError(f"num_keys={list(self._num_keys)}: there is no key to attend to")
            result[:, :, heads] = mean.out
        return result

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
