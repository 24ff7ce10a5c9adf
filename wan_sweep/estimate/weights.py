"""Weights that are never drawn: their sources allocate on the device what the real ones stage there."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from wan21.models import ModelSpec
from wan21.runtime import Runtime
from wan21.weights.components import Source
from wan21.weights.random import RandomWeights
from wan21.weights.staging import pieces
from wan_sweep.estimate.memory import DeviceMemory, Holding

Shapes = Mapping[str, tuple[int, ...]]


@functools.cache
def _shapes(spec: ModelSpec) -> Mapping[str, Shapes]:
    """Names and shapes of each component's weights; what they come from is built once, however often they are asked."""
    drawn = RandomWeights(spec, 0, lambda _: torch.Generator())
    sources = {"dit": drawn.dit(), "t5": drawn.t5(), "vae": drawn.vae()}
    if spec.clip is not None:
        sources["clip"] = drawn.clip()
    return {name: source.shapes() for name, source in sources.items()}


class UndrawnWeights:
    """Stands in for RandomWeights, whose draws are most of what a fake load would spend its time on.

    To be made outside of the run, where torch builds modules faster.

    Args:
        spec: the task.
        runtime: on whose device they would be drawn.
        memory: where pieces that are staged get another label than weights.
    """

    def __init__(self, spec: ModelSpec, runtime: Runtime, memory: DeviceMemory) -> None:
        self._shapes = _shapes(spec)
        self._device = runtime.device
        self._memory = memory

    def dit(self) -> "UndrawnSource":
        """Weights of the diffusion transformer."""
        return self._source("dit")

    def t5(self) -> "UndrawnSource":
        """Weights of the text encoder."""
        return self._source("t5")

    def clip(self) -> "UndrawnSource":
        """Weights of the image tower of CLIP."""
        return self._source("clip")

    def vae(self) -> "UndrawnSource":
        """Weights of the VAE."""
        return self._source("vae")

    def _source(self, component: str) -> "UndrawnSource":
        return UndrawnSource(self._shapes[component], self._device, self._memory)


class UndrawnSource(Source):
    """One component; names and shapes are those of the real source."""

    def __init__(self, shapes: Shapes, device: torch.device, memory: DeviceMemory) -> None:
        self._shapes = shapes
        self._device = device
        self._memory = memory

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        """Leaves the destination as it is.

        Memory: that of RandomSource, piece by piece, those before `first` included; as there, a piece goes when the
        next one has come. It is taken without a tensor, which would be most of the work.
        """
        stop = first + destination.numel()
        is_cast = destination.device != self._device and destination.dtype != torch.float32
        held = None
        with self._memory.at(replace(self._memory.place, component="")):
            for piece in pieces(math.prod(self.shape(name)), 8):
                if piece.start >= stop:
                    break
                drawn = self._take(piece.stop - piece.start, torch.float32, "aten.empty.memory_format")
                if held is not None:
                    self._memory.give(held)
                held = drawn
                if is_cast and piece.stop > first:
                    num_cast = min(piece.stop, stop) - max(piece.start, first)
                    self._memory.give(self._take(num_cast, destination.dtype, "aten._to_copy.default"))
            if held is not None:
                self._memory.give(held)

    def _take(self, num_elements: int, dtype: torch.dtype, operation: str) -> int:
        num_bytes = num_elements * dtype.itemsize
        shape = (num_elements,)
        return self._memory.take(Holding(num_bytes, operation, self._memory.place, shape=shape, dtype=dtype))
