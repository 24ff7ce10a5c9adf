"""Encoding in tiles: the same latents, in the bytes that were planned."""

from collections.abc import Iterator

import pytest
import torch

from wan21.config import WAN_VAE, VaeConfig
from wan21.errors import UsageError
from wan21.runtime import CpuRuntime
from wan21.vae import Vae
from wan21.vae.encode_plan import EncodeBudget
from wan21.vae.past import Past
from wan21.vae.plan import WHOLE, DecodePlan
from wan21.vae.tiles import Interval

SAME_ROUNDING = 2e-6  # float32: kernels may sum in another order over another shape
T, H, W = 3, 14, 20


def grid(rows: int, cols: int, frames_at_once: int | None = None) -> DecodePlan:
    return DecodePlan(num_tile_rows=rows, num_tile_cols=cols, frames_at_once=frames_at_once)


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(VaeConfig(base_dim=8)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.rand(1, 3, 4 * (T - 1) + 1, 8 * H, 8 * W, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def whole(vae: Vae, video: torch.Tensor) -> torch.Tensor:
    return vae.encode(video)


@pytest.mark.parametrize("plan", [grid(1, 1, 1), grid(2, 1), grid(1, 2, 2), grid(2, 3, 1)], ids=str)
def test_tiles_and_single_frames_give_the_latents_of_whole_frames(
    vae: Vae, video: torch.Tensor, whole: torch.Tensor, plan: DecodePlan
) -> None:
    assert float((vae.encode(video, plan) - whole).abs().max()) < SAME_ROUNDING


def test_an_image_is_encoded_in_tiles_too(vae: Vae, video: torch.Tensor) -> None:
    image = video[:, :, :1]
    assert float((vae.encode(image, grid(2, 2, 1)) - vae.encode(image)).abs().max()) < SAME_ROUNDING


def test_the_halo_holds_all_that_a_tile_depends_on_and_no_whole_latent_more(vae: Vae) -> None:
    """By gradients: which pixels of a row change the latents of a tile."""
    assert vae.encoder is not None
    column = torch.rand(1, 3, 1, 16, 8 * 20, requires_grad=True)
    features = vae.encoder.high(column, Past())
    features[..., 8:10].sum().backward()
    assert column.grad is not None
    touched = column.grad.abs().sum((0, 1, 2, 3)).nonzero().flatten()
    needed = vae.encoder.needs(Interval(8, 10, 20))
    first, last = int(touched[0]), int(touched[-1])
    assert needed.start <= first < needed.start + 8
    assert needed.stop - 8 <= last < needed.stop


@pytest.mark.parametrize("plan", [WHOLE, grid(1, 1, 1), grid(2, 2), grid(2, 3, 1)], ids=str)
def test_the_bytes_of_a_plan_are_what_encoding_takes(plan: DecodePlan) -> None:
    # In bfloat16, because a CPU's convolutions in float32 unfold their input, which takes more than all the rest.
    runtime = CpuRuntime()
    vae = Vae(VaeConfig(base_dim=16), dtype=torch.bfloat16).requires_grad_(False)
    assert vae.encoder is not None

    def chunks() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 3, 1, 8 * H, 8 * W)
        for _ in range(T - 1):
            chunk = torch.zeros(1, 3, 4, 8 * H, 8 * W)
            yield chunk
            del chunk

    with torch.no_grad(), runtime.counting():
        before = runtime.memory().allocated_bytes
        runtime.reset_memory_peaks()
        vae.encode_chunks(chunks, (1, 4 * (T - 1) + 1, 8 * H, 8 * W), plan)
        measured = runtime.memory().allocated_peak_bytes - before
    predicted = EncodeBudget(vae.encoder, (T, H, W), itemsize=2).num_bytes(plan)
    # What waits for the rest of a chunk is not all there when the first level is at its peak.
    assert 0.99 * measured <= predicted <= 1.08 * measured


def test_a_plan_is_the_one_of_least_work_that_fits_and_too_few_bytes_are_refused() -> None:
    with torch.device("meta"):
        vae = Vae(WAN_VAE)
    assert vae.encoder is not None
    budget = EncodeBudget(vae.encoder, (21, 60, 104), itemsize=4)
    bytes_of_whole = budget.num_bytes(WHOLE)
    assert budget.best_plan(bytes_of_whole) == WHOLE
    plan = budget.best_plan(2**30)
    assert budget.num_bytes(plan) <= 2**30 < bytes_of_whole
    assert budget.work(WHOLE) == 1
    assert 1 < budget.work(plan) < 1.6
    with pytest.raises(UsageError, match=r"budget_bytes=1000 is too little to encode 21 x 60 x 104 latents.*need \d+"):
        budget.best_plan(1000)
    with pytest.raises(UsageError, match="num_tile_rows=61 is more than the 60"):
        budget.num_bytes(grid(61, 1))
