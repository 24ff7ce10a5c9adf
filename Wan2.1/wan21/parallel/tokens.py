"""Tokens of one video on several processes: Ulysses, Ring, or a grid of both.

Letters: B videos; L tokens; rows of one process; U members of a Ulysses group; N heads, n = N / U; K head width.

Every process holds as many rows, in the video's order; where they do not divide, the last ones are padding. Padding is
never attended to, and is dropped at the end, so results are those of one process. Equal rows keep everything else
simple: all messages have one size, all processes take the same slices, and none waits for another's longer part.

Outside attention a process has its rows with all heads, inside it all rows of its Ulysses group with n heads. Queries,
keys and values leave chunk by chunk, as they are made, straight to where they are needed, and attention's result comes
back chunk by chunk as it is used. So messages travel while the next chunk is computed, and a process holds what one
process would, divided by their number, and two chunks.

Reference: DeepSpeed-Ulysses (arXiv 2309.14509); the grid is that of USP (arXiv 2405.07719).
"""

from collections.abc import Iterable, Iterator

import torch

from wan21.attention import attend
from wan21.dit.residual import Window, row_slices
from wan21.dit.tokens import ALL, Produce, Tokens
from wan21.parallel.exchange import Messages, gathered, send_and_receive
from wan21.parallel.ring import Ring
from wan21.parallel.world import World


def shared_tokens(num_tokens: int, world: World) -> Tokens:
    """The tokens of a video that this process holds: all of them where it is not shared."""
    return ALL if world.sequence.size == 1 else SharedTokens(num_tokens, world)


class SharedTokens(Tokens):
    """Some of a video's tokens. For inference: nothing here keeps gradients.

    Args:
        num_tokens: of the video.
        world: this process's place.
    """

    def __init__(self, num_tokens: int, world: World) -> None:
        self._num_tokens = num_tokens
        self._sequence = world.sequence
        self._ulysses = world.ulysses
        self.num_rows = -(-num_tokens // world.sequence.size)
        in_group = self.num_rows * world.ulysses.size
        self._num_keys = [min(max(num_tokens - i * in_group, 0), in_group) for i in range(world.ring.size)]
        self._ring = Ring(world.ring, self._num_keys) if world.ring.size > 1 else None

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's rows along `dim`, zeros where they are padding.

        Raises:
            ValueError: gradients are kept.
        """
        if torch.is_grad_enabled():
            raise ValueError("tokens are shared by several processes, which keeps no gradients; use torch.no_grad")
        start = min(self._sequence.rank * self.num_rows, self._num_tokens)
        count = min(self.num_rows, self._num_tokens - start)
        shape = list(x.shape)
        shape[dim] = self.num_rows
        rows = x.new_zeros(shape)
        rows.narrow(dim, 0, count).copy_(x.narrow(dim, start, count))
        return rows

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        everything = gathered(self._sequence, x).transpose(0, 1)  # [B, members, rows, ...]
        return everything.flatten(1, 2)[:, : self._num_tokens]  # copies for several videos

    def room(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        batch_size, num_rows, num_heads, head_dim = shape
        members = self._ulysses.size
        # Rows first: what one member sends then lies in one piece.
        room = torch.empty(
            (2, members * num_rows, batch_size, num_heads // members, head_dim), dtype=dtype, device=device
        )
        return room.transpose(1, 2)

    def collect(
        self, parts: Iterable[Window], num_rows: int, produce: Produce, wholes: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[torch.Tensor, ...]:
        group = self._ulysses
        first: int | None = None
        under_way: list[Messages] = []
        for rows, x in parts:
            first = rows.start if first is None else first
            results = produce(rows, x)
            if wholes is None:
                wholes = tuple(
                    self.room((result.shape[0], num_rows, *result.shape[2:]), result.dtype, result.device)[0]
                    for result in results
                )
            here = slice(rows.start - first, rows.stop - first)
            if len(under_way) == 2:
                under_way.pop(0).wait()  # two chunks at most wait to be sent
            sends, receives = [], []
            for whole, result in zip(wholes, results, strict=True):
                places = whole.transpose(0, 1).unflatten(0, (group.size, num_rows))[:, here]  # [U, rows, B, n, K]
                by_member = result.unflatten(2, (group.size, -1)).permute(2, 1, 0, 3, 4)  # [U, rows, B, n, K]
                places[group.rank].copy_(by_member[group.rank])
                for member in range(group.size):
                    if member != group.rank:
                        sends.append((member, torch.empty_like(places[member]).copy_(by_member[member])))
                        receives.append((member, places[member]))
            del results, result, by_member  # or they would stand beside the next ones
            if sends:
                under_way.append(send_and_receive(group, sends, receives))
            del sends
        for messages in under_way:
            messages.wait()
        if wholes is None:
            raise ValueError(f"num_rows={num_rows} and no window")
        return wholes

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._ring is not None:
            return self._ring.attend(q, k, v)
        (count,) = self._num_keys
        return attend(q, k[:, :count], v[:, :count]).unflatten(2, q.shape[2:])

    def give_back(self, attended: torch.Tensor, size: int) -> Iterator[Window]:
        """Likewise; the next window travels while one is used."""
        group = self._ulysses
        by_member = attended.transpose(0, 1).unflatten(0, (group.size, -1))  # [U, rows, B, n, K]
        windows = list(row_slices(by_member.shape[1], size))
        coming = self._ask_back(by_member, windows[0])
        for rows, after in zip(windows, [*windows[1:], None], strict=True):
            messages, places = coming
            if messages is not None:
                messages.wait()
            if after is not None:
                coming = self._ask_back(by_member, after)
            heads = places.permute(2, 1, 0, 3, 4).flatten(2)  # [B, rows, N * K], copies
            del places
            yield rows, heads
            del heads

    def _ask_back(self, by_member: torch.Tensor, rows: slice) -> tuple[Messages | None, torch.Tensor]:
        """Some rows of this process with all heads, [U, rows, B, n, K], which are there after the messages."""
        group = self._ulysses
        places = by_member.new_empty(group.size, rows.stop - rows.start, *by_member.shape[2:])
        places[group.rank].copy_(by_member[group.rank, rows])
        others = [member for member in range(group.size) if member != group.rank]
        if not others:
            return None, places
        sends = [(member, by_member[member, rows].contiguous()) for member in others]
        return send_and_receive(group, sends, [(member, places[member]) for member in others]), places
