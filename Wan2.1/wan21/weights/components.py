"""The weights of a whole model, component by component, whatever they come from."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Protocol, Self

import torch

from wan21.errors import CheckpointError


class Source(ABC):
    """A WeightSource that a `with` statement closes."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name with its shape, as in the checkpoint file."""

    def write(self, name: str, destination: torch.Tensor) -> None:
        """Fills the destination, contiguous and of the weight's shape, with the weight, cast to its dtype."""
        require_shape(name, self.shape(name), destination)
        self.write_part(name, destination.detach().view(-1), 0)

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight of this name, as in the checkpoint file."""

    @abstractmethod
    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        """Fills the destination, flat, with the weight's elements from `first` on, cast to its dtype."""

    def close(self) -> None:  # noqa: B027 # a source that holds nothing open has nothing to do
        """Lets go of files and mapped memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Weights(Protocol):
    """The sources of the components. Each call opens a new one, which the caller closes."""

    def dit(self) -> Source:
        """Weights of the diffusion transformer."""

    def t5(self) -> Source:
        """Weights of the text encoder."""

    def clip(self) -> Source:
        """Weights of the image tower of CLIP, for tasks that look at pictures."""

    def vae(self) -> Source:
        """Weights of the VAE."""


class PartOf(Source):
    """The tensors of another source whose names begin with a prefix, under what follows it."""

    def __init__(self, whole: Source, prefix: str) -> None:
        self._whole = whole
        self._prefix = prefix

    def shapes(self) -> dict[str, tuple[int, ...]]:
        prefix = self._prefix
        return {
            name.removeprefix(prefix): shape for name, shape in self._whole.shapes().items() if name.startswith(prefix)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(f"{self._prefix}{name}")

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        self._whole.write_part(f"{self._prefix}{name}", destination, first)

    def close(self) -> None:
        self._whole.close()


def require_shape(name: str, shape: tuple[int, ...], destination: torch.Tensor) -> None:
    """Refuses a destination of another shape.

    Raises:
        CheckpointError: names the tensor and both shapes.
    """
    if tuple(destination.shape) != shape:
        raise CheckpointError(
            f"tensor {name} is stored as {list(shape)} and was to be written as {list(destination.shape)}; "
            "use the architecture that the weights were made for"
        )
