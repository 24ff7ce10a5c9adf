"""Encoding in tiles gives what encoding whole frames gives: no seams, no blending, and takes what was worked out."""

import pytest
import torch
from torch import Tensor

from tests.wan21.test_vae_memory import SCALING_BYTES, LiveBytes
from tests.wan21.test_vae_tiles import CONFIG, EXACT, TOLERANCE, grid, one_thread
from tests.wan21.vae_examples import distance, random_vae
from wan21.errors import UsageError
from wan21.models import WAN_VAE, VaeConfig
from wan21.vae import WHOLE, DecodePlan, EncodeBudget, Vae
from wan21.vae.encode_plan import encode_strips
from wan21.vae.past import Past

__all__ = ["one_thread"]  # a fixture for the whole module

F, H, W = 9, 40, 56  # odd numbers of latents: nothing divides evenly, and tiles are smaller than the halo


def random_video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def exact_vae() -> Vae:
    return random_vae(CONFIG.base_dim, torch.float64)


@pytest.fixture(scope="module")
def video() -> Tensor:
    return random_video(1, 3, F, H, W)


@pytest.fixture(scope="module")
def exactly_encoded(exact_vae: Vae, video: Tensor) -> Tensor:
    with torch.no_grad():
        return exact_vae.encode(video)


@pytest.mark.parametrize(
    "plan",
    [grid(1, 1), grid(1, 1, 3), grid(1, 2), grid(2, 3, None), grid(3, 2, 1), grid(5, 1)],
    ids=str,
)
def test_tiles_give_every_latent_to_its_last_digit(
    exact_vae: Vae, video: Tensor, exactly_encoded: Tensor, plan: DecodePlan
) -> None:
    with torch.no_grad():
        assert distance(exact_vae.encode(video, plan), exactly_encoded) <= EXACT
    assert exactly_encoded.std().item() > 0.1


@pytest.mark.parametrize("plan", [grid(1, 2), grid(1, 3), grid(1, 3, 1)], ids=str)
def test_tiles_larger_than_the_halo_give_the_same_latents(plan: DecodePlan) -> None:
    vae, video = random_vae(CONFIG.base_dim), random_video(1, 3, F, 16, 240)
    with torch.no_grad():
        assert distance(vae.encode(video, plan), vae.encode(video)) <= TOLERANCE


def test_without_the_halo_there_would_be_a_seam(exact_vae: Vae, video: Tensor, exactly_encoded: Tensor) -> None:
    # The tests above can fail: this is what they would see.
    with torch.no_grad():
        left = exact_vae.encode(video[..., :32])
    assert distance(left, exactly_encoded[..., :4]) > 0.1


def test_an_image_and_a_batch_are_encoded_in_tiles_too(exact_vae: Vae) -> None:
    with torch.no_grad():
        image = random_video(1, 3, 1, H, W)
        assert distance(exact_vae.encode(image, grid(2, 2, 1)), exact_vae.encode(image)) <= EXACT
        both = random_video(2, 3, 5, 24, 32)
        together = exact_vae.encode(both, grid(1, 2))
        for i in range(2):
            assert distance(together[i : i + 1], exact_vae.encode(both[i : i + 1])) <= EXACT


def test_gradients_flow_through_tiles(exact_vae: Vae) -> None:
    gradients = []
    for plan in (WHOLE, grid(2, 2, 1)):
        video = random_video(1, 3, 5, 24, 32).requires_grad_()
        exact_vae.encode(video, plan).square().mean().backward()
        assert video.grad is not None
        gradients.append(video.grad)
    assert distance(*gradients) <= 1e-6 * gradients[0].abs().max().item()  # latents are rounded to float32 on the way


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_tile_reads_what_its_latents_depend_on_and_nothing_else(exact_vae: Vae, count: int) -> None:
    size = 31
    encoder = exact_vae.encoder
    assert encoder is not None
    for strip in encode_strips(encoder, size, count, "num_tile_cols"):
        pixels = torch.randn(1, 3, 1, 8, 8 * size, dtype=torch.float64, requires_grad=True)
        past = Past()
        past.is_last = True
        features = encoder.mid(encoder.high(pixels, past), past)
        features[..., strip.features.as_slice()].square().sum().backward()
        assert pixels.grad is not None
        used = pixels.grad.abs().sum((0, 1, 2, 3)).nonzero().flatten()
        assert (used[0].item(), used[-1].item() + 1) == (strip.pixels.start, strip.pixels.stop)


