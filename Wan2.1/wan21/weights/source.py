"""One way to get weights, whatever they come from."""

from typing import Protocol

import torch


class WeightSource(Protocol):
    """The named weights of one component, written where they shall live.

    There is never a second copy: a source writes into memory that the caller made, on any device and in any dtype, and
    stages at most STAGING_BYTES on the way.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name with its shape, as in the checkpoint file."""

    def write(self, name: str, destination: torch.Tensor) -> None:
        """Fills the destination, contiguous and of the weight's shape, with the weight, cast to its dtype."""

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        """Fills the destination, flat, with the weight's elements from `first` on, cast to its dtype."""

    def close(self) -> None:
        """Lets go of files and mapped memory."""


STAGING_BYTES = 64 * 2**20
