"""The decoder with kernels of our own gives what the plain layers give.

On a CPU the kernels are what `wan21.kernels.vae_ops` says they compute; so this shows that they are put together right.
The Triton kernels themselves are compared on a GPU, by the tests marked so, which also run on Triton's interpreter.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.wan21.vae_examples import distance, random_latents, random_vae
from wan21.errors import UsageError
from wan21.kernels import vae_ops
from wan21.kernels.vae_blocks import blocks_for, candidates, default_blocks, fits, fits_one_program, split_channels
from wan21.models import WAN_VAE
from wan21.vae import WHOLE, DecodePlan, Vae

# Sums of float32 products in another order, as in test_vae.py.
TOLERANCE = 1e-5
T, H, W = 3, 5, 7

PLANS = [
    WHOLE,
    DecodePlan(frames_at_once=1),
    DecodePlan(frames_at_once=3),
    DecodePlan(num_tile_rows=2, num_tile_cols=3),
    DecodePlan(num_tile_rows=2, num_tile_cols=3, frames_at_once=1),
]


@pytest.fixture(scope="module")
def vae() -> Vae:
    return random_vae(16)


def decoded(vae: Vae, kernels: str, latents: Tensor, plan: DecodePlan = WHOLE) -> Tensor:
    vae.decoder.kernels = kernels
    with torch.no_grad():
        return vae.decode(latents, plan)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_decoding_with_our_kernels_gives_the_same_pixels(vae: Vae, plan: DecodePlan) -> None:
    latents = random_latents(1, 16, T, H, W)
    expected = decoded(vae, "torch", latents)
    assert distance(decoded(vae, "fused", latents, plan), expected) <= TOLERANCE
    assert expected.std().item() > 0.1


def test_videos_of_a_batch_and_images_are_decoded_with_our_kernels(vae: Vae) -> None:
    for shape in ((2, 16, 2, 3, 4), (1, 16, 1, 3, 4)):
        latents = random_latents(*shape)
        assert distance(decoded(vae, "fused", latents), decoded(vae, "torch", latents)) <= TOLERANCE


def test_our_kernels_refuse_to_forget_gradients(vae: Vae) -> None:
    vae.decoder.kernels = "fused"
    with pytest.raises(UsageError, match="kernels=fused computes no gradients; choose kernels=torch"):
        vae.decode(random_latents(1, 16, 1, 2, 2))


# --- the operators against their definition ------------------------------------------------------------------------


class Example:
    """A convolution with all that may come with it, and its result by definition in float64."""

    def __init__(
        self, c_in: int, c_out: int, num_frames: int, num_past: int, *, taps: int = 3, upsamples: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        batch, height, width = 2, 7, 11
        self.window = [random(batch, c_in, height, width) for _ in range(num_frames + num_past)]
        kernel = (taps, 3, 3) if taps > 1 else (3, 3)
        self.weight = random(c_out, c_in, *kernel) / (9 * taps * c_in) ** 0.5
        self.bias, self.gamma = random(c_out), 1 + 0.3 * random(c_out)
        scale = 2 if upsamples else 1
        self.top, self.left = 1, 2
        self.size = (scale * height - 3, scale * width - 2)
        self.before = random(batch, c_out, num_frames, *self.size)
        self.upsamples, self.num_frames = upsamples, num_frames

    def to(self, dtype: torch.dtype, device: str) -> "Example":
        """Rounded, on a device, channels last."""
        for name in ("weight", "bias", "gamma"):
            setattr(self, name, getattr(self, name).to(device, dtype))
        self.window = [x.to(device, dtype, memory_format=torch.channels_last) for x in self.window]
        self.before = self.before.to(device, dtype, memory_format=torch.channels_last_3d)
        return self

    def expected(self, *, adds: bool) -> tuple[Tensor, Tensor]:
        """The result, and what norm and SiLU make of it."""
        x = torch.stack(self.window, dim=2).double()
        if self.upsamples:
            x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        weight = (self.weight if self.weight.ndim == 5 else self.weight.unsqueeze(2)).double()
        num_missing = self.num_frames + weight.shape[2] - 1 - len(self.window)
        x = functional.conv3d(functional.pad(x, (1, 1, 1, 1, num_missing, 0)), weight, self.bias.double())
        x = x[..., self.top : self.top + self.size[0], self.left : self.left + self.size[1]]
        x = x + self.before.double() if adds else x
        normed = functional.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma.double().view(-1, 1, 1, 1)
        return x, functional.silu(normed)

    def outputs(self) -> tuple[Tensor, list[Tensor]]:
        """Where results go."""
        return self.before.clone(), [torch.empty_like(frame) for frame in self.frames()]

    def frames(self) -> list[Tensor]:
        """The frames to which the result is added."""
        return [frame.contiguous(memory_format=torch.channels_last) for frame in self.before.unbind(2)]


EXAMPLES = {
    "a block's convolution": {"c_in": 96, "c_out": 96, "num_frames": 4, "num_past": 2},
    "the same in the second chunk": {"c_in": 32, "c_out": 48, "num_frames": 2, "num_past": 1},
    "a lone frame": {"c_in": 16, "c_out": 16, "num_frames": 1, "num_past": 2},
    "three frames": {"c_in": 8, "c_out": 8, "num_frames": 3, "num_past": 0},
    "two groups of frames in the second chunk": {"c_in": 16, "c_out": 128, "num_frames": 4, "num_past": 1},
    "an upsampling": {"c_in": 32, "c_out": 16, "num_frames": 4, "num_past": 0, "taps": 1, "upsamples": True},
    "the head": {"c_in": 16, "c_out": 3, "num_frames": 2, "num_past": 2},
}


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_convolution_is_what_its_definition_says(name: str, adds: bool) -> None:  # noqa: FBT001
    example = Example(**EXAMPLES[name]).to(torch.float32, "cpu")
    out, normed = example.outputs()
    vae_ops.conv(
        example.window,
        example.weight,
        example.bias,
        example.gamma,
        out,
        normed,
        example.top,
        example.left,
        adds=adds,
        upsamples=example.upsamples,
    )
    expected, expected_normed = example.expected(adds=adds)
    assert distance(out.double(), expected) <= TOLERANCE
    assert distance(torch.stack(normed, dim=2).double(), expected_normed) <= TOLERANCE


def test_norm_and_silu_are_what_their_definition_says() -> None:
    frame, gamma = random_latents(2, 24, 3, 5), random_latents(24)
    out = torch.empty_like(frame)
    vae_ops.norm_silu(frame, gamma, out)
    expected = functional.normalize(frame, dim=1) * 24**0.5 * gamma.view(-1, 1, 1)
    assert distance(out, functional.silu(expected)) <= TOLERANCE


# --- the kernels ---------------------------------------------------------------------------------------------------

# Largest difference for results of order 1: the rounding of inputs to TF32 or of results to 16 bits.
KERNEL_TOLERANCE = {torch.float32: 4e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


PROMISE = 1e-4
"""Of pixels in float32."""

TF32_TOLERANCE = 1e-2
"""Products of 11 bits, some 30 times in a row: torch's own pixels are as far from those of float32."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kernel_computes_what_the_operator_says(name: str, adds: bool, dtype: torch.dtype) -> None:  # noqa: FBT001
    compare_kernel(Example(**EXAMPLES[name]).to(dtype, "cuda"), adds=adds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_computes_the_same_where_it_reads_a_frame_for_each_result() -> None:
    example = Example(**EXAMPLES["two groups of frames in the second chunk"]).to(torch.bfloat16, "cuda")
    compare_kernel(example, adds=True, shares=False)


def compare_kernel(example: Example, *, adds: bool, tile: tuple[int, int] = (8, 16), shares: bool = True) -> None:
    from wan21.kernels.gpu import vae as gpu_vae

    out, normed = example.outputs()
    weight = example.weight
    blocks = default_blocks(weight.shape[1], weight.shape[0], example.num_frames, weight.element_size())
    gpu_vae.conv(
        example.window,
        weight,
        example.bias,
        example.gamma,
        out,
        normed,
        example.top,
        example.left,
        adds=adds,
        upsamples=example.upsamples,
        in_tf32=weight.dtype == torch.float32,
        blocks=replace(blocks, tile_h=tile[0], tile_w=tile[1], shares=shares),
    )
    expected, expected_normed = example.expected(adds=adds)
    tolerance = KERNEL_TOLERANCE[weight.dtype]
    assert distance(out.double(), expected) <= tolerance
    # The norm divides the rounding of a result by its root mean square; with few channels that is small here and there.
    share = expected.square().mean(dim=1, keepdim=True).sqrt().clamp(max=1)
    assert distance(torch.stack(normed, dim=2).double() * share, expected_normed * share) <= tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("allows_tf32", "tolerance"), [(False, PROMISE), (True, TF32_TOLERANCE)])
