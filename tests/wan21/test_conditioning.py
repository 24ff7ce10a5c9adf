"""What a video that starts from a picture is conditioned on, against stored numbers and computed another way."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wan21.conditioning import (
    crop_as_upstream,
    crop_like,
    frame_mask,
    frame_pixels,
    load_pictures,
    resized,
)
from wan21.errors import UsageError
from wan21.models import MODELS, VaeConfig
from wan21.request import make_request
from wan21.shapes import VideoShape, sides_like
from wan21.sources import Sources
from wan21.vae.vae import Vae

CPU = torch.device("cpu")
SHAPE = VideoShape(num_frames=9, height=64, width=96)
I2V, FLF2V = MODELS["tiny-i2v"], MODELS["tiny-flf2v"]


def save(path: Path, width: int, height: int, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_sides_follow_the_pictures_ratio_exactly_as_upstreams_do(golden: dict[str, Any]) -> None:
    assert len(golden["i2v_latent_grid"]) == 18
    for case in golden["i2v_latent_grid"]:
        height, width = sides_like(tuple(case["image_wh"]), area=case["max_area"])
        assert case["lat_hw"] == [height // 8, width // 8]


def test_masks_equal_those_of_the_official_code(golden: dict[str, Any]) -> None:
    first = frame_mask(SHAPE, 1)
    assert tuple(first.shape) == (4, 3, 8, 12)
    assert golden["i2v_mask_F9"] == first[:, :, 5, 7].int().tolist()
    both = frame_mask(VideoShape(num_frames=81, height=64, width=96), 2)[:, :, 0, 0].int()
    assert golden["flf2v_mask_first_two_latent_frames"] == both[:, :2].tolist()
    assert golden["flf2v_mask_last_two_latent_frames"] == both[:, -2:].tolist()
    assert both[:, 2:-2].sum() == 0


@pytest.mark.parametrize(("num_frames", "num_pictures"), [(1, 1), (5, 1), (13, 1), (5, 2), (9, 2), (81, 2)])
def test_a_mask_counts_frames_by_latent_frame(num_frames: int, num_pictures: int) -> None:
    """Frame by frame: the first four times, then groups of four, of which each makes the channels of a latent frame."""
    per_frame = [1.0] + [0.0] * (num_frames - 1)
    if num_pictures == 2:
        per_frame[-1] = 1.0
    spread = per_frame[:1] * 3 + per_frame
    expected = [[spread[4 * latent + channel] for latent in range(len(spread) // 4)] for channel in range(4)]
    mask = frame_mask(VideoShape(num_frames=num_frames, height=16, width=32), num_pictures)
    assert tuple(mask.shape) == (4, (num_frames - 1) // 4 + 1, 2, 4)
    for row, column in itertools.product(range(2), range(4)):
        assert expected == mask[:, :, row, column].tolist()


@pytest.mark.parametrize("num_pictures", [1, 2])
@torch.no_grad()
def test_windows_encode_to_the_same_bits_as_the_whole_video(num_pictures: int) -> None:
    torch.manual_seed(0)
    vae = Vae(VaeConfig(base_dim=8)).eval()
    frames = [torch.rand(3, 64, 96) * 2 - 1 for _ in range(num_pictures)]
    video = torch.zeros(1, 3, 9, 64, 96)
    video[0, :, 0] = frames[0]
    if num_pictures == 2:
        video[0, :, -1] = frames[1]
    pixels = frame_pixels(frames, SHAPE, CPU)
    for times, rows, cols in itertools.product(
        (slice(0, 1), slice(1, 5), slice(5, 9)), (slice(0, 64), slice(8, 40)), (slice(0, 96), slice(20, 90))
    ):
        assert torch.equal(pixels(times, rows, cols), video[:, :, times, rows, cols])
    assert torch.equal(vae.encode_pixels(pixels, (1, 9, 64, 96)), vae.encode(video))


def test_a_picture_is_read_without_a_turn_and_spans_minus_one_to_one(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 4), dtype=np.uint8)
    pixels[..., 3] = 100  # transparency is dropped
    pixels[:10, :, 0] = 255
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    request = make_request(I2V, seed=0, sources=Sources(image=str(path)))
    (picture,) = load_pictures(I2V, request)
    assert tuple(picture.shape) == (3, 20, 30)
    assert picture[0, :10].unique().tolist() == [1.0]
    assert picture[0, 10:].unique().tolist() == [-1.0]
    assert picture[1:].unique().tolist() == [-1.0]


def test_a_task_without_pictures_loads_none_and_examples_fit_the_video() -> None:
    tiny = MODELS["tiny"]
    assert load_pictures(tiny, make_request(tiny, seed=0)) == []
    request = make_request(FLF2V, seed=0, size="160*96")
    first, last = load_pictures(FLF2V, request)
    assert tuple(first.shape) == tuple(last.shape) == (3, 96, 160)
    assert not torch.equal(first, last)
    for picture in (first, last):
        assert picture.min() >= -1
        assert picture.max() <= 1
        assert picture.std() > 0.2
    again = load_pictures(FLF2V, request)
    assert torch.equal(again[0], first)


def test_a_picture_of_the_videos_size_is_not_changed() -> None:
    picture = torch.rand(3, 64, 96)
    assert torch.equal(resized(picture, SHAPE), picture)
    assert tuple(resized(torch.rand(3, 200, 50), SHAPE).shape) == (3, 64, 96)


@pytest.mark.parametrize(
    ("size", "rows", "cols"),
    [
        ((60, 90), (0, 60), (0, 90)),  # the same ratio: all of it
        ((60, 200), (0, 60), (55, 145)),  # wider: the middle, 60 * 90/60 wide
        ((300, 90), (120, 180), (0, 90)),  # higher
        ((30, 90), (0, 30), (22, 67)),  # smaller
    ],
)
def test_a_last_frame_of_another_size_loses_what_does_not_fit(
    size: tuple[int, int], rows: tuple[int, int], cols: tuple[int, int]
) -> None:
    picture = torch.rand(3, *size)
    cropped = crop_like(picture, torch.empty(3, 60, 90))
    assert torch.equal(cropped, picture[:, slice(*rows), slice(*cols)])


def test_upstreams_crop_swaps_the_sides_of_its_box_and_fills_with_grey() -> None:
    first = torch.empty(3, 60, 90)
    picture = torch.rand(3, 30, 60) + 0.1
    # To cover 90 x 60 it would be scaled by 2 to 120 x 60, so the box is 120 rows by 60 columns; 90 rows are missing.
    box = crop_as_upstream(picture, first)
    assert tuple(box.shape) == (3, 120, 60)
    assert torch.equal(box[:, 45:75], picture)
    assert box[:, :45].abs().max() == 0
    assert box[:, 75:].abs().max() == 0
    # Scaled down by 2 to 100 x 60, so 100 rows by 60 columns from the middle of 120 x 200.
    large = torch.rand(3, 120, 200)
    assert torch.equal(crop_as_upstream(large, first), large[:, 10:110, 70:130])
    equal = torch.rand(3, 60, 90)
    assert crop_as_upstream(equal, first) is equal


def test_the_quirk_changes_only_a_last_frame_of_another_size(tmp_path: Path) -> None:
    first, other = save(tmp_path / "a.png", 90, 60), save(tmp_path / "b.png", 120, 60, seed=1)

    def pictures(last: str, *, quirks: bool) -> list[torch.Tensor]:
        sources = Sources(first_frame=first, last_frame=last)
        return load_pictures(FLF2V, make_request(FLF2V, seed=0, sources=sources, upstream_quirks=quirks))

    for ours, theirs in zip(pictures(first, quirks=False), pictures(first, quirks=True), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (pictures(other, quirks=quirks) for quirks in (False, True))
    assert torch.equal(ours[0], theirs[0])
    assert tuple(ours[1].shape) == (3, 60, 90)
    assert tuple(theirs[1].shape) == (3, 120, 60)


def test_the_video_takes_its_ratio_from_the_first_picture(tmp_path: Path) -> None:
    portrait, landscape = save(tmp_path / "p.png", 60, 90), save(tmp_path / "l.png", 90, 60)
    asked = {"seed": 0, "size": "160*96"}
    image = make_request(I2V, sources=Sources(image=portrait), **asked)  # type: ignore[arg-type]
    assert (image.size, image.shape.height, image.shape.width) == ("160*96", 144, 96)
    frames = make_request(FLF2V, sources=Sources(first_frame=landscape, last_frame=portrait), **asked)  # type: ignore[arg-type]
    assert (frames.shape.height, frames.shape.width) == (96, 144)
    example = make_request(I2V, **asked)  # type: ignore[arg-type]
    assert (example.shape.height, example.shape.width) == (96, 160)


def test_one_frame_cannot_be_first_and_last() -> None:
    with pytest.raises(UsageError, match=r"frame_num=1.*choose 5"):
        make_request(FLF2V, seed=0, frame_num=1)
    assert make_request(I2V, seed=0, frame_num=1).shape.num_frames == 1
