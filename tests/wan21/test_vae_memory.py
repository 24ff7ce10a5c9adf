"""What a pass of the VAE keeps alive, counted on tensors without data."""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wan21.errors import UsageError
from wan21.models import WAN_VAE, VaeConfig
from wan21.options import Kernels
from wan21.runtime import CpuRuntime
from wan21.vae import Vae
from wan21.vae.budget import Budget
from wan21.vae.past import Past
from wan21.vae.plan import WHOLE, DecodePlan

CONFIG = VaeConfig(base_dim=32)
HEIGHT, WIDTH = 64, 96
FRAME_BYTES = CONFIG.base_dim * HEIGHT * WIDTH * 4  # one frame of the full-resolution level


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they die; not those of what is given."""

    def __init__(self, vae: Vae, *given: Tensor) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*vae.parameters(), *given)}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage._cdata)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.current -= num_bytes


@pytest.fixture(scope="module")
def vae() -> Vae:
    with torch.device("meta"):
        return Vae(CONFIG)


@pytest.fixture(scope="module", params=["torch", "fused"])
def either_vae(request: pytest.FixtureRequest) -> Vae:
    """With each of the two ways to decode."""
    with torch.device("meta"):
        return Vae(CONFIG, kernels=request.param)


def past_bytes(past: Past) -> int:
    return sum(frames.nbytes for frames in past._frames.values())


def test_decode_holds_its_past_and_fourteen_frames_of_the_largest_layer(vae: Vae) -> None:
    past = Past()
    z = torch.empty(1, CONFIG.z_dim, 1, HEIGHT // 8, WIDTH // 8, device="meta")
    with torch.no_grad(), LiveBytes(vae, z) as live:
        for i in range(4):
            past.is_first = i == 0
            vae.decoder(z, past)
    # In a residual block: input (4), the convolution's input with its past (6) and its output (4).
    assert live.current == past_bytes(past)
    assert live.peak - past_bytes(past) <= 14 * FRAME_BYTES


def test_encode_holds_its_past_and_fourteen_frames_of_the_largest_layer(vae: Vae) -> None:
    past = Past()
    frames = torch.empty(1, 3, 4, HEIGHT, WIDTH, device="meta").contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), LiveBytes(vae, frames) as live:
        for i in range(4):
            past.is_first = i == 0
            vae.encoder(frames[:, :, :1] if i == 0 else frames, past)
    assert live.current == past_bytes(past)
    # The normalisation's lengths, one channel, come while the past is not yet complete.
    assert live.peak - past_bytes(past) <= 14 * FRAME_BYTES


@pytest.mark.parametrize("num_latent_frames", [4, 8])
def test_decoding_in_chunks_does_not_need_more_for_a_longer_video(vae: Vae, num_latent_frames: int) -> None:
    peaks = []
    for t in (4, num_latent_frames):
        latents = torch.empty(1, CONFIG.z_dim, t, HEIGHT // 8, WIDTH // 8, device="meta")
        with torch.no_grad(), LiveBytes(vae, latents) as live:
            for chunk in vae.decode_chunks(latents):
                del chunk
        peaks.append(live.peak - latents.nbytes)  # the scaled latents stay, all of them
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-3)


def test_an_image_keeps_no_past(vae: Vae) -> None:
    latents = torch.empty(1, CONFIG.z_dim, 1, HEIGHT // 8, WIDTH // 8, device="meta")
    with torch.no_grad(), LiveBytes(vae, latents) as live:
        vae.decode(latents)
    # At the last upsampling: input (half a frame of the largest layer), enlarged input (2) and output (1).
    image_bytes = 3 * HEIGHT * WIDTH * 4
    statistics_bytes = 2 * CONFIG.z_dim * 4
    assert live.peak <= 3.5 * FRAME_BYTES + latents.nbytes + image_bytes + statistics_bytes


# --- tiles ---------------------------------------------------------------------------------------------------------

T, H, W = 4, 12, 20
SCALING_BYTES = 2 * CONFIG.z_dim * 4  # mean and deviation of each latent channel
TARGETS = {"832 x 480": ((21, 60, 104), 2**30), "1280 x 720": ((21, 90, 160), 3 * 2**30)}


def grid(rows: int, cols: int, frames_at_once: int | None = None) -> DecodePlan:
    return DecodePlan(num_tile_rows=rows, num_tile_cols=cols, frames_at_once=frames_at_once)


def live_bytes(vae: Vae, latents: Tensor, plan: DecodePlan) -> list[tuple[int, int]]:
    """Peak so far and bytes that stay, after each piece, on tensors without data."""
    seen = []
    with torch.no_grad(), LiveBytes(vae, latents) as live:
        for piece in vae.decode_pieces(latents, plan):
            del piece
            seen.append((live.peak, live.current))
    assert live.current == 0
    return seen


@pytest.mark.parametrize("plan", [WHOLE, grid(1, 1, 1), grid(2, 2), grid(1, 3, 1)], ids=str)
def test_the_bytes_of_a_plan_are_what_decoding_takes(either_vae: Vae, plan: DecodePlan) -> None:
    latents = torch.empty(1, CONFIG.z_dim, T, H, W, device="meta")
    measured = live_bytes(either_vae, latents, plan)[-1][0] - SCALING_BYTES
    predicted = Budget(either_vae.decoder, (T, H, W), itemsize=4).num_bytes(plan)
    # Where tiles are not all of one size, or parts of a chunk wait for the rest, the prediction is on the safe side.
    assert measured <= predicted <= 1.01 * measured


def test_the_bytes_of_a_plan_are_what_decoding_takes_in_full_width() -> None:
    with torch.device("meta"):
        vae = Vae(WAN_VAE, dtype=torch.bfloat16)
    t, h, w = 4, 60, 104
    latents = torch.empty(1, WAN_VAE.z_dim, t, h, w, device="meta")
    measured = live_bytes(vae, latents, WHOLE)[-1][0]
    predicted = Budget(vae.decoder, (t, h, w), itemsize=2).num_bytes(WHOLE)
    assert predicted == pytest.approx(measured, rel=1e-4)
    # 14 frames of the largest layer and the past, which is 2,364.5 numbers for a pixel if counted by hand.
    assert predicted == pytest.approx((14 * 96 + 2364.5) * 2 * 64 * h * w, rel=1e-3)


def test_our_kernels_take_two_frames_less_and_need_no_halo_beyond_the_kept(vae: Vae) -> None:
    with torch.device("meta"):
        ours = Vae(CONFIG, kernels="fused")
    shape = (T, HEIGHT // 8, WIDTH // 8)
    plain, fused = (Budget(one.decoder, shape, itemsize=4) for one in (vae, ours))
    assert plain.num_bytes(WHOLE) - fused.num_bytes(WHOLE) == 2 * FRAME_BYTES
    assert fused.num_bytes(grid(2, 2)) < plain.num_bytes(grid(2, 2))
    assert fused.work(grid(2, 2)) < plain.work(grid(2, 2))
    assert fused.work(WHOLE) == plain.work(WHOLE)


def test_no_piece_takes_more_than_the_one_before_and_nothing_is_left_over(either_vae: Vae) -> None:
    latents = torch.empty(1, CONFIG.z_dim, 5, H, W, device="meta")
    seen = live_bytes(either_vae, latents, grid(1, 2))
    first, second = seen[:5], seen[5:]
    # The past is complete after the third piece; from then on what stays is the same, until the last forgets it.
    assert first[1][1] < first[2][1] == first[3][1] > first[4][1]
    assert second[2][1] == second[3][1] == first[3][1]
    # Both halves are of one size, so nothing after the third piece is a new peak.
    assert {peak for peak, _ in seen[2:]} == {seen[2][0]}


def test_a_longer_video_takes_more_only_for_the_latents_and_the_features_of_all_frames(either_vae: Vae) -> None:
    peaks = []
    for t in (4, 6):
        latents = torch.empty(1, CONFIG.z_dim, t, H, W, device="meta")
        peaks.append(
            live_bytes(either_vae, latents, grid(1, 2))[-1][0] - latents.nbytes - 4 * 4 * CONFIG.base_dim * t * H * W
        )
    assert peaks[0] == peaks[1]


def test_tiles_take_less_on_a_real_device() -> None:
    # In bfloat16, because a CPU's convolutions in float32 unfold their input, which takes more than all the rest.
    runtime = CpuRuntime()
    vae = Vae(VaeConfig(base_dim=8), dtype=torch.bfloat16).requires_grad_(False)
    latents = torch.zeros(1, CONFIG.z_dim, T, H, W)
    budget = Budget(vae.decoder, (T, H, W), itemsize=2)
    peaks = {}
    for plan in (WHOLE, grid(2, 2)):
        with torch.no_grad(), runtime.counting():
            before = runtime.memory().allocated_bytes
            runtime.reset_memory_peaks()
            for piece in vae.decode_pieces(latents, plan):
                del piece
            peaks[plan] = runtime.memory().allocated_peak_bytes - before
        # Kernels take a little room of their own, for weights in another order.
        assert budget.num_bytes(plan) <= peaks[plan] <= 1.02 * budget.num_bytes(plan)
    assert peaks[grid(2, 2)] < 0.4 * peaks[WHOLE]


@pytest.mark.parametrize("size", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_the_released_sizes_fit_their_targets_with_weights_and_kernel_libraries(
    size: str, itemsize: int, kernels: Kernels
) -> None:
    shape, total = TARGETS[size]
    with torch.device("meta"):
        vae = Vae(WAN_VAE, kernels=kernels)
    vae.drop_encoder()
    weights = itemsize * sum(parameter.numel() for parameter in vae.parameters())
    libraries = 32 * 2**20  # cuBLAS's workspace on a Hopper GPU
    budget = Budget(vae.decoder, shape, itemsize=itemsize)
    plan = budget.best_plan(total - weights - libraries)
    assert budget.num_bytes(plan) <= total - weights - libraries < budget.num_bytes(WHOLE)
    assert budget.work(plan) <= 1.3 * budget.work(WHOLE)


def test_more_bytes_never_cost_more(either_vae: Vae) -> None:
    budget = Budget(either_vae.decoder, (21, 60, 104), itemsize=2)
    whole = budget.num_bytes(WHOLE)
    plans = [budget.best_plan(whole * share // 16) for share in range(3, 17)]
    costs = [budget.cost(plan) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1] == budget.cost(WHOLE)
    assert plans[-1] == WHOLE


def test_too_few_bytes_are_refused_with_the_number_that_would_do(vae: Vae) -> None:
    budget = Budget(vae.decoder, (21, 60, 104), itemsize=2)
    with pytest.raises(UsageError, match=r"budget_bytes=1000 is too little.*the smallest tiles need \d+") as refusal:
        budget.best_plan(1000)
    least = int(str(refusal.value).split("need ")[1].split(";")[0])
    assert budget.num_bytes(budget.best_plan(least)) <= least


def test_a_batch_takes_as_often_as_much(vae: Vae) -> None:
    one, two = (Budget(vae.decoder, (T, H, W), itemsize=4, batch_size=size) for size in (1, 2))
    assert two.num_bytes(grid(2, 2)) == 2 * one.num_bytes(grid(2, 2))


# --- given up ------------------------------------------------------------------------------------------------------


def num_live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_a_pass_that_is_given_up_leaves_no_tensor_behind(vae: Vae) -> None:
    before = num_live_tensors()
    with torch.no_grad():
        chunks = vae.decode_chunks(torch.empty(1, CONFIG.z_dim, 3, 2, 2, device="meta"))
        next(chunks)
        next(chunks)
        assert num_live_tensors() > before
        del chunks
    assert num_live_tensors() == before
