"""What a plan costs with kernels of our own: whole rounds of programs, and what that makes of the choice of tiles."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan21.kernels.vae_blocks import MULTIPROCESSORS, blocks_for, programs_at_once
from wan21.models import WAN_VAE, VaeConfig
from wan21.options import Kernels
from wan21.vae import WHOLE, Budget, DecodePlan, Vae
from wan21.vae.decoder import Decoder
from wan21.vae.fused_budget import Launch

H, W = 12, 20
SMALL = (21, 60, 104)


def grid(rows: int, cols: int, frames_at_once: int | None = None) -> DecodePlan:
    return DecodePlan(num_tile_rows=rows, num_tile_cols=cols, frames_at_once=frames_at_once)


def decoder(kernels: Kernels) -> Decoder:
    with torch.device("meta"):
        return Decoder(WAN_VAE, dtype=torch.bfloat16, kernels=kernels)


class Launched(TorchDispatchMode):
    """Adds up what there would be time for while convolutions of ours run."""

    macs = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if "vae_conv" in str(func):
            _, weight, _, _, out, normed, *_ = args
            num_frames = len(normed) if out is None else out.shape[2]
            height, width = (normed[0] if out is None else out).shape[-2:]
            c_out, c_in = weight.shape[:2]
            blocks = blocks_for(c_in, c_out, num_frames, weight.itemsize)
            channels = sum(blocks.channels)
            programs = -(-height // blocks.tile_h) * -(-width // blocks.tile_w) * -(-c_out // channels)
            programs *= num_frames // blocks.frames
            macs = blocks.frames * blocks.tile_h * blocks.tile_w * min(channels, c_out) * weight[0].numel()
            self.macs += -(-programs // programs_at_once(blocks)) * programs_at_once(blocks) * macs
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", [WHOLE, grid(2, 3), grid(1, 2, 1)], ids=str)
def test_the_cost_of_a_plan_is_that_of_what_it_launches(plan: DecodePlan) -> None:
    with torch.device("meta"):
        vae = Vae(VaeConfig(base_dim=32), dtype=torch.bfloat16, kernels="fused")
        latents = torch.empty(1, WAN_VAE.z_dim, 2, H, W)
    counted = 0
    with torch.no_grad(), Launched() as launched:
        for piece in vae.decode_pieces(latents, plan):
            counted += launched.macs if piece.frames.start else 0  # the first one is shorter
            launched.macs = 0
    assert Budget(vae.decoder, (2, H, W), itemsize=2).cost(plan) == counted


def test_a_launch_takes_whole_rounds() -> None:
    blocks = blocks_for(192, 192, 4, 2)
    assert programs_at_once(blocks) == MULTIPROCESSORS
    launch = Launch(layer=torch.nn.Identity(), blocks=blocks, num_parts=2, times=3, macs=10)
    one = 3 * MULTIPROCESSORS * 10
    assert [launch.macs_of(places) for places in (1, 66, 67, 132, 133)] == [one, one, 2 * one, 2 * one, 3 * one]


def test_of_plans_with_equal_work_the_one_that_fills_the_chip_is_taken() -> None:
    budgets = {kernels: Budget(decoder(kernels), SMALL, itemsize=2) for kernels in ("torch", "fused")}
    five, six = grid(1, 5), grid(2, 3)
    fused = budgets["fused"]
    assert fused.work(five) == pytest.approx(fused.work(six), rel=0.01)
    assert fused.cost(five) < 0.9 * fused.cost(six)
    assert fused.best_plan(0.69 * 2**30) == five
    plain = budgets["torch"]
    assert plain.cost(six) == plain.work(six)


def test_a_whole_video_fills_the_chip() -> None:
    budget = Budget(decoder("fused"), SMALL, itemsize=2)
    assert budget.work(WHOLE) == pytest.approx(budget.cost(WHOLE), rel=0.06)  # low part and cuDNN's are in one alone


def test_ranks_that_share_tiles_cost_what_the_one_with_most_does() -> None:
    budget = Budget(decoder("fused"), SMALL, itemsize=2)
    assert budget.cost(grid(1, 4), 4) == budget.cost(grid(1, 4)) / 4
    assert budget.cost(grid(1, 4), 3) == budget.cost(grid(1, 4)) / 2
