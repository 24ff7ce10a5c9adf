"""Decoding in tiles gives what decoding whole frames gives: no seams, no blending."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.wan21.vae_examples import distance, random_latents, random_vae
from wan21.errors import UsageError
from wan21.models import VaeConfig
from wan21.vae import Vae
from wan21.vae.layers import Upsample
from wan21.vae.past import Past
from wan21.vae.plan import WHOLE, DecodePlan, strips, tiles
from wan21.vae.tiles import Interval, split_evenly

# Pixels come out in float32, so this is their last digit: below it nothing differs.
EXACT = 2**-23
# Sums of float32 products in another order, as in test_vae.py: which kernel a CPU takes, and with it the order, depends
# on the size of the frame. Where it takes the same one the bits are the same.
TOLERANCE = 1e-5

CONFIG = VaeConfig(base_dim=8)
# Odd sizes: nothing divides evenly, and tiles are smaller than the halo of 7 positions.
T, H, W = 3, 5, 7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid(rows: int, cols: int, frames_at_once: int | None = 4) -> DecodePlan:
    return DecodePlan(num_tile_rows=rows, num_tile_cols=cols, frames_at_once=frames_at_once)


@pytest.fixture(scope="module")
def vae() -> Vae:
    return random_vae(CONFIG.base_dim)


@pytest.fixture(scope="module")
def exact_vae() -> Vae:
    return random_vae(CONFIG.base_dim, torch.float64)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return random_latents(1, 16, T, H, W)


# --- the same pixels -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exactly_decoded(exact_vae: Vae, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return exact_vae.decode(latents)


@pytest.mark.parametrize(
    "plan",
    [grid(1, 1), grid(1, 1, 1), grid(1, 1, 3), grid(2, 1), grid(1, 2), grid(2, 3, None), grid(3, 2, 1), grid(H, W)],
    ids=str,
)
def test_tiles_give_every_pixel_to_its_last_digit(
    exact_vae: Vae, latents: Tensor, exactly_decoded: Tensor, plan: DecodePlan
) -> None:
    with torch.no_grad():
        assert distance(exact_vae.decode(latents, plan), exactly_decoded) <= EXACT
    assert exactly_decoded.abs().max().item() < 1
    assert exactly_decoded.std().item() > 0.1


@pytest.mark.parametrize("plan", [grid(1, 2), grid(1, 3), grid(1, 3, 1)], ids=str)
def test_tiles_larger_than_the_halo_give_the_same_pixels(vae: Vae, plan: DecodePlan) -> None:
    latents = random_latents(1, 16, T, 2, 30)
    with torch.no_grad():
        assert distance(vae.decode(latents, plan), vae.decode(latents)) <= TOLERANCE


def test_without_the_halo_there_would_be_a_seam(exact_vae: Vae, latents: Tensor, exactly_decoded: Tensor) -> None:
    # The tests above can fail: this is what they would see.
    with torch.no_grad():
        left = exact_vae.decode(latents[..., :4])
    assert distance(left, exactly_decoded[..., :32]) > 0.1


def test_an_image_is_decoded_in_tiles_too(exact_vae: Vae) -> None:
    latents = random_latents(1, 16, 1, H, W)
    with torch.no_grad():
        assert distance(exact_vae.decode(latents, grid(2, 2, 1)), exact_vae.decode(latents)) <= EXACT


def test_videos_of_a_batch_are_decoded_in_tiles_together(exact_vae: Vae) -> None:
    latents = random_latents(2, 16, T, 3, 4)
    with torch.no_grad():
        both = exact_vae.decode(latents, grid(1, 2))
        for i in range(2):
            assert distance(both[i : i + 1], exact_vae.decode(latents[i : i + 1])) <= EXACT


def test_tiles_in_bfloat16_differ_by_roundings_only(vae: Vae, latents: Tensor) -> None:
    lower = random_vae(CONFIG.base_dim, torch.bfloat16)
    small = latents[:, :, :2, :4, :4]
    with torch.no_grad():
        whole, tiled, exact = lower.decode(small), lower.decode(small, grid(2, 2, 1)), vae.decode(small)
    # No further from whole frames than those are from float32.
    assert (tiled - whole).norm().item() <= (whole - exact).norm().item()


def test_gradients_flow_through_tiles(exact_vae: Vae) -> None:
    gradients = []
    for plan in (WHOLE, grid(2, 2, 1)):
        latents = random_latents(1, 16, 2, 3, 4).requires_grad_()
        exact_vae.decode(latents, plan).square().mean().backward()
        assert latents.grad is not None
        gradients.append(latents.grad)
    assert distance(*gradients) <= 1e-6 * gradients[0].abs().max().item()  # pixels are rounded to float32 on the way


# --- what a tile reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_tile_reads_what_its_pixels_depend_on_and_nothing_else(exact_vae: Vae, count: int) -> None:
    size = 31
    decoder = exact_vae.decoder
    for strip in strips(decoder, size, count, "num_tile_cols"):
        features = torch.randn(1, decoder.low_dim, 1, 1, size, dtype=torch.float64, requires_grad=True)
        past = Past()
        past.is_last = True
        pixels = decoder.high(decoder.mid(features, past), past)
        pixels[..., strip.pixels.as_slice()].square().sum().backward()
        assert features.grad is not None
        used = features.grad.abs().sum((0, 1, 2, 3)).nonzero().flatten()
        assert (used[0].item(), used[-1].item() + 1) == (strip.features.start, strip.features.stop)


@pytest.mark.parametrize("plan", [WHOLE, grid(2, 3), grid(2, 3, 1)], ids=str)
def test_convolutions_get_dense_channels_last_input(latents: Tensor, plan: DecodePlan) -> None:
    # In bfloat16, because a CPU's convolutions in float32 return another layout whatever they are given.
    vae = random_vae(CONFIG.base_dim, torch.bfloat16)
    seen: dict[str, bool] = {}

    def look(name: str, x: Tensor) -> None:
        # Not only dense: from these strides convolutions tell the layout.
        *_, height, width = x.shape
        strides = (height * width * x.shape[1], 1, width * x.shape[1], x.shape[1])
        of_frames = (x.stride(-4 if x.ndim == 4 else 2), x.stride(1), *x.stride()[-2:])
        # The first frame has no past to be joined to, and may be part of a larger tensor.
        is_part = x.ndim == 5 and x.shape[2] < 3 and plan != WHOLE
        seen[name] = seen.get(name, True) and (is_part or of_frames == strides)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: look(name, *args))
        for name, layer in vae.named_modules()
        if isinstance(layer, nn.Conv3d | nn.Conv2d) and "shortcut" not in name
    ]
    with torch.no_grad():
        vae.decode(latents[..., :4, :4], plan)
        vae.encode(torch.zeros(1, 3, 5, 16, 16))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks)
    assert [name for name, is_right in seen.items() if not is_right] == []


# --- pieces --------------------------------------------------------------------------------------------------------


def test_pieces_cover_every_pixel_once_tile_after_tile(vae: Vae, latents: Tensor) -> None:
    times = torch.zeros(4 * T - 3, 8 * H, 8 * W, dtype=torch.int)
    places = []
    with torch.no_grad():
        for piece in vae.decode_pieces(latents, grid(2, 3)):
            times[piece.frames, piece.rows, piece.cols] += 1
            assert piece.pixels.shape == (1, 3, *times[piece.frames, piece.rows, piece.cols].shape)
            assert piece.pixels.dtype == torch.float32
            places.append((piece.rows.start, piece.cols.start, piece.frames.start))
    assert times.unique().tolist() == [1]
    assert [frames for *_, frames in places] == [0, 1, 5] * 6
    assert all(len({place[:2] for place in places[i : i + 3]}) == 1 for i in range(0, len(places), 3))


@pytest.mark.parametrize("counts", [(1, 3), (3, 4), (5, 7)])
def test_no_tile_computes_more_than_the_one_before(vae: Vae, counts: tuple[int, int]) -> None:
    found = tiles(vae.decoder, grid(*counts), 31, 40)
    sizes = [
        [len(tile.rows.windows[layer].computed) * len(tile.cols.windows[layer].computed) for layer in tile.rows.windows]
        for tile in found
    ]
    assert len(found) == counts[0] * counts[1]
    assert all(map(int.__ge__, map(sum, sizes), map(sum, sizes[1:])))


@pytest.mark.parametrize(("size", "count"), [(7, 1), (7, 2), (7, 7), (104, 5)])
def test_a_side_is_split_evenly(size: int, count: int) -> None:
    parts = split_evenly(size, count)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(size))
    assert len(parts) == count
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_intervals_stay_inside_the_frame() -> None:
    assert Interval(0, 3, 8).grown() == Interval(0, 4, 8)
    assert Interval(3, 8, 8).grown() == Interval(2, 8, 8)
    assert Interval(3, 7, 8).halved() == Interval(1, 4, 4)
    assert Interval(1, 4, 4).doubled() == Interval(2, 8, 8)
    assert Interval(3, 7, 8).inside(Interval(2, 8, 8)) == slice(1, 5)


# --- without the encoder, and what cannot be -----------------------------------------------------------------------


def test_decoding_needs_no_encoder(latents: Tensor) -> None:
    vae = random_vae(CONFIG.base_dim)
    names = set(vae.state_dict())
    with torch.no_grad():
        expected = vae.decode(latents)
        vae.drop_encoder()
        assert torch.equal(vae.decode(latents), expected)
    left = set(vae.state_dict())
    assert left == {name for name in names if name.startswith(("decoder.", "conv2."))}
    with pytest.raises(UsageError, match="has no encoder any more"):
        vae.encode(torch.zeros(1, 3, 1, 8, 8))


def test_more_tiles_than_latents_are_refused(vae: Vae, latents: Tensor) -> None:
    with pytest.raises(UsageError, match=rf"num_tile_cols=9 is more than the {W} latent positions.*choose {W} or less"):
        next(vae.decode_pieces(latents, grid(1, 9)))


@pytest.mark.parametrize("name", ["num_tile_rows", "num_tile_cols", "frames_at_once"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}=0 is not a count"):
        DecodePlan(**{name: 0})


def test_an_upsampling_in_time_and_space_can_be_cut(exact_vae: Vae) -> None:
    # Both kinds are behind the cut, so that the tests above reach both.
    layers = exact_vae.decoder.upsamples[exact_vae.decoder.first_upsampling :]
    in_time = [layer.time_conv is not None for layer in layers if isinstance(layer, Upsample)]
    assert in_time == [True, True, False]
