"""Compiles the kernels that decoding will launch, before anybody looks at the clock.

Which ones these are is not written down a second time: decoding runs on tensors without data, its launches are noted,
and those that differ in more than height and width run once on tiny tensors.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from wan21.config import VaeConfig
from wan21.vae.plan import DecodePlan
from wan21.vae.vae import Vae

NUM_LATENT_FRAMES = 3
"""The first, one that has a single frame before it, and one like all that follow."""

LATENT_SIDE = 2

MOST_THREADS = 8

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


@cache
def warm_up(config: VaeConfig, dtype: torch.dtype, device: torch.device, frames_at_once: int | None = None) -> None:
    """Compiles, or takes from Triton's cache on disk, all that decoding with `kernels="fused"` launches.

    Memory: some 16 MiB of weights for each of a few threads; nothing stays but the kernels.

    Args:
        config: sizes of the VAE.
        dtype: its number format.
        device: where it will run.
        frames_at_once: of the plan by which it will decode.
    """

    def real(value: object) -> object:
        return torch.zeros_like(value, device=device) if isinstance(value, Tensor) else value

    def launch(one: Launch) -> None:
        func, args = one
        func(*tree_map(real, args))

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(torch.no_grad()(launch), launches(config, dtype, frames_at_once)))
