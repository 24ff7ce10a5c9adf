"""What layers take: the words in which `wan21.vae.budget` counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import nn

Positions: TypeAlias = Mapping[nn.Module, int]
"""By layer, how many positions of a frame it computes."""


@dataclass(frozen=True)
class Need:
    """What a layer, or several in a row, take: numbers that stay, numbers at most in passing, multiply-adds."""

    past: int
    passing: int
    macs: int

    def then(self, other: "Need") -> "Need":
        """This and then the other."""
        return Need(self.past + other.past, max(self.passing, other.passing), self.macs + other.macs)


NOTHING = Need(0, 0, 0)


def macs_of(conv: nn.Module, positions: int) -> int:
    """Multiply-adds of a convolution at so many positions."""
    return cast("nn.Conv3d", conv).weight.numel() * positions
