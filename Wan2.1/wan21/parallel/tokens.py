"""Tokens of one video on several processes: Ulysses, Ring, or a grid of both.

Letters: B videos; L tokens; rows of one process; U members of a Ulysses group; N heads, n = N / U; K head width.

Every process holds as many rows, in the video's order; where they do not divide, the last ones are padding. Padding is
never attended to, and is dropped at the end, so results are those of one process. Equal rows keep everything else
simple: all messages have one size, all processes take the same slices, and none waits for another's longer part.

Reference: DeepSpeed-Ulysses (arXiv 2309.14509); the grid is that of USP (arXiv 2405.07719).
"""

from collections.abc import Iterable, Iterator

import torch

from wan21.attention import Attention, AttentionWithLse, choose_attention_with_lse
from wan21.config import AttentionKernel
from wan21.dit.residual import Outs, Produce, Window, row_slices
from wan21.dit.tokens import ALL, Tokens
from wan21.parallel.exchange import Messages, gathered, send_and_receive
from wan21.parallel.ring import Ring
from wan21.parallel.world import World


def shared_tokens(num_tokens: int, world: World, kernel: AttentionKernel = "sdpa") -> Tokens:
    """The tokens of a video that this process holds: all of them where it is not shared."""
    if world.sequence.size == 1:
        return ALL
    with_lse = choose_attention_with_lse(kernel) if world.ring.size > 1 else None
    return (SharedTokens if world.ulysses.size == 1 else SharedHeads)(num_tokens, world, with_lse)


class SharedTokens(Tokens):
    """Some of a video's tokens. For inference: nothing here keeps gradients.

    Args:
        num_tokens: of the video.
        world: this process's place.
        with_lse: the kernel of attention in a ring, if there is one.
    """

    def __init__(self, num_tokens: int, world: World, with_lse: AttentionWithLse | None) -> None:
        self._num_tokens = num_tokens
        self._sequence = world.sequence
        self._group = world.ulysses
        self._num_rows = -(-num_tokens // world.sequence.size)
        in_group = self._num_rows * world.ulysses.size
        self._num_keys = [min(max(num_tokens - i * in_group, 0), in_group) for i in range(world.ring.size)]
        self._ring = None if with_lse is None else Ring(world.ring, self._num_keys, with_lse)

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

    def attend(self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Likewise; in a ring its own kernel takes the place of the given one."""
        if self._ring is not None:
            return self._ring.attend(q, k, v).flatten(2)
        (count,) = self._num_keys
        return attention(q, k[:, :count], v[:, :count])


class SharedHeads(SharedTokens):
    """The same, where several processes share the heads: Ulysses.

    Outside attention a process has its rows with all heads, inside it all rows of its group with n heads. Queries, keys
    and values leave chunk by chunk, as they are made, straight to where they are needed, and attention's result comes
    back chunk by chunk as it is used. So messages travel while the next chunk is computed, and a process holds what one
    process would, divided by their number, and a few chunks.
    """

    def room(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
        batch_size, num_rows, num_heads, head_dim = shape
        members = self._group.size
        # Rows first: what one member sends then lies in one piece.
        room = like.new_empty((count, members * num_rows, batch_size, num_heads // members, head_dim))
        return room.transpose(1, 2)

    def collect(self, parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[torch.Tensor, ...]:
        rooms = tuple(whole for whole in wholes if whole is not None)
        under_way: list[Messages] = []
        first: int | None = None
        for rows, x in parts:
            first = rows.start if first is None else first
            here = slice(rows.start - first, rows.stop - first)
            chunk = (rows.stop - rows.start, rooms[0].shape[2] * self._group.size, rooms[0].shape[3])
            results = produce(rows, x, tuple(room.new_empty((room.shape[0], *chunk)) for room in rooms))
            if len(under_way) == 2:
                under_way.pop(0).wait()  # two chunks at most wait to be sent
            under_way.append(self._hand_out(results, rooms, here))
            del results  # or they would stand beside the next ones
        for messages in under_way:
            messages.wait()
        return rooms

    def _hand_out(self, results: tuple[torch.Tensor, ...], rooms: tuple[torch.Tensor, ...], here: slice) -> Messages:
        """Sends each member its heads of some rows, [B, rows, N, K] each, and takes from all the heads of this one."""
        group = self._group
        sends, receives = [], []
        for room, result in zip(rooms, results, strict=True):
            places = room.transpose(0, 1).unflatten(0, (group.size, -1))[:, here]  # [U, rows, B, n, K]
            by_member = result.unflatten(2, (group.size, -1)).permute(2, 1, 0, 3, 4)  # [U, rows, B, n, K]
            places[group.rank].copy_(by_member[group.rank])
            for member in group.others:
                sends.append((member, by_member[member].contiguous()))
                receives.append((member, places[member]))
        return send_and_receive(group, sends, receives)

    def give_back(self, attended: torch.Tensor, size: int) -> Iterator[Window]:
        """Likewise; the next window travels while one is used."""
        by_member = attended.transpose(0, 1).unflatten(0, (self._group.size, -1))  # [U, rows, B, n * K]
        windows = list(row_slices(by_member.shape[1], size))
        messages, places = self._ask_back(by_member, windows[0])
        for rows, following in zip(windows, [*windows[1:], None], strict=True):
            messages.wait()
            heads = places.permute(2, 1, 0, 3).flatten(2)  # [B, rows, N * K], copies
            if following is not None:
                messages, places = self._ask_back(by_member, following)
            yield rows, heads
            del heads

    def _ask_back(self, by_member: torch.Tensor, rows: slice) -> tuple[Messages, torch.Tensor]:
        """Some rows of this process with all heads, [U, rows, B, n * K], which are there after the messages."""
        group = self._group
        places = by_member.new_empty((group.size, rows.stop - rows.start, *by_member.shape[2:]))
        places[group.rank].copy_(by_member[group.rank, rows])
        sends = [(member, by_member[member, rows].contiguous()) for member in group.others]
        return send_and_receive(group, sends, [(member, places[member]) for member in group.others]), places
