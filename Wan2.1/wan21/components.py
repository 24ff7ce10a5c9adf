"""The three networks as things that come to a device and leave it: T5, DiT and VAE."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from wan21.config import ModelSpec, Options
from wan21.dit.model import Dit
from wan21.events import Observer, Span
from wan21.memory.streaming import StreamedBlocks
from wan21.runtime import Runtime
from wan21.text.umt5 import TextEncoder
from wan21.vae.vae import Vae
from wan21.weights.components import Weights
from wan21.weights.load import check_names, materialize, parameter_bytes
from wan21.weights.source import WeightSource

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Component(Generic[M]):
    """A network on its device.

    streamed: what to run in place of the network's own blocks, which are not there; None if they are.
    """

    module: M
    device: torch.device
    streamed: StreamedBlocks | None = None


class Components:
    """Loads components, each inside a span, and lets them go."""

    def __init__(
        self, spec: ModelSpec, options: Options, weights: Weights, runtime: Runtime, observer: Observer
    ) -> None:
        self._spec = spec
        self._options = options
        self._weights = weights
        self._runtime = runtime
        self._observer = observer

    def t5(self) -> Component[TextEncoder]:
        """The text encoder, on the CPU if t5_cpu."""
        dtype = DTYPES[self._options.t5_precision]
        device = torch.device("cpu") if self._options.t5_cpu else self._runtime.device
        return self._load("t5", lambda: TextEncoder(self._spec.text, dtype=dtype), self._weights.t5, device)

    def dit(self) -> Component[Dit]:
        """The transformer."""
        dtype = DTYPES[self._options.precision]
        return self._load("dit", lambda: Dit(self._spec.dit, dtype=dtype), self._weights.dit, self._runtime.device)

    def vae(self) -> Component[Vae]:
        """The VAE, encoder and decoder."""
        dtype = DTYPES[self._options.vae_precision]
        return self._load("vae", lambda: Vae(self._spec.vae, dtype=dtype), self._weights.vae, self._runtime.device)

    def _load(
        self,
        name: str,
        build: Callable[[], M],
        open_source: Callable[[], AbstractContextManager[WeightSource]],
        device: torch.device,
    ) -> Component[M]:
        with torch.device("meta"):
            module = build()
        blocks = getattr(module, "blocks", None)
        may_stream = self._options.load_strategy == "block" and device == self._runtime.device
        if may_stream and isinstance(blocks, nn.ModuleList):
            return Component(module, device, self._stream(name, module, blocks, open_source))
        on_device = parameter_bytes(module) if device == self._runtime.device else 0
        # Files are opened and closed inside the span: on a CPU, what is mapped counts as allocated.
        with self._observer.span(Span(kind="component", name=name, expected_bytes=on_device)), open_source() as source:
            check_names(module, source)
            materialize(module, source, device)
        return Component(module, device)

    def _stream(
        self,
        name: str,
        module: nn.Module,
        blocks: nn.ModuleList,
        open_source: Callable[[], AbstractContextManager[WeightSource]],
    ) -> StreamedBlocks:
        """Brings everything but the blocks to the device, and the blocks to the host."""
        pattern, num_blocks = blocks[0], len(blocks)
        packed = StreamedBlocks.device_bytes_for(pattern, num_blocks)
        on_device = parameter_bytes(module) - parameter_bytes(blocks) + packed
        with self._observer.span(Span(kind="component", name=name, expected_bytes=on_device)), open_source() as source:
            check_names(module, source)
            module.blocks = nn.ModuleList()  # they stay on the meta device, where they serve as a pattern
            materialize(module, source, self._runtime.device)
            return StreamedBlocks(
                lambda: copy.deepcopy(pattern),
                num_blocks,
                lambda index, leaf, to: source.write(f"blocks.{index}.{leaf}", to),
                self._runtime,
            )


class ObservedBlocks:
    """Blocks, each inside a span of its own; for listeners that want to know about blocks."""

    def __init__(self, blocks: Iterable[nn.Module], observer: Observer) -> None:
        self._blocks = blocks
        self._observer = observer

    def __iter__(self) -> Iterator[nn.Module]:
        for index, block in enumerate(self._blocks):
            with self._observer.span(Span(kind="block", name="block", index=index)):
                yield block


def blocks_to_run(component: Component[TextEncoder] | Component[Dit], observer: Observer) -> Iterable[nn.Module]:
    """The component's blocks, streamed or its own, observed if the observer wants that."""
    blocks: Iterable[nn.Module] = component.module.blocks if component.streamed is None else component.streamed
    return ObservedBlocks(blocks, observer) if observer.wants_blocks else blocks
