"""Compiles the kernels that decoding will launch, before anybody looks at the clock.

Which ones these are is not written down a second time: decoding runs on tensors without data, its launches are noted,
and those that differ in more than height and width run once on tiny tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from wan21.models import VaeConfig
from wan21.runtime import Runtime
from wan21.vae.plan import DecodePlan
from wan21.vae.vae import Vae

NUM_LATENT_FRAMES = 3
"""The first, one that has a single frame before it, and one like all that follow."""

LATENT_SIDE = 2

Launch: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]


class _Launches(TorchDispatchMode):
    """Notes calls of our operators, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Launch] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if str(func).startswith("wan21."):
            # How many frames the first argument has in front of the chunk is not part of a kernel.
            self.found.setdefault(f"{func} {tree_map(_kind, args[1:])}", (func, args))
        return func(*args, **(kwargs or {}))


def _kind(value: object) -> object:
    """What of an argument decides which kernel runs: neither height and width nor where a tile begins."""
    if isinstance(value, Tensor):
        return str(value.shape[:-2] if value.ndim > 2 else value.shape)
    return value if isinstance(value, bool) else None


@torch.no_grad()
def launches(config: VaeConfig, dtype: torch.dtype, frames_at_once: int | None = None) -> list[Launch]:
    """What decoding launches, on tiny tensors without data."""
    with torch.device("meta"):
        vae = Vae(config, dtype=dtype, kernels="fused")
        latents = torch.empty(1, config.z_dim, NUM_LATENT_FRAMES, LATENT_SIDE, LATENT_SIDE)
    with _Launches() as noted:
        for _ in vae.decode_pieces(latents, DecodePlan(frames_at_once=frames_at_once)):
            pass
    return list(noted.found.values())


def warm_up(config: VaeConfig, dtype: torch.dtype, runtime: Runtime, frames_at_once: int | None = None) -> None:
    """Compiles, or takes from Triton's cache on disk, all that decoding with `kernels="fused"` launches.

    Memory: in passing, some 16 MiB of weights for each kernel that is compiled at the same time.

    Args:
        config: sizes of the VAE.
        dtype: its number format.
        runtime: where it will run; without kernels to compile it does nothing.
        frames_at_once: of the plan by which it will decode.
    """

    def real(value: object) -> object:
        return torch.zeros_like(value, device=runtime.device) if isinstance(value, Tensor) else value

    def launch(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        func(*tree_map(real, args))

    def calls() -> Iterator[Callable[[], object]]:
        for func, args in launches(config, dtype, frames_at_once):
            yield partial(launch, func, args)

    runtime.run_ahead(calls())
