"""Weights that are never drawn: their sources allocate on the device what the real ones stage there."""

import math
from dataclasses import replace

import torch

from wan21.config import ModelSpec
from wan21.runtime import Runtime
from wan21.weights.components import Source
from wan21.weights.random import RandomWeights
from wan21.weights.staging import pieces
from wan_sweep.estimate.memory import DeviceMemory


class UndrawnWeights:
    """Stands in for RandomWeights, whose draws are most of what a fake load would spend its time on.

    Args:
        spec: the task.
        runtime: on whose device they would be drawn.
        memory: where pieces that are staged get another label than weights.
    """

    def __init__(self, spec: ModelSpec, runtime: Runtime, memory: DeviceMemory) -> None:
        self._weights = RandomWeights(spec, 0, runtime.generator)
        self._device = runtime.device
        self._memory = memory

    def dit(self) -> "UndrawnSource":
        """Weights of the diffusion transformer."""
        return UndrawnSource(self._weights.dit(), self._device, self._memory)

    def t5(self) -> "UndrawnSource":
        """Weights of the text encoder."""
        return UndrawnSource(self._weights.t5(), self._device, self._memory)

    def clip(self) -> "UndrawnSource":
        """Weights of the image tower of CLIP."""
        return UndrawnSource(self._weights.clip(), self._device, self._memory)

    def vae(self) -> "UndrawnSource":
        """Weights of the VAE."""
        return UndrawnSource(self._weights.vae(), self._device, self._memory)


class UndrawnSource(Source):
    """One component; names and shapes are those of the real source."""

    def __init__(self, source: Source, device: torch.device, memory: DeviceMemory) -> None:
        self._source = source
        self._device = device
        self._memory = memory

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._source.shapes()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        """Leaves the destination as it is.

        Memory: that of RandomSource, piece by piece, those before `first` included; as there, a piece goes when the
        next one has come.
        """
        stop = first + destination.numel()
        with self._memory.at(replace(self._memory.place, component="")):
            for piece in pieces(math.prod(self.shape(name)), 8):
                if piece.start >= stop:
                    break
                drawn = torch.empty(piece.stop - piece.start, dtype=torch.float32, device=self._device)
                if destination.device != self._device and piece.stop > first:
                    part = slice(max(piece.start, first) - piece.start, min(piece.stop, stop) - piece.start)
                    drawn[part].to(destination.dtype)