def test_the_halo_is_as_wide_as_the_docs_say(exact_vae: Vae) -> None:
    assert exact_vae.encoder is not None
    middle = encode_strips(exact_vae.encoder, 90, 3, "num_tile_cols")[1]
    assert 8 * middle.features.start - middle.pixels.start == 29
    assert middle.pixels.stop - 8 * middle.features.stop == 36


def test_more_tiles_than_latents_are_refused(exact_vae: Vae, video: Tensor) -> None:
    with pytest.raises(UsageError, match=r"num_tile_cols=9 is more than the 7 latent positions.*choose 7 or less"):
        exact_vae.encode(video, grid(1, 9))


def test_no_more_of_the_video_is_asked_for_than_a_tile_of_four_frames(exact_vae: Vae, video: Tensor) -> None:
    asked: list[tuple[int, ...]] = []

    def window(frames: slice, rows: slice, cols: slice) -> Tensor:
        asked.append(tuple(part.stop - part.start for part in (frames, rows, cols)))
        return video[:, :, frames, rows, cols]

    with torch.no_grad():
        exact_vae.encode_pixels(window, (1, F, H, W), grid(1, 2))
    assert [frames for frames, *_ in asked] == [1, 4, 4] * 2
    assert {rows for _, rows, _ in asked} == {H}


def test_the_config_of_these_tests_has_every_kind_of_layer() -> None:
    assert CONFIG.temporal_downsample == (False, True, True)


# --- bytes ---------------------------------------------------------------------------------------------------------

T, LATENT_H, LATENT_W = 4, 12, 20


def live_peak(vae: Vae, shape: tuple[int, int, int], plan: DecodePlan) -> int:
    """What encoding takes at most, on tensors without data; the video lies there as a whole."""
    t, h, w = shape
    video = torch.empty(1, 3, 4 * t - 3, 8 * h, 8 * w, device="meta", dtype=vae.conv2.weight.dtype)
    video = video.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), LiveBytes(vae, video) as live:
        latents = vae.encode(video, plan)
    assert live.current == latents.nbytes
    return live.peak - SCALING_BYTES


@pytest.fixture(scope="module")
def meta_vae() -> Vae:
    with torch.device("meta"):
        return Vae(VaeConfig(base_dim=32))


def budget_of(vae: Vae, shape: tuple[int, int, int]) -> EncodeBudget:
    assert vae.encoder is not None
    return EncodeBudget(vae.encoder, shape, itemsize=vae.conv2.weight.element_size())


@pytest.mark.parametrize("plan", [WHOLE, grid(1, 1, 1), grid(2, 2, None), grid(1, 3, 1)], ids=str)
@pytest.mark.parametrize("num_latent_frames", [1, T])
def test_the_bytes_of_a_plan_are_what_encoding_takes(meta_vae: Vae, plan: DecodePlan, num_latent_frames: int) -> None:
    shape = (num_latent_frames, LATENT_H, LATENT_W)
    measured = live_peak(meta_vae, shape, plan)
    # What is given in the right layout and format is not copied, which the prediction does not count on.
    given = 3 * 4 * 64 * LATENT_H * LATENT_W * (4 if num_latent_frames > 1 else 1)
    predicted = budget_of(meta_vae, shape).num_bytes(plan)
    assert measured <= predicted <= 1.01 * (measured + given)


def test_the_released_sizes_take_what_the_docs_say() -> None:
    with torch.device("meta"):
        vae = Vae(WAN_VAE)
    for shape, whole, tiled in (((21, 60, 104), 4.11, 1.0), ((21, 90, 160), 9.49, 2.0)):
        budget = budget_of(vae, shape)
        assert budget.num_bytes(WHOLE) / 2**30 == pytest.approx(whole, abs=0.005)
        plan = budget.best_plan(int(tiled * 2**30))
        assert budget.num_bytes(plan) <= tiled * 2**30
        assert budget.work(plan) <= 1.5 * budget.work(WHOLE)


def test_more_bytes_never_mean_more_work(meta_vae: Vae) -> None:
    budget = budget_of(meta_vae, (21, 60, 104))
    plans = [budget.best_plan(budget.num_bytes(WHOLE) * share // 16) for share in range(4, 17)]
    works = [budget.work(plan) for plan in plans]
    assert works == sorted(works, reverse=True)
    assert plans[-1] == WHOLE != plans[0]


def test_too_few_bytes_are_refused_with_the_number_that_would_do(meta_vae: Vae) -> None:
    budget = budget_of(meta_vae, (21, 60, 104))
    with pytest.raises(UsageError, match=r"budget_bytes=1000 is too little to encode.*need \d+") as refusal:
        budget.best_plan(1000)
    least = int(str(refusal.value).split("need ")[1].split(";")[0])
    assert budget.num_bytes(budget.best_plan(least)) <= least