def test_on_a_gpu_our_kernels_give_the_same_pixels(
    plan: DecodePlan,
    allows_tf32: bool,  # noqa: FBT001
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allows_tf32)
    vae = random_vae(96).to("cuda")
    latents = random_latents(1, 16, T, H, W).to("cuda")
    expected = decoded(vae, "torch", latents)
    assert distance(decoded(vae, "fused", latents, plan), expected) <= tolerance
    assert expected.std().item() > 0.1


# --- how work is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, (16, 0)), (8, (16, 0)), (16, (16, 0)), (48, (32, 16)), (96, (64, 32)), (192, (128, 64)), (384, (128, 64))],
)
def test_channels_are_cut_into_powers_of_two(count: int, expected: tuple[int, int]) -> None:
    assert split_channels(count) == expected
    assert fits_one_program(count) == (sum(expected) >= count)


def test_all_candidates_fit_the_chip_and_cover_the_shape() -> None:
    dims = [WAN_VAE.base_dim * multiplier for multiplier in WAN_VAE.multipliers]
    for itemsize in (2, 4):
        for c_in in dims:
            for c_out in (*dims, 3):
                for num_frames in (1, 2, 4):
                    found = list(candidates(c_in, c_out, num_frames, itemsize))
                    assert len(found) > 3
                    assert blocks_for(c_in, c_out, num_frames, itemsize) in found
                    assert all(fits(blocks, itemsize) and num_frames % blocks.frames == 0 for blocks in found)
                    assert all(c_in % blocks.k == 0 for blocks in found)
