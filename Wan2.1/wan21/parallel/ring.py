"""Attention to keys and values that go round: each member attends with its own queries to everybody's keys.

Letters: B videos; Lq queries and Lk keys of one member; N heads in G groups of n; K head width.

A softmax over all keys is a weighted mean of softmaxes over parts of them, weighted by their denominators, whose logs
the kernels give. So each member needs one member's keys and values at a time. Heads go round in groups, one group after
the other, so that what arrives takes at most a quarter of what all heads would.

A kernel of attention leaves no multiprocessor of a GPU to messages until its last round of tiles, so what is asked for
as it begins would arrive after it. Messages are therefore asked for two ahead: that for the next part but one as soon
as the place where it arrives has been read.

Reference: Ring Attention (arXiv 2310.01889); online softmax (arXiv 1805.02867).
"""

from collections import deque
from collections.abc import Sequence

import torch

from wan21.attention import ROWS_OF_A_TILE, TILES_AT_ONCE, AttentionWithLse
from wan21.kernels import tokens
from wan21.parallel.exchange import Messages, exchange, in_one_memory
from wan21.parallel.world import Group

FEWEST_GROUPS = 4
"""Heads travel in so many groups at the least, so that a quarter of them at most has a second place."""

MOST_AHEAD = 2
"""Messages that are under way or have arrived and not been read; each has a place of its own."""


def heads_at_once(num_heads: int, num_rows: int) -> int:
    """How many heads to take in a group, so that kernels of attention leave the GPU idle the least."""
    tiles = -(-num_rows // ROWS_OF_A_TILE)
    most = -(-num_heads // FEWEST_GROUPS)
    sizes = [size for size in range(most, 0, -1) if num_heads % size == 0]
    return min(sizes, key=lambda size: num_heads // size * -(-size * tiles // TILES_AT_ONCE))


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


class Round:
    """Keys and values of one layer on their way round; they set out at once.

    Args:
        group: the members.
        k: [B, Lk, G, n, K], as many for each member.
        v: likewise.

    Memory: places for what arrives, for one group of heads twice keys and values. Where a group's own do not lie
    together, as they do in the room of `SharedTokens`, they are copied as they are sent: one more place; of two members
    then only one message is ahead, which has one place for either.
    """

    def __init__(self, group: Group, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self._group = group
        self._hops = group.size - 1
        self._num_messages = self._hops * k.shape[2]
        lies_there = _together(v[:, :, 0], k[:, :, 0]) is not None
        num_places = MOST_AHEAD if lies_there or self._hops > 1 else 1
        like = k[:, :, 0]
        self._places = [like.new_empty((2, *like.shape)) for _ in range(min(num_places, self._num_messages))]
        self._under_way: deque[Messages] = deque()
        self._started = self._read = 0
        for _ in self._places:
            self._start()

    def arrived(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next keys and values, [B, Lk, n, K]: of each group of heads those of the member behind, and so on."""
        self._under_way.popleft().wait()
        values, keys = self._places[self._read % len(self._places)]
        return keys, values

    def go_on(self) -> None:
        """Gives the place of what arrived last to another message; what reads it has to be asked for before."""
        self._read += 1
        self._start()

    def _start(self) -> None:
        """Sends the next group's own, or on what the last message brought."""
        if self._started == self._num_messages:
            return
        group, heads, hop = self._group, *divmod(self._started, self._hops)
        if hop:
            sent = self._places[(self._started - 1) % len(self._places)]
        else:
            v, k = self.v[:, :, heads], self.k[:, :, heads]
            sent = torch.stack((v, k)) if (both := _together(v, k)) is None else both
        ahead, behind = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        there = self._places[self._started % len(self._places)]
        before = self._under_way[-1] if self._under_way else None
        self._under_way.append(exchange(group, {ahead: sent}, {behind: there}, before))
        self._started += 1


class Ring:
    """Attention over the keys of all members.

    Args:
        group: the members.
        num_keys: how many of each member's keys count; those behind them are passed over. It may be none.
        attention: the kernel.
        is_fused: whether parts are joined in a kernel of our own.

    Memory: beside queries, keys, values, result, and what a round has, for a group of heads two results, and, of more
    than two members, one in float32.

    Raises:
        ValueError: no member has a key.
    """

    def __init__(
        self, group: Group, num_keys: Sequence[int], attention: AttentionWithLse, *, is_fused: bool = False
    ) -> None:
        if not any(num_keys):
            raise ValueError(f"num_keys={list(num_keys)}: there is no key to attend to")
        self.group = group
        self._attention = attention
        self._num_keys = num_keys
        self._num_parts = sum(count > 0 for count in num_keys)
        self._is_fused = is_fused

    def warm_up(self, like: torch.Tensor) -> None:
        """Has everything compiled that joins parts.

        Args:
            like: heads of some tokens, [B, rows, N, K].
        """
        mean = self._mean(torch.empty_like(like))
        lse = torch.zeros(*like.shape[:3], 1, dtype=torch.float32, device=like.device)
        for _ in range(self._num_parts):
            mean.add(like, lse)

    def attend(self, q: torch.Tensor, others: Round) -> torch.Tensor:
        """Attention of this member's queries.

        Args:
            q: [B, Lq, G, n, K].
            others: all keys and values; used up.

        Returns:
            [B, Lq, G, n, K], contiguous.
        """
        result = q.new_empty(q.shape)
        for heads in range(q.shape[2]):
            mean = self._mean(result[:, :, heads])
            keys, values = others.k[:, :, heads], others.v[:, :, heads]
            for hop in range(self.group.size):
                if hop:
                    keys, values = others.arrived()
                count = self._num_keys[(self.group.rank - hop) % self.group.size]
                part = self._attention(q[:, :, heads], keys[:, :count], values[:, :count]) if count else None
                if hop:
                    others.go_on()  # before parts are joined: meanwhile the message gets its multiprocessors
                if part is not None:
                    mean.add(*part)
                del part
        return result

    def _mean(self, result: torch.Tensor) -> Mean:
        return Mean(result, self._num_parts, is_fused=self._is_fused)


def _together(v: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Values and keys as one tensor [2, B, Lk, n, K], where they lie one behind the other in memory."""
    if not (v.is_contiguous() and k.is_contiguous() and in_one_memory(v, k)):
        return None
    if k.storage_offset() - v.storage_offset() != v.numel():
        return None
    return v.as_strided((2, *v.shape), (v.numel(), *v.stride()))
