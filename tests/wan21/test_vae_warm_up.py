"""What is compiled ahead of use is what decoding launches."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.wan21.vae_examples import random_latents, random_vae
from wan21.kernels import vae_ops
from wan21.models import VaeConfig
from wan21.runtime import CpuRuntime
from wan21.vae import DecodePlan
from wan21.vae.warm_up import launches, warm_up


def kind(window: list[Tensor], weight: Tensor, *rest: Any, adds: bool, upsamples: bool) -> tuple[Any, ...]:
    """All on which the choice of a kernel rests."""
    _, gamma, out, normed, *_ = rest
    num_frames = len(normed) if out is None else out.shape[2]
    return (*weight.shape, num_frames, gamma is None, out is None, len(normed), adds, upsamples)


@pytest.mark.parametrize("frames_at_once", [None, 1])
def test_every_kernel_that_decoding_launches_was_launched_before(
    monkeypatch: pytest.MonkeyPatch, frames_at_once: int | None
) -> None:
    vae = random_vae(8)
    vae.decoder.kernels = "fused"
    seen: set[tuple[Any, ...]] = set()
    original: Callable[..., None] = vae_ops.conv

    def look(*args: Any, **flags: bool) -> None:
        seen.add(kind(*args, **flags))
        original(*args, **flags)

    monkeypatch.setattr(vae_ops, "conv", look)
    with torch.no_grad():
        # More tiles and more frames than the warm-up looks at.
        plan = DecodePlan(num_tile_rows=2, num_tile_cols=2, frames_at_once=frames_at_once)
        vae.decode(random_latents(1, 16, 5, 4, 6), plan)
    decoding = set(seen)
    seen.clear()
    found = launches(VaeConfig(base_dim=8), torch.float32, frames_at_once)
    assert seen == decoding
    assert sum("vae_conv" in str(func) for func, _ in found) == len(decoding)


class Ahead(CpuRuntime):
    """Runs at once what is to run ahead."""

    def run_ahead(self, launches: Iterable[Callable[[], object]]) -> None:
        for launch in launches:
            launch()


def test_warming_up_launches_each_of_them_on_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def launch(*args: Any) -> None:
        calls.append(args)

    frames = [torch.empty(1, 8, 2, 2, device="meta").contiguous(memory_format=torch.channels_last)]
    monkeypatch.setattr("wan21.vae.warm_up.launches", lambda *_: [(launch, (frames, None, True)), (launch, (3,))])
    warm_up(VaeConfig(base_dim=8), torch.float32, Ahead(), 1)
    (given, *rest), number = sorted(calls, key=len, reverse=True)
    assert [frame.device.type for frame in given] == ["cpu"]
    assert given[0].is_contiguous(memory_format=torch.channels_last)
    assert (rest, number) == ([None, True], (3,))
