"""How many slices attention is cut into."""

from typing import Literal

TOKENS_PER_SLICE = 4096
"""Below this a slice saves little: keys and values of the whole video outweigh it."""


def choose_query_slices(asked: int | Literal["auto"], num_tokens: int) -> int:
    """The number asked for, or for "auto" one slice per 4,096 tokens, and at least two; never more than tokens."""
    slices = max(2, -(-num_tokens // TOKENS_PER_SLICE)) if asked == "auto" else asked
    return min(slices, num_tokens)
