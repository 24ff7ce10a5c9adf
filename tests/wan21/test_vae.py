"""The VAE against diffusers' and against a naive whole-video version written from its definition."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.wan21.vae_examples import distance, random_vae
from wan21.errors import UsageError
from wan21.models import WAN_VAE, VaeConfig
from wan21.vae import Vae
from wan21.vae.layers import RmsNorm
from wan21.vae.past import Past
from wan21.vae.vae import LATENT_MEAN, LATENT_STD

# Sums of float32 products in another order; the values are of order 1.
TOLERANCE = 1e-5
# Relative L2; a number is rounded by up to 2**-9 or 2**-12, and the errors of some 40 layers add up.
LOW_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}

CONFIG = VaeConfig(base_dim=16)
NUM_FRAMES, HEIGHT, WIDTH = 13, 24, 40
STATE_DICT_TSV = Path(__file__).parents[1] / "data" / "wan21_state_dict.tsv"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vae() -> Vae:
    return random_vae(CONFIG.base_dim, head_scale=0.5)  # most pixels stay clear of the clamp


@pytest.fixture(scope="module")
def video() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand((1, 3, NUM_FRAMES, HEIGHT, WIDTH), generator=generator) - 1


@pytest.fixture(scope="module")
def latents() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((1, 16, 4, HEIGHT // 8, WIDTH // 8), generator=generator)


@pytest.fixture(scope="module")
def decoded(vae: Vae, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(latents)


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_checkpoint() -> None:
    with STATE_DICT_TSV.open() as lines:
        rows = csv.reader((line for line in lines if not line.startswith("#")), delimiter="\t")
        expected = {row[1]: tuple(int(size) for size in row[3].split("x")) for row in rows if row[0] == "vae"}
    with torch.device("meta"):
        vae = Vae(WAN_VAE, dtype=torch.bfloat16)
    state = vae.state_dict()
    assert len(state) == 194
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert list(vae.buffers()) == []


# --- parity with diffusers -----------------------------------------------------------------------------------------


def diffusers_name(name: str) -> str:
    """Our name of a tensor in diffusers' words."""
    renamed = (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.downsamples\.", ".down_blocks."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )
    for pattern, replacement in renamed:
        name = re.sub(pattern, replacement, name)
    if match := re.search(r"\.upsamples\.(\d+)\.", name):
        level, layer = divmod(int(match[1]), 4)
        inner = f"resnets.{layer}" if layer < 3 else "upsamplers.0"
        name = name.replace(match[0], f".up_blocks.{level}.{inner}.")
    return name


@pytest.fixture(scope="module")
def diffusers_vae(vae: Vae) -> nn.Module:
    from diffusers import AutoencoderKLWan

    reference = AutoencoderKLWan(base_dim=CONFIG.base_dim, z_dim=CONFIG.z_dim)
    reference.load_state_dict({diffusers_name(name): tensor for name, tensor in vae.state_dict().items()}, strict=True)
    return reference.requires_grad_(False)


def statistics() -> tuple[Tensor, Tensor]:
    mean = torch.tensor(LATENT_MEAN).view(1, -1, 1, 1, 1)
    return mean, 1 / torch.tensor(LATENT_STD).view(1, -1, 1, 1, 1)


def test_encode_equals_diffusers(vae: Vae, diffusers_vae: nn.Module, video: Tensor) -> None:
    mean, inverse_std = statistics()
    with torch.no_grad():
        expected = (diffusers_vae.encode(video).latent_dist.mean - mean) * inverse_std
        assert distance(vae.encode(video), expected) <= TOLERANCE


def test_decode_equals_diffusers(decoded: Tensor, diffusers_vae: nn.Module, latents: Tensor) -> None:
    mean, inverse_std = statistics()
    with torch.no_grad():
        expected = diffusers_vae.decode(latents / inverse_std + mean).sample
    assert distance(decoded, expected) <= TOLERANCE
    assert (expected.abs() < 1).float().mean().item() > 0.8


# --- parity with the definition, on whole videos -------------------------------------------------------------------


class Naive:
    """Encoder and decoder on whole videos: no chunks and no past, every step spelled out from its definition."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, *, stride: tuple[int, ...] = (1, 1, 1), past: int = 2) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        side = weight.shape[-1] // 2
        padded = functional.pad(x, (side, side, side, side, past, 0))
        return functional.conv3d(padded, weight, bias, stride=stride)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gamma = self.state[f"{name}.gamma"].reshape(-1, 1, 1, 1)
        return functional.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.residual.2", functional.silu(self.norm(f"{name}.residual.0", x)))
        h = self.conv(f"{name}.residual.6", functional.silu(self.norm(f"{name}.residual.3", h)))
        return h + (self.conv(f"{name}.shortcut", x, past=0) if f"{name}.shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        qkv = self.state[f"{name}.to_qkv.weight"].flatten(1), self.state[f"{name}.to_qkv.bias"]
        proj = self.state[f"{name}.proj.weight"].flatten(1), self.state[f"{name}.proj.bias"]
        frames = []
        for frame in self.norm(f"{name}.norm", x).unbind(2):
            q, k, v = functional.linear(frame.flatten(2).mT, *qkv).chunk(3, dim=-1)
            weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            frames.append(functional.linear(weights @ v, *proj).mT.unflatten(-1, frame.shape[2:]))
        return x + torch.stack(frames, dim=2)

    def each_frame(self, name: str, x: Tensor, *, stride: int, padding: int) -> Tensor:
        weight, bias = self.state[f"{name}.resample.1.weight"], self.state[f"{name}.resample.1.bias"]
        frames = [functional.conv2d(frame, weight, bias, stride=stride, padding=padding) for frame in x.unbind(2)]
        return torch.stack(frames, dim=2)

    def downsample(self, name: str, x: Tensor) -> Tensor:
        x = self.each_frame(name, functional.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        if f"{name}.time_conv.weight" not in self.state:
            return x
        return torch.cat([x[:, :, :1], self.conv(f"{name}.time_conv", x, stride=(2, 1, 1), past=0)], dim=2)

    def upsample(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.time_conv.weight" in self.state:
            even, odd = self.conv(f"{name}.time_conv", x[:, :, 1:]).chunk(2, dim=1)
            pairs = [frame for pair in zip(even.unbind(2), odd.unbind(2), strict=True) for frame in pair]
            x = torch.cat([x[:, :, :1], torch.stack(pairs, dim=2)], dim=2)
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return self.each_frame(name, x, stride=1, padding=1)

    def middle_of(self, part: str, x: Tensor) -> Tensor:
        x = self.residual(f"{part}.middle.0", x)
        x = self.attention(f"{part}.middle.1", x)
        return self.residual(f"{part}.middle.2", x)

    def head_of(self, part: str, x: Tensor) -> Tensor:
        return self.conv(f"{part}.head.2", functional.silu(self.norm(f"{part}.head.0", x)))

    def encode(self, video: Tensor) -> Tensor:
        x = self.conv("encoder.conv1", video)
        for i in range(11):
            step = self.downsample if i in {2, 5, 8} else self.residual
            x = step(f"encoder.downsamples.{i}", x)
        x = self.head_of("encoder", self.middle_of("encoder", x))
        mean, inverse_std = statistics()
        return (self.conv("conv1", x, past=0)[:, :16] - mean) * inverse_std

    def decode(self, latents: Tensor) -> Tensor:
        mean, inverse_std = statistics()
        x = self.conv("decoder.conv1", self.conv("conv2", latents / inverse_std + mean, past=0))
        x = self.middle_of("decoder", x)
        for i in range(15):
            step = self.upsample if i in {3, 7, 11} else self.residual
            x = step(f"decoder.upsamples.{i}", x)
        return self.head_of("decoder", x).clamp(-1, 1)


def test_encode_in_chunks_equals_encode_whole(vae: Vae, video: Tensor) -> None:
    with torch.no_grad():
        assert distance(vae.encode(video), Naive(vae.state_dict()).encode(video)) <= TOLERANCE


def test_decode_in_chunks_equals_decode_whole(vae: Vae, latents: Tensor, decoded: Tensor) -> None:
    with torch.no_grad():
        assert distance(decoded, Naive(vae.state_dict()).decode(latents)) <= TOLERANCE


def test_videos_of_a_batch_do_not_meet(vae: Vae, video: Tensor, latents: Tensor, decoded: Tensor) -> None:
    with torch.no_grad():
        encoded = vae.encode(torch.cat([video.flip(2), video])[:, :, :5])
        assert distance(encoded[1:], vae.encode(video[:, :, :5])) <= TOLERANCE
        both = vae.decode(torch.cat([latents.flip(2), latents])[:, :, :3])
        assert distance(both[1:], decoded[:, :, :9]) <= TOLERANCE


@pytest.mark.parametrize("frames_at_once", [1, 3])
def test_full_resolution_in_parts_gives_the_same_frames(vae: Vae, latents: Tensor, frames_at_once: int) -> None:
    # Exercises a past that grows by one frame, and states that the decoder's parts can be driven apart.
    whole, parts = Past(), Past()
    with torch.no_grad():
        for i in range(3):
            whole.is_first = parts.is_first = i == 0
            expected = vae.decoder(latents[:, :, i : i + 1], whole)
            frames = vae.decoder.mid(vae.decoder.low(latents[:, :, i : i + 1], parts), parts)
            actual = vae.decoder.high(frames, parts, frames_at_once=frames_at_once)
            assert distance(actual, expected) <= TOLERANCE


# --- causality, images, numbers of frames --------------------------------------------------------------------------


def test_the_start_of_a_video_is_coded_the_same_whatever_follows(
    vae: Vae, video: Tensor, latents: Tensor, decoded: Tensor
) -> None:
    with torch.no_grad():
        assert torch.equal(vae.encode(video[:, :, :9]), vae.encode(video)[:, :, :3])
        assert torch.equal(vae.decode(latents[:, :, :2]), decoded[:, :, :5])


def test_an_image_is_a_video_of_one_frame(vae: Vae, video: Tensor, latents: Tensor) -> None:
    naive = Naive(vae.state_dict())
    with torch.no_grad():
        encoded = vae.encode(video[:, :, :1])
        assert encoded.shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)
        assert distance(encoded, naive.encode(video)[:, :, :1]) <= TOLERANCE
        image = vae.decode(latents[:, :, :1])
        assert image.shape == (1, 3, 1, HEIGHT, WIDTH)
        assert distance(image, naive.decode(latents)[:, :, :1]) <= TOLERANCE


def test_chunks_are_of_one_frame_and_then_of_four(vae: Vae, latents: Tensor, decoded: Tensor) -> None:
    with torch.no_grad():
        chunks = list(vae.decode_chunks(latents))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 3, n, HEIGHT, WIDTH) for n in (1, 4, 4, 4)]
    assert torch.equal(torch.cat(chunks, dim=2), decoded)
    assert decoded.abs().max().item() == 1  # something was clamped


@pytest.mark.parametrize(("num_frames", "way_out"), [(2, "1 or 5"), (12, "9 or 13"), (0, "1 or 5")])
def test_a_number_of_frames_that_does_not_fit_is_refused(vae: Vae, num_frames: int, way_out: str) -> None:
    with pytest.raises(UsageError, match=rf"num_frames={num_frames} is not of the form 4n\+1.*choose {way_out}$"):
        vae.encode(torch.zeros(1, 3, num_frames, 16, 16))


def test_sides_that_do_not_fit_are_refused(vae: Vae) -> None:
    with pytest.raises(UsageError, match=r"width=20 is not a positive multiple of 8; choose 16$"):
        vae.encode(torch.zeros(1, 3, 1, 16, 20))


def test_latent_channels_without_known_statistics_are_refused() -> None:
    with pytest.raises(UsageError, match=r"z_dim=4 cannot be.*choose z_dim=16$"):
        Vae(VaeConfig(base_dim=16, z_dim=4))


# --- number formats and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_float32(vae: Vae, dtype: torch.dtype, latents: Tensor, video: Tensor) -> None:
    lower = Vae(CONFIG, dtype=dtype)
    lower.load_state_dict(vae.state_dict())
    latents, video = latents[:, :, :2, :2, :2], video[:, :, :5, :16, :16]  # small: a CPU is slow in float16
    with torch.no_grad():
        for ours, reference, given in ((lower.decode, vae.decode, latents), (lower.encode, vae.encode, video)):
            actual, expected = ours(given), reference(given)
            assert actual.dtype == torch.float32
            assert ((actual - expected).norm() / expected.norm()).item() <= LOW_TOLERANCE[dtype]


def test_latents_are_scaled_in_float32_also_when_the_network_is_not(vae: Vae, video: Tensor) -> None:
    lower = Vae(CONFIG, dtype=torch.bfloat16)
    lower.load_state_dict(vae.state_dict())
    mean, inverse_std = statistics()
    with torch.no_grad():
        encoded = lower.encode(video[:, :, :1])
    # Undoing the scaling finds the network's bfloat16 output, so nothing was rounded on the way.
    unscaled = encoded / inverse_std + mean
    assert distance(unscaled, unscaled.bfloat16().float()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_vector_stays_zero_in_the_norm(dtype: torch.dtype) -> None:
    norm = RmsNorm(16, dtype=dtype)
    assert torch.equal(norm(torch.zeros(1, 16, 1, 2, 2, dtype=dtype)), torch.zeros(1, 16, 1, 2, 2, dtype=dtype))


def test_gradients_are_those_of_the_whole_video_version(vae: Vae, video: Tensor, latents: Tensor) -> None:
    naive = Naive(vae.state_dict())
    for ours, reference, given in (
        (vae.encode, naive.encode, video[:, :, :5]),
        (vae.decode, naive.decode, latents[:, :, :2]),
    ):
        gradients = []
        for function in (ours, reference):
            x = given.clone().requires_grad_()
            function(x).square().mean().backward()
            assert x.grad is not None
            gradients.append(x.grad)
        assert gradients[1].abs().max().item() > 0
        assert distance(gradients[0], gradients[1]) <= TOLERANCE * gradients[1].abs().max().item()


def test_every_parameter_gets_a_gradient_as_it_does_in_the_whole_video_version(video: Tensor) -> None:
    vae = random_vae(CONFIG.base_dim, head_scale=0.5).requires_grad_()
    parameters = dict(vae.named_parameters())
    video = video[:, :, :9, :16, :16]
    vae.decode(vae.encode(video)).square().mean().backward()
    naive = Naive(parameters)
    expected = torch.autograd.grad(naive.decode(naive.encode(video)).square().mean(), list(parameters.values()))
    for (name, parameter), reference in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None, name
        assert reference.abs().max().item() > 0, name
        error = (parameter.grad - reference).norm() / reference.norm()
        assert error.item() <= 1e-4, name  # relative L2 over two networks in a row
