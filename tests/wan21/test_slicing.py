"""The pieces into which a forward is cut."""

import math

import pytest

from wan21.attention import ROWS_OF_A_TILE, TILES_AT_ONCE
from wan21.memory.slicing import TEMPORARY_BYTES, choose_queries, choose_rows
from wan21.models import DitConfig, model_spec

SMALL, LARGE = model_spec("t2v-1.3B").dit, model_spec("t2v-14B").dit
TOKENS_480P, TOKENS_720P = 32_760, 75_600


def tiles(rows: int, num_heads: int) -> int:
    return -(-rows // ROWS_OF_A_TILE) * num_heads


def test_slices_that_are_asked_for_are_equal() -> None:
    assert choose_queries(1, TOKENS_480P, SMALL, 2) == TOKENS_480P
    assert choose_queries(5, TOKENS_480P, SMALL, 2) == 6552
    assert choose_queries(7, TOKENS_480P, SMALL, 2) == 4680
    assert choose_queries(1000, 180, SMALL, 2) == 1


@pytest.mark.parametrize("num_tokens", [TOKENS_480P, TOKENS_720P])
@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_slices_of_their_own_choice_fill_whole_rounds(config: DitConfig, num_tokens: int) -> None:
    queries = choose_queries("auto", num_tokens, config, 2)
    assert tiles(queries, config.num_heads) % TILES_AT_ONCE == 0
    assert queries * 2 * 2 * config.dim <= TEMPORARY_BYTES
    assert queries < num_tokens
    # All slices together take no more rounds than one piece, but for the last one's.
    *full, last = [min(queries, num_tokens - first) for first in range(0, num_tokens, queries)]
    rounds = sum(math.ceil(tiles(rows, config.num_heads) / TILES_AT_ONCE) for rows in (*full, last))
    assert rounds <= math.ceil(tiles(num_tokens, config.num_heads) / TILES_AT_ONCE) + 1


def test_a_short_video_is_cut_in_two() -> None:
    assert choose_queries("auto", 180, SMALL, 2) == 90
    assert choose_queries("auto", 1560, LARGE, 2) == 780


def test_rows_that_are_asked_for_are_taken() -> None:
    assert choose_rows(100, TOKENS_480P, SMALL, 2) == 100


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_tokens", [1560, TOKENS_480P, TOKENS_720P])
@pytest.mark.parametrize("config", [SMALL, LARGE])
@pytest.mark.parametrize("has_slots", [False, True])
def test_rows_keep_what_must_be_allocated_within_its_bytes(
    config: DitConfig, num_tokens: int, itemsize: int, *, has_slots: bool
) -> None:
    rows = choose_rows(None, num_tokens, config, itemsize, has_slots=has_slots)
    hidden, slots = rows * config.ffn_dim * itemsize, rows * 12 * config.dim if has_slots else 0
    fits = hidden <= num_tokens * 2 * config.dim * itemsize
    assert (rows * 2 * config.dim * itemsize if fits else hidden) + slots <= TEMPORARY_BYTES
    assert rows % ROWS_OF_A_TILE == 0


def test_longer_videos_pass_in_longer_pieces() -> None:
    assert choose_rows(None, 4096, LARGE, 2) == 4224  # the hidden layer is allocated
    assert choose_rows(None, TOKENS_480P, LARGE, 2) == 8448  # it has room
