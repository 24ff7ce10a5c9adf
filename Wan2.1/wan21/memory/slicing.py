"""Into how many pieces a forward is cut, where it is left to us."""

from typing import Literal

TEMPORARY_BYTES = 2**27
"""What the temporaries of a piece shall take: some hundredths of what stands beside them, the residual, keys and
values. Larger pieces make kernels that fill the chip: with FlashAttention-3 an eighth of 32,760 queries runs at 90 % of
the rate of all."""

GRAIN = 128
"""Rows of a tile in matrix products; a piece is a multiple of it."""


def choose_query_slices(asked: int | Literal["auto"], num_tokens: int, token_bytes: int) -> int:
    """The number of slices asked for, never more than tokens; for "auto" at least two, of a fitting size.

    Args:
        asked: the number, or "auto".
        num_tokens: L.
        token_bytes: of a token's query, in all heads. Its output takes as much again.
    """
    slices = max(2, -(-num_tokens // _rows(2 * token_bytes))) if asked == "auto" else asked
    return min(slices, num_tokens)


def choose_rows(asked: int | None, hidden_bytes: int) -> int:
    """The number of rows asked for; without one a fitting number.

    Args:
        asked: the number.
        hidden_bytes: of a token in the feed-forward's hidden layer, the widest there is.
    """
    return _rows(hidden_bytes) if asked is None else asked


def _rows(row_bytes: int) -> int:
    return max(1, TEMPORARY_BYTES // row_bytes // GRAIN) * GRAIN
