"""Tokens of one video on several processes: Ulysses, Ring, or a grid of both.

Letters: B videos; L tokens; rows of one process; U members of a Ulysses group; N heads, n = N / U; K head width.

Every process holds as many rows, in the video's order; where they do not divide, the last ones are padding. Padding is
never attended to, and is dropped at the end, so results are those of one process. Equal rows keep everything else
simple: all messages have one size, all processes take the same slices, and none waits for another's longer part.

Reference: DeepSpeed-Ulysses (arXiv 2309.14509); the grid is that of USP (arXiv 2405.07719).
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from wan21.attention import Attention, AttentionWithLse, choose_attention_with_lse
from wan21.config import AttentionKernel
from wan21.dit.residual import Outs, Produce, Window, chunks, row_slices
from wan21.dit.tokens import ALL, Brought, Tokens
from wan21.parallel.exchange import Messages, exchange, gathered
from wan21.parallel.ring import Ring
from wan21.parallel.world import World

MOST_UNDER_WAY = 6
"""Messages of a collection that may wait to be sent: values, keys and queries of two windows."""

FEWEST_ROWS_APART = 4096
"""Rows of a member below which its queries are not attended to apart from the others': they would not fill a GPU."""

ROWS_OF_A_TILE = 128
"""Rows are cut at multiples of this: kernels of attention take so many queries at a time."""


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

    def read(self, attention: Attention, q: Brought, k: Brought, v: Brought, size: int) -> Iterator[Window]:
        """Likewise; in a ring its own kernel takes the place of the given one."""
        attended = self._attend(attention, q.here(), k.here(), v.here())
        del q
        yield from chunks(attended, size)

    def _attend(self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[B, Lq, n * K]."""
        if self._ring is not None:
            return self._ring.attend(q, k, v).flatten(2)
        (count,) = self._num_keys
        return attention(q, k[:, :count], v[:, :count])


class OnTheWay(Brought):
    """What other members send, too.

    Args:
        room: where it arrives, [B, U * rows, n, K]; in memory [U * rows, B, n, K], a member's rows in one piece.
        own: this process's rows, which are there when `collect` returns.
        num_members: U.
    """

    def __init__(self, room: torch.Tensor, own: slice, num_members: int) -> None:
        self.room = room
        self.own = own
        self.members = room.transpose(0, 1).unflatten(0, (num_members, -1))  # [U, rows, B, n, K]
        self.messages: list[Messages] = []

    def here(self) -> torch.Tensor:
        for messages in self.messages:
            messages.wait()
        self.messages = []
        return self.room


class SharedHeads(SharedTokens):
    """The same, where several processes share the heads: Ulysses.

    Outside attention a process has its rows with all heads, inside it all rows of its group with n heads. Values, keys
    and queries leave as they are made, so that one travels while the next is computed. Attention begins with the
    queries of this process's own rows, while those of the others arrive. What another member's queries read goes back
    while the next member's are attended to, the last in two halves, and arrives where queries lay that have been used.
    So hardly anything waits for messages, and a process holds what one process would, divided by their number, and
    beside it a window.
    """

    def room(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
        batch_size, num_rows, num_heads, head_dim = shape
        members = self._group.size
        # Rows first: what one member sends then lies in one piece.
        room = like.new_empty((count, members * num_rows, batch_size, num_heads // members, head_dim))
        return room.transpose(1, 2)

    def collect(self, parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[OnTheWay, ...]:
        group = self._group
        brought = tuple(self._expected(whole) for whole in wholes if whole is not None)
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

    def _expected(self, room: torch.Tensor) -> OnTheWay:
        num_rows = room.shape[1] // self._group.size
        first = self._group.rank * num_rows
        return OnTheWay(room, slice(first, first + num_rows), self._group.size)

    def read(self, attention: Attention, q: Brought, k: Brought, v: Brought, size: int) -> Iterator[Window]:
        """Likewise.

        Raises:
            TypeError: the queries were not collected here.
        """
        if not isinstance(q, OnTheWay):
            raise TypeError(f"queries are {type(q).__name__}; they have to come from `collect`")
        keys, values = k.here(), v.here()
        if self._ring is not None or q.members.shape[1] < FEWEST_ROWS_APART:
            attended = self._attend(attention, q.here(), keys, values)  # [B, U * rows, n * K]
            return self._come_back(q, lambda rows: attended[:, rows], size)
        return self._come_back(q, lambda rows: self._attend(attention, q.room[:, rows], keys, values), size)

    def _come_back(self, q: OnTheWay, of: Callable[[slice], torch.Tensor], size: int) -> Iterator[Window]:
        """What this process's rows read, all heads together.

        In its n-th turn a process sends to the n-th member behind it, and hears from the n-th before it.

        Args:
            q: queries; their room is written to.
            of: what the queries of some rows of all members read, [B, rows, n * K].
            size: rows of a window.
        """
        group, num_rows = self._group, q.members.shape[1]
        half = min(num_rows, -(-num_rows // (2 * ROWS_OF_A_TILE)) * ROWS_OF_A_TILE)
        halves = [slice(0, half), slice(half, num_rows)] if half < num_rows else [slice(0, num_rows)]
        own = of(q.own)
        q.here()
        by_half = [{group.rank: own[:, part]} for part in halves]
        messages: list[Messages] = []
        free = q.members[group.rank]  # [rows, B, n, K]
        for turn in range(1, group.size):
            towards, away = (group.rank + turn) % group.size, (group.rank - turn) % group.size
            room = free.view(-1)
            for part in halves if turn == group.size - 1 else [slice(0, num_rows)]:
                first = towards * num_rows
                theirs = of(slice(first + part.start, first + part.stop)).contiguous()  # copies for several videos
                ours, room = room[: theirs.numel()].view_as(theirs), room[theirs.numel() :]
                messages.append(exchange(group, {towards: theirs}, {away: ours}))
                for found, rows in zip(by_half, halves, strict=True):
                    if part.start <= rows.start and rows.stop <= part.stop:
                        found[away] = ours[:, rows.start - part.start : rows.stop - part.start]
                del theirs
            free = q.members[towards]
        last = len(messages) - len(halves)
        for index, (part, found) in enumerate(zip(halves, by_half, strict=True)):
            for one in messages[: last + index + 1]:
                one.wait()
            for rows in row_slices(part.stop - part.start, size):
                heads = torch.cat([found[member][:, rows] for member in range(group.size)], dim=-1)
                yield slice(part.start + rows.start, part.start + rows.stop), heads
                del heads
