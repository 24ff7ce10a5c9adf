"""The networks as things that come to a device and leave it: T5, CLIP, DiT and VAE."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from wan21.attention import choose_attention
from wan21.clip.model import ImageEncoder
from wan21.dit.fp8 import Fp8Operations
from wan21.dit.linear import store_in_eight_bits
from wan21.dit.model import Dit
from wan21.dit.operations import FusedOperations, Operations
from wan21.dit.tokens import Tokens
from wan21.errors import UsageError
from wan21.events import Observer, Span
from wan21.kernels.fp8 import FP8
from wan21.memory.parked import Parked, keep_on_host, parameters_below
from wan21.memory.reading import HostBudget
from wan21.memory.streaming import StreamPlan, Unit, stream
from wan21.models import ModelSpec
from wan21.options import Options, check_capability, check_device
from wan21.parallel.table import own_rows, share_table
from wan21.parallel.world import World
from wan21.parts import InParts, all_in_parts
from wan21.runtime import Runtime
from wan21.text.umt5 import TextEncoder
from wan21.vae.vae import Vae
from wan21.waiting import check_host_budget, check_host_room
from wan21.weights.components import Source, Weights
from wan21.weights.fp8 import ScaledSource
from wan21.weights.load import check_names, materialize, parameter_bytes, put, total_bytes
from wan21.weights.source import WeightSource

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STORED = {"same": None, "fp8": FP8, "fp8_weights": FP8, "int8_weights": torch.int8}
"""What the weights of linear layers are stored in, by linear_format; None: in the compute dtype."""

GIB = 2**30


M = TypeVar("M", bound=nn.Module)
OpenSource = Callable[[], AbstractContextManager[WeightSource]]


@dataclass(frozen=True)
class Component(Generic[M]):
    """A network on its device.

    parked: weights that a run needs once, if they wait on the host.
    """

    module: M
    device: torch.device
    parked: Parked | None = None

    def with_parked(self) -> AbstractContextManager[None]:
        """Inside it all weights that a run needs once are on the device."""
        return nullcontext() if self.parked is None else self.parked.brought_into(self.module)


def make_operations(options: Options, runtime: Runtime) -> Operations:
    """How the transformer's blocks are carried out.

    Raises:
        UsageError: a kernel that this device or number format does not have.
    """
    check_device(options, runtime.device.type)
    if runtime.capability is not None:
        check_capability(options, runtime.capability)
    attention = choose_attention(options.attention_kernel)
    if options.linear_format == "fp8":
        return Fp8Operations(attention)
    if options.kernels == "torch":
        return Operations(attention)
    return FusedOperations(attention)


class Components:
    """Loads components, each inside a span, and lets them go.

    Of several processes all have to load the same components in the same order, but a text encoder that is not shared.

    Raises:
        UsageError: options that this device cannot follow.
    """

    def __init__(
        self, spec: ModelSpec, options: Options, weights: Weights, runtime: Runtime, observer: Observer, world: World
    ) -> None:
        self._spec = spec
        self._options = options
        self._weights = weights
        self._runtime = runtime
        self._observer = observer
        self._world = world
        if runtime.computes:
            check_host_budget(options)
        check_host_room(spec, options, runtime.device.type)
        self._operations = make_operations(options, runtime)
        self._operations.warm_up(spec.dit, DTYPES[options.precision], runtime.device)
        runtime.empty_cache()

    def warm_up(self, tokens: Tokens) -> None:
        """Has everything compiled that the transformer needs where its tokens are shared so."""
        config, dtype, device = self._spec.dit, DTYPES[self._options.precision], self._runtime.device
        self._operations.warm_up_groups(config, dtype, device, tokens.num_groups(config.num_heads))
        tokens.warm_up(torch.zeros((1, 1, 1, config.head_dim), dtype=dtype, device=device))
        self._runtime.empty_cache()

    @property
    def t5_is_shared(self) -> bool:
        """Whether several processes hold parts of the text encoder, so that all of them have to run it."""
        is_streamed = self._options.load_strategy != "full" and self._t5_device == self._runtime.device
        return self._world.size > 1 and (is_streamed or self._options.layout.t5_fsdp)

    @property
    def _t5_device(self) -> torch.device:
        return torch.device("cpu") if self._options.t5_cpu else self._runtime.device

    def t5(self) -> Component[TextEncoder]:
        """The text encoder, on the CPU if t5_cpu."""
        dtype, device = DTYPES[self._options.t5_precision], self._t5_device
        with torch.device("meta"):
            module = TextEncoder(self._spec.text, dtype=dtype)
        if self._options.layout.t5_fsdp:
            blocks, tables = all_in_parts(module.blocks), ["token_embedding"]
            return self._shard("t5", module, self._weights.t5, blocks, tables=tables, entrances=["encode"])
        if self._options.load_strategy == "full" or device != self._runtime.device:
            return self._load("t5", module, self._weights.t5, device)
        named = numbered("blocks", module.blocks)
        return self._stream("t5", module, self._weights.t5, named, tables=["token_embedding"])

    def clip(self) -> Component[ImageEncoder]:
        """The image encoder, without what is never run.

        Raises:
            UsageError: the task looks at no pictures.
        """
        if self._spec.clip is None:
            raise UsageError(f"{self._spec.name} looks at no pictures and has no clip")
        dtype = DTYPES[self._options.clip_precision]
        with torch.device("meta"):
            stored, module = (ImageEncoder(self._spec.clip, dtype=dtype) for _ in range(2))
        module.drop_unread()
        if self._options.load_strategy == "full":
            return self._load("clip", module, self._weights.clip, self._runtime.device, stored)
        blocks = numbered("transformer", module.blocks)
        return self._stream("clip", module, self._weights.clip, blocks, stored=stored)

    def dit(self) -> Component[Dit]:
        """The transformer."""
        with torch.device("meta"):
            module = Dit(self._spec.dit, dtype=DTYPES[self._options.precision], operations=self._operations)
            stored = STORED[self._options.linear_format]
            scaled = () if stored is None else store_in_eight_bits(module.sequence(), stored)

        def source() -> Source:
            weights = self._weights.dit()
            return weights if stored is None else ScaledSource(weights, scaled, self._runtime.device, stored)

        if self._options.layout.dit_fsdp:
            blocks, entrances = all_in_parts(module.sequence().values()), ["embed_text", "embed_pictures", "embed_time"]
            return self._shard("dit", module, source, blocks, once=Dit.ONCE, entrances=entrances)
        if self._options.load_strategy == "full":
            return self._load("dit", module, source, self._runtime.device)
        return self._stream("dit", module, source, module.sequence(), once=Dit.ONCE)

    def vae(self, *, encodes: bool) -> Component[Vae]:
        """The VAE: the decoder, and the encoder if something will be encoded."""
        dtype = DTYPES[self._options.vae_precision]
        with torch.device("meta"):
            stored, module = (Vae(self._spec.vae, dtype=dtype, kernels=self._options.kernels) for _ in range(2))
        if not encodes:
            module.drop_encoder()
        return self._load("vae", module, self._weights.vae, self._runtime.device, stored)

    def _load(
        self, name: str, module: M, open_source: OpenSource, device: torch.device, stored: nn.Module | None = None
    ) -> Component[M]:
        """Brings a module to a device.

        Args:
            name: of the component.
            module: on the meta device.
            open_source: of its weights.
            device: where they go.
            stored: the module as it is stored, if something of that is not needed.
        """
        on_device = parameter_bytes(module) if device == self._runtime.device else 0
        # Files are opened and closed inside the span: on a CPU, what is mapped counts as allocated.
        with self._observer.span(Span(kind="component", name=name, expected_bytes=on_device)), open_source() as source:
            check_names(stored or module, source)
            materialize(module, source, device)
        return Component(module, device)

    def _shard(
        self,
        name: str,
        module: M,
        open_source: OpenSource,
        blocks: Sequence[InParts],
        *,
        once: Sequence[str] = (),
        tables: Sequence[str] = (),
        entrances: Sequence[str] = (),
    ) -> Component[M]:
        """Brings this process's share of everything to the device.

        Args:
            name: of the component.
            module: on the meta device.
            open_source: of its weights.
            blocks: of the module.
            once: submodules that a run needs once.
            tables: submodules that look up.
            entrances: methods by which the module is used beside `forward`.
        """
        from wan21.parallel.sharding import fill_shares, shard, share_bytes

        device, line = self._runtime.device, self._world.line
        if line is None:
            raise UsageError(
                f"{name}_fsdp=true shards weights over processes, and there is one; connect several, or choose false"
            )
        self._share_tables(module, open_source, tables)
        others = [child for name, child in module.named_children() if name in once]
        shard(module, blocks, others=others, entrances=entrances, line=line)
        expected = share_bytes(module)
        with self._observer.span(Span(kind="component", name=name, expected_bytes=expected)), open_source() as source:
            fill_shares(module, source.write_part, device)
        module.eval()
        return Component(module, device)

    def _share_tables(
        self, module: nn.Module, open_source: OpenSource, tables: Sequence[str], stored: nn.Module | None = None
    ) -> None:
        """Of several processes each will have some rows of these tables. The module's names are checked while whole."""
        with open_source() as source:
            check_names(stored or module, source)
        for table in tables if self._world.size > 1 else ():
            share_table(module, table, self._world.everyone, self._runtime.device)

    def _stream(
        self,
        name: str,
        module: M,
        open_source: OpenSource,
        blocks: Mapping[str, nn.Module],
        *,
        once: Sequence[str] = (),
        tables: Sequence[str] = (),
        stored: nn.Module | None = None,
    ) -> Component[M]:
        """Brings the blocks to the host and the rest to the device; of several processes each its share of the blocks.

        Args:
            name: of the component.
            module: on the meta device.
            open_source: of its weights.
            blocks: of the module, by their names in it and in the order in which they are run.
            once: submodules that a run needs once; with load_strategy=part they wait on the host.
            tables: submodules that look up; with load_strategy=part they stay on the host.
            stored: the module as it is stored, if something of that is not needed.
        """
        runtime, by_parts, group = self._runtime, self._options.load_strategy == "part", self._world.everyone
        self._share_tables(module, open_source, tables, stored)
        aside = (*once, *tables) if by_parts else ()
        names, in_parts = list(blocks), all_in_parts(blocks.values())
        unit: Unit = "part" if by_parts else "block"
        plan = StreamPlan(in_parts, unit, int(self._options.resident_gib * GIB), num_shares=group.size)
        own, elsewhere = own_rows(module), parameters_below(module, [*names, *aside])
        on_device = parameter_bytes(module) - total_bytes(elsewhere.values()) + plan.device_bytes
        with self._observer.span(Span(kind="component", name=name, expected_bytes=on_device)), open_source() as source:

            def write(name: str, to: torch.Tensor, first: int) -> None:
                source.write_part(name, to, own[name][1] + first)

            for parameter_name, (part, _) in own.items():
                if parameter_name not in elsewhere:
                    weight = torch.empty(part.shape, dtype=part.dtype, device=runtime.device)
                    write(parameter_name, weight.view(-1), 0)
                    put(module, parameter_name, weight)
            before = runtime.host_buffer_bytes()
            for table in tables if by_parts else ():
                keep_on_host(module, table, write, runtime)
            parked = Parked(module, once, write, runtime, group) if by_parts and once else None
            budget = self._host_budget(open_source, own, names, taken=runtime.host_buffer_bytes() - before)
            stream(
                in_parts, plan, lambda index, leaf, *to: write(f"{names[index]}.{leaf}", *to), runtime, group, budget
            )
        module.eval()
        return Component(module, runtime.device, parked)

    def _host_budget(
        self, open_source: OpenSource, own: Mapping[str, tuple[torch.Tensor, int]], names: Sequence[str], *, taken: int
    ) -> HostBudget | None:
        """What a component's streamed blocks may take of pinned host memory.

        Args:
            open_source: of its weights.
            own: by name, this process's part of each parameter, and the number of its first element.
            names: of the blocks.
            taken: bytes of it that wait there already.
        """
        if self._options.host_budget_gib is None:
            return None

        @contextmanager
        def opened() -> Iterator[Callable[[int, str, torch.Tensor, int], None]]:
            with open_source() as source:

                def write(index: int, leaf: str, to: torch.Tensor, first: int) -> None:
                    name = f"{names[index]}.{leaf}"
                    source.write_part(name, to, own[name][1] + first)

                yield write

        return HostBudget(int(self._options.host_budget_gib * GIB) - taken, opened)


def numbered(owner: str, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The blocks in a list of a module, by their names in the module."""
    return {f"{owner}.{index}": block for index, block in enumerate(blocks)}


class ObservedBlocks:
    """Blocks, each inside a span of its own; for listeners that want to know about blocks."""

    def __init__(self, blocks: Iterable[nn.Module], observer: Observer) -> None:
        self._blocks = blocks
        self._observer = observer

    def __iter__(self) -> Iterator[nn.Module]:
        for index, block in enumerate(self._blocks):
            with self._observer.span(Span(kind="block", name="block", index=index)):
                yield block


def blocks_to_run(
    component: Component[TextEncoder] | Component[ImageEncoder] | Component[Dit], runtime: Runtime, observer: Observer
) -> Iterable[nn.Module]:
    """The component's blocks, observed if the observer wants that."""
    module = component.module
    blocks: Iterable[nn.Module] = module.sequence().values() if isinstance(module, Dit) else module.blocks
    if component.device == runtime.device:
        blocks = runtime.as_run(blocks)
    return ObservedBlocks(blocks, observer) if observer.wants_blocks else blocks
