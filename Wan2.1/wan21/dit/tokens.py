"""Which of a video's tokens this process works on, and how self attention reaches the others.

Letters: B videos, L tokens, N heads, K head width; Lk keys and n heads that attention sees here at a time; G groups of
heads, each in a place of its own.

Everything but self attention looks at one token at a time. So a process may hold some tokens only, if somebody brings
queries, keys and values together. The network asks the questions below; a process that holds all tokens answers them as
they stand here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch

from wan21.attention import Attention
from wan21.dit.residual import Outs, Produce, Window, chunks, collect


class Brought(ABC):
    """Queries, keys or values of tokens here and elsewhere, which may still be on their way."""

    @abstractmethod
    def here(self) -> torch.Tensor:
        """[B, Lk, n, K]; what the current stream does next comes after their arrival."""


class AtHand(Brought):
    """What has been here from the beginning."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def here(self) -> torch.Tensor:
        return self._tensor


class Tokens:
    """The tokens that this process holds: all of them.

    exchanges: whether `collect` and `read` speak with other processes.
    """

    exchanges: ClassVar[bool] = False

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:  # noqa: ARG002 # all of them, along any dimension
        """Of something with all tokens along `dim`, this process's."""
        return x

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """From what all processes have for their tokens, [B, rows, ...], to all tokens, [B, L, ...]."""
        return x

    def num_groups(self, num_heads: int) -> int:  # noqa: ARG002 # they stay together
        """Into how many groups heads are written, each of which lies in a place of its own."""
        return 1

    def warm_up(self, like: torch.Tensor) -> None:
        """Has everything compiled that is used between processes.

        Args:
            like: heads of some tokens, [B, rows, N, K].
        """

    def window(self, size: int) -> int:
        """How many rows to handle at once around attention, `size` at most."""
        return size

    def room(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
        """For what is brought together, of as many bytes as there are here before, uninitialised.

        Args:
            count: of such things, such as keys and values.
            shape: of one of them for this process's tokens, [B, rows, N, K].
            like: of the same dtype and device.

        Returns:
            [count, B, Lk, n, K], or, in G groups of heads, [count, B, Lk, G, N / G, K].
        """
        return like.new_empty((count, *shape))

    def collect(self, parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[Brought, ...]:
        """Brings together what is made of consecutive windows, here and elsewhere.

        Args:
            parts: the windows.
            produce: what makes the results of a window, one after the other, [B, rows, N, K] each, or, where it is
                given room for that, in groups of heads, [B, rows, G, N / G, K].
            wholes: for the results of all windows, as in `room`: values, keys and perhaps queries, or queries alone.
                None where gradients are kept, and there is one window.

        Returns:
            One for each result, in their order.
        """
        return tuple(map(AtHand, collect(parts, produce, wholes)))

    def read(self, attention: Attention, q: Brought, k: Brought, v: Brought, size: int) -> Iterator[Window]:
        """What this process's tokens read from all others.

        Args:
            attention: the kernel.
            q: queries, which are let go when they have been used; nobody else should hold them.
            k: keys.
            v: values.
            size: rows of a window.

        Yields:
            All heads of consecutive tokens, [B, rows, N * K], at most `size` of them at a time.
        """
        attended = attention(q.here(), k.here(), v.here())
        del q  # or they would stand beside the windows
        yield from chunks(attended, size)


ALL = Tokens()
