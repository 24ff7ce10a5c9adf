"""Tokens of one video on several processes: Ulysses, Ring, or a grid of both.

Letters: B videos; L tokens; rows of one process; U members of a Ulysses group; N heads, n = N / U; K head width; G
groups in which heads go round a ring.

Every process holds as many rows, in the video's order; where they do not divide, the last ones are padding. Padding is
never attended to, and is dropped at the end, so results are those of one process. Equal rows keep everything else
simple: all messages have one size, all processes take the same slices, and none waits for another's longer part.

Reference: DeepSpeed-Ulysses (arXiv 2309.14509); the grid is that of USP (arXiv 2405.07719).
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch

from wan21.attention import Attention, AttentionWithLse, choose_attention_with_lse
from wan21.dit.residual import Outs, Produce, Window, chunks, row_slices
from wan21.dit.tokens import ALL, Brought, Tokens
from wan21.options import AttentionKernel
from wan21.parallel.exchange import Messages, exchange, gathered
from wan21.parallel.ring import Ring, Round, heads_at_once
from wan21.parallel.world import World

MOST_UNDER_WAY = 6
"""Messages of a collection that may wait to be sent: values, keys and queries of two windows."""

MOST_WINDOWS = 4
FEWEST_ROWS = 8000
"""Rows travel in so many windows where each has as many rows: the last one's messages are what nothing hides, and
products of fewer rows would not fill a GPU."""


def shared_tokens(num_tokens: int, world: World, kernel: AttentionKernel = "sdpa", *, is_fused: bool = False) -> Tokens:
    """The tokens of a video that this process holds: all of them where it is not shared.

    Args:
        num_tokens: of the video.
        world: this process's place.
        kernel: of attention.
        is_fused: whether kernels of our own may be used.
    """
    if world.sequence.size == 1:
        return ALL
    with_lse = choose_attention_with_lse(kernel) if world.ring.size > 1 else None
    return (SharedTokens if world.ulysses.size == 1 else SharedHeads)(num_tokens, world, with_lse, is_fused=is_fused)


class SharedTokens(Tokens):
    """Some of a video's tokens. For inference: nothing here keeps gradients.

    Args:
        num_tokens: of the video.
        world: this process's place.
        with_lse: the kernel of attention in a ring, if there is one.
        is_fused: whether a ring joins parts in a kernel of our own.
    """

    exchanges: ClassVar[bool] = True

    def __init__(
        self, num_tokens: int, world: World, with_lse: AttentionWithLse | None, *, is_fused: bool = False
    ) -> None:
        self._num_tokens = num_tokens
        self._sequence = world.sequence
        self._group = world.ulysses
        self._num_rows = -(-num_tokens // world.sequence.size)
        in_group = self._num_rows * world.ulysses.size
        self._num_keys = [min(max(num_tokens - i * in_group, 0), in_group) for i in range(world.ring.size)]
        self._ring = None if with_lse is None else Ring(world.ring, self._num_keys, with_lse, is_fused=is_fused)

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's rows along `dim`, zeros where they are padding.

        Raises:
            ValueError: gradients are kept.
        """
        if torch.is_grad_enabled():
            raise ValueError("tokens are shared by several processes, which keeps no gradients; use torch.no_grad")
        start = min(self._sequence.rank * self._num_rows, self._num_tokens)
        count = min(self._num_rows, self._num_tokens - start)
        shape = list(x.shape)
        shape[dim] = self._num_rows
        rows = x.new_zeros(shape)
        rows.narrow(dim, 0, count).copy_(x.narrow(dim, start, count))
        return rows

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        everything = gathered(self._sequence, x).transpose(0, 1)  # [B, members, rows, ...]
        return everything.flatten(1, 2)[:, : self._num_tokens]  # copies for several videos

    def num_groups(self, num_heads: int) -> int:
        return 1 if self._ring is None else num_heads // heads_at_once(num_heads, self._num_rows)

    def warm_up(self, like: torch.Tensor) -> None:
        if self._ring is not None:
            self._ring.warm_up(like)

    def room(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
        if self._ring is None:
            return super().room(count, shape, like)
        batch_size, num_rows, num_heads, head_dim = shape
        at_once = num_heads // self.num_groups(num_heads)
        # Groups of heads first: what is sent at a time, values and keys, then lies in one piece.
        room = like.new_empty((num_heads // at_once, count, batch_size, num_rows, at_once, head_dim))
        return room.permute(1, 2, 3, 0, 4, 5)  # [count, B, rows, G, N / G, K]

    def collect(self, parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[Brought, ...]:
        """Likewise; in a ring keys and values set out when the last are here, before the queries behind them."""
        values, keys, *_ = (*wholes, None)
        if self._ring is None or values is None or keys is None:
            return super().collect(parts, produce, wholes)
        group, num_rows, rounds = self._ring.group, self._num_rows, list[Round]()

        def produce_and_send(rows: slice, x: torch.Tensor, outs: Outs) -> Iterator[torch.Tensor]:
            for number, result in enumerate(produce(rows, x, outs)):
                yield result
                if number == 1 and rows.stop == num_rows:
                    rounds.append(Round(group, keys, values))

        v, k, *q = super().collect(parts, produce_and_send, wholes)
        return (v, GoingRound(k.here(), rounds.pop()), *q)

    def read(self, attention: Attention, q: Brought, k: Brought, v: Brought, size: int) -> Iterator[Window]:
        """Likewise; in a ring its own kernel takes the place of the given one."""
        attended = self._attend(attention, q, k, v)
        del q
        yield from chunks(attended, size)

    def _attend(self, attention: Attention, q: Brought, k: Brought, v: Brought) -> torch.Tensor:
        """[B, Lq, n * K]."""
        if self._ring is None:
            (count,) = self._num_keys
            return attention(q.here(), k.here()[:, :count], v.here()[:, :count])
        others = k.take_round() if isinstance(k, GoingRound) else None
        if others is None:
            others = Round(self._ring.group, self._in_groups(k.here()), self._in_groups(v.here()))
        return self._ring.attend(self._in_groups(q.here()), others).flatten(2)

    def _in_groups(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, L, G, n / G, K], from that or from [B, L, n, K]."""
        if heads.dim() == 5:
            return heads
        return heads.unflatten(2, (-1, heads_at_once(heads.shape[2], self._num_rows * self._group.size)))


class GoingRound(Brought):
    """Keys in groups of heads, [B, rows, G, N / G, K], which have set out for the members of a ring with their values.

    Args:
        keys: this process's.
        others: them and those of other members.
    """

    def __init__(self, keys: torch.Tensor, others: Round) -> None:
        self._keys = keys
        self._others: Round | None = others

    def here(self) -> torch.Tensor:
        return self._keys

    def take_round(self) -> Round | None:
        """The round on which they have set out, once."""
        others, self._others = self._others, None
        return others


class OnTheWay(Brought):
    """What other members send, too.

    Args:
        room: where it arrives, [B, U * rows, n, K]; in memory [U * rows, B, n, K], a member's rows in one piece.
        num_members: U.
    """

    def __init__(self, room: torch.Tensor, num_members: int) -> None:
        self.members = room.transpose(0, 1).unflatten(0, (num_members, -1))  # [U, rows, B, n, K]
        self.messages: list[Messages] = []
        self._room = room

    def here(self) -> torch.Tensor:
        for messages in self.messages:
            messages.wait()
        self.messages = []
        return self._room


class SharedHeads(SharedTokens):
    """The same, where several processes share the heads: Ulysses.

    Outside attention a process has its rows with all heads, inside it all rows of its group with n heads. Values, keys
    and queries leave window by window as they are made, so that they travel while the next ones are computed, and what
    attention gave comes back window by window while those before pass the output layer. It arrives where the queries
    lay, which have been used. (While attention computes, nothing travels: its kernel has a part on every
    multiprocessor of the GPU until it ends, and messages need some, too.)
    """

    def num_groups(self, num_heads: int) -> int:  # noqa: ARG002 # one for each member
        return self._group.size

    def window(self, size: int) -> int:
        windows = min(MOST_WINDOWS, max(1, self._num_rows // FEWEST_ROWS))
        return min(size, -(-self._num_rows // windows))

    def room(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
        batch_size, num_rows, num_heads, head_dim = shape
        members = self._group.size
        # Rows first: what one member sends then lies in one piece.
        room = like.new_empty((count, members * num_rows, batch_size, num_heads // members, head_dim))
        return room.transpose(1, 2)

    def collect(self, parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[OnTheWay, ...]:
        group = self._group
        brought = tuple(OnTheWay(whole, group.size) for whole in wholes if whole is not None)
        under_way: list[Messages] = []
        first: int | None = None
        for rows, x in parts:
            first = rows.start if first is None else first
            here = slice(rows.start - first, rows.stop - first)
            # By member, each with its heads of these rows: [U, rows, B, n, K], which [B, rows, U, n, K] is a view of.
            sent = [one.members.new_empty(one.members[:, here].shape) for one in brought]
            results = produce(rows, x, tuple(one.permute(2, 1, 0, 3, 4) for one in sent))
            for one, given, _ in zip(brought, sent, results, strict=True):
                if len(under_way) == MOST_UNDER_WAY:
                    under_way.pop(0).wait()
                one.members[group.rank, here].copy_(given[group.rank])
                messages = exchange(
                    group,
                    {member: given[member] for member in group.others},
                    {member: one.members[member, here] for member in group.others},
                )
                under_way.append(messages)
                one.messages.append(messages)
            del sent, given, results
        return brought

    def read(self, attention: Attention, q: Brought, k: Brought, v: Brought, size: int) -> Iterator[Window]:
        """Likewise.

        Raises:
            TypeError: the queries were not collected here.
        """
        if not isinstance(q, OnTheWay):
            raise TypeError(f"queries are {type(q).__name__}; they have to come from `collect`")
        group = self._group
        attended = self._attend(attention, q, k, v)
        by_member = attended.unflatten(1, (group.size, -1))  # [B, U, rows, n * K]
        on_the_way: list[tuple[slice, Messages, dict[int, torch.Tensor]]] = []
        for rows in row_slices(by_member.shape[2], size):
            theirs = {member: by_member[:, member, rows].contiguous() for member in group.others}
            # The same memory as [rows, B, n, K] of the member's queries.
            ours = {member: q.members[member, rows].view(-1).view(one.shape) for member, one in theirs.items()}
            on_the_way.append((rows, exchange(group, theirs, ours), ours))
            del theirs
        for rows, messages, ours in on_the_way:
            messages.wait()
            found = {**ours, group.rank: by_member[:, group.rank, rows]}
            heads = torch.cat([found[member] for member in range(group.size)], dim=-1)
            del found
            yield rows, heads
            del heads
