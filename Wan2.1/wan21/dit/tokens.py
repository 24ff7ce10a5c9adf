"""Which of a video's tokens this process works on, and how self attention reaches the others.

Letters: B videos, L tokens, N heads, K head width; Lk keys and n heads that attention sees here at a time.

Everything but self attention looks at one token at a time. So a process may hold some tokens only, if somebody brings
queries, keys and values together. The network asks the questions below; a process that holds all tokens answers them as
they stand here.
"""

from collections.abc import Iterable, Iterator

import torch

from wan21.attention import Attention
from wan21.dit.residual import Outs, Produce, Window, chunks, collect


class Tokens:
    """The tokens that this process holds: all of them."""

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:  # noqa: ARG002 # all of them, along any dimension
        """Of something with all tokens along `dim`, this process's."""
        return x

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """From what all processes have for their tokens, [B, rows, ...], to all tokens, [B, L, ...]."""
        return x

    def room(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
        """For what is brought together, of as many bytes as there are here before, uninitialised.

        Args:
            count: of such things, such as keys and values.
            shape: of one of them for this process's tokens, [B, rows, N, K].
            like: of the same dtype and device.

        Returns:
            [count, B, Lk, n, K].
        """
        return like.new_empty((count, *shape))

    def collect(self, parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[torch.Tensor, ...]:
        """Brings together what is made of consecutive windows, here and elsewhere.

        Args:
            parts: the windows.
            produce: what makes the results of a window, [B, rows, N, K] each.
            wholes: for the results of all windows, as in `room`; None where gradients are kept, and there is one
                window.

        Returns:
            [B, Lk, n, K] each.
        """
        return collect(parts, produce, wholes)

    def attend(self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of collected queries to collected keys and values by this kernel: [B, Lq, n * K]."""
        return attention(q, k, v)

    def give_back(self, attended: torch.Tensor, size: int) -> Iterator[Window]:
        """What attention gave for this process's tokens, all heads of them: windows [B, rows, N * K], `size` rows each.

        Args:
            attended: from `attend`.
            size: rows of a window.
        """
        return chunks(attended, size)


ALL = Tokens()
