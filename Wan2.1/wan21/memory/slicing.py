"""Into which pieces a forward is cut, where it is left to us."""

import math
from typing import Literal

from wan21.attention import ROWS_OF_A_TILE, TILES_AT_ONCE
from wan21.memory.hosted import NUM_SLOTS
from wan21.models import DitConfig

TEMPORARY_BYTES = 3 * 2**26
"""What the temporaries of a piece shall take: a tenth of what stands beside them, the residual, keys and values."""


def choose_queries(asked: int | Literal["auto"], num_tokens: int, config: DitConfig, itemsize: int) -> int:
    """How many tokens attention reads for at once.

    Args:
        asked: in how many slices, or "auto": at least two.
        num_tokens: L.
        config: sizes of the transformer.
        itemsize: bytes of an element in the compute dtype.

    Returns:
        As many as the slices that are asked for need, or as make whole rounds of tiles: those of a slice's last,
        part-filled round wait for no others. 40 heads of 5,460 queries take 14 rounds of 132 tiles, and 40 heads of
        8,448 just 20.
    """
    if asked != "auto":
        return -(-num_tokens // min(asked, num_tokens))
    most = _in_rounds(TEMPORARY_BYTES // _carried_bytes(config, itemsize), config.num_heads)
    each = -(-num_tokens // max(2, -(-num_tokens // most)))
    in_a_round = _rows_of_a_round(config.num_heads)
    return each if each < in_a_round else -(-each // in_a_round) * in_a_round


def choose_rows(
    asked: int | None, num_tokens: int, config: DitConfig, itemsize: int, *, has_slots: bool = False
) -> int:
    """How many tokens pass through norms and linear layers at once.

    Args:
        asked: the number, if it is not left to us.
        num_tokens: L.
        config: sizes of the transformer.
        itemsize: bytes of an element in the compute dtype.
        has_slots: whether as many of the residual pass through slots of it.

    Returns:
        The number asked for, or one whose temporaries are small. The feed-forward's hidden layer, the widest, lies
        where keys and values were, if it fits there.
    """
    if asked is not None:
        return asked
    carried, hidden = _carried_bytes(config, itemsize), config.ffn_dim * itemsize
    slots = NUM_SLOTS * 4 * config.dim if has_slots else 0
    lent = num_tokens * 2 * config.dim * itemsize // hidden
    beside = TEMPORARY_BYTES // (hidden + slots)
    return _in_rounds(max(beside, min(lent, TEMPORARY_BYTES // (carried + slots))), config.num_heads)


def _carried_bytes(config: DitConfig, itemsize: int) -> int:
    """Of a token: what enters attention or a layer, and what leaves it."""
    return 2 * config.dim * itemsize


def _rows_of_a_round(num_heads: int) -> int:
    """The fewest rows whose tiles of all heads fill whole rounds."""
    return ROWS_OF_A_TILE * TILES_AT_ONCE // math.gcd(TILES_AT_ONCE, num_heads)


def _in_rounds(most: int, num_heads: int) -> int:
    """So many rows at most, in whole rounds, or in whole tiles where that is less than a round; at least a tile."""
    rows = _rows_of_a_round(num_heads)
    unit = rows if most >= rows else ROWS_OF_A_TILE
    return max(1, most // unit) * unit
