"""VACE's sources: against a computation of whole tensors, written here from the specification alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from wan21.control import ControlSources, encode_control, load_control, mask_channels, nearest_frames
from wan21.errors import UsageError
from wan21.frames import save_video
from wan21.models import model_spec
from wan21.request import Request, make_request
from wan21.runtime import CpuRuntime
from wan21.shapes import VideoShape
from wan21.sources import Sources
from wan21.vae import DecodePlan, Vae
from wan21.videos import read_frames

SPEC = model_spec("tiny-vace")
CPU = torch.device("cpu")
SAME_ROUNDING = 1e-5  # the VAE's, as in test_vae.py
SIDES = (48, 80)  # of the source, which has 5 frames


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae() -> Vae:
    generator = torch.Generator().manual_seed(0)
    vae = Vae(SPEC.vae).requires_grad_(False)
    for parameter in vae.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * values if parameter.ndim in {3, 4} and parameter.shape[1:].numel() == 1 else values)
        if parameter.ndim > 1 and parameter[0].numel() > 1:
            parameter.div_(parameter[0].numel() ** 0.5)
    return vae


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    generator = torch.Generator().manual_seed(0)
    height, width = SIDES
    coarse = torch.rand(5, 3, 6, 10, generator=generator)
    video = functional.interpolate(coarse, size=SIDES, mode="bilinear").mul(255).to(torch.uint8).permute(0, 2, 3, 1)
    mask = torch.zeros(5, height, width, 3, dtype=torch.uint8)
    mask[:, 10:30, 20:60] = 255
    mask[2:, :, 60:] = 90  # neither black nor white
    save_video(video.contiguous(), folder / "video.mp4")
    save_video(mask, folder / "mask.mp4")
    for name, sides in (("wide", (20, 90)), ("high", (70, 30)), ("same", SIDES)):
        pixels = (np.random.default_rng(1).random((*sides, 3)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return {path.stem: str(path) for path in folder.iterdir()}


def asked(**sources: Any) -> Request:
    return make_request(SPEC, seed=0, size="96*64", frame_num=9, sources=Sources(**sources))


def loaded(**sources: Any) -> ControlSources:
    control = load_control(SPEC, asked(**sources))
    assert control is not None
    return control


def whole(path: str, name: str = "src_video") -> Tensor:
    """The five frames of a file as they are, [5, H, W, 3]."""
    return torch.from_numpy(np.stack(list(read_frames(name, path, range(5)))))


def plain_context(video: Tensor, mask: Tensor, references: list[Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The context as the specification words it, on whole tensors: video [3, T, H, W], mask [1, T, H, W]."""
    split = torch.where(mask > 0.5, 1.0, 0.0)
    latents = torch.cat([encode((video * (1 - split))[None]), encode((video * split)[None])], dim=1)[0]
    _, num_frames, height, width = mask.shape
    folded = mask[0].view(num_frames, height // 8, 8, width // 8, 8)
    folded = folded.permute(2, 4, 0, 1, 3).reshape(64, num_frames, height // 8, width // 8)
    size = ((num_frames + 3) // 4, height // 8, width // 8)
    channels = functional.interpolate(folded[None], size=size, mode="nearest-exact")[0]
    in_front = [encode(reference[None, :, None])[0] for reference in references]
    in_front = [torch.cat([frame, torch.zeros(80, *frame.shape[1:])]) for frame in in_front]
    return torch.cat([*in_front, torch.cat([latents, channels])], dim=1)[None]


def distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_video_of_a_fitting_size_is_taken_as_it_is(files: dict[str, str]) -> None:
    control = loaded(src_video=files["video"], src_mask=files["mask"])
    assert control.shape == VideoShape(num_frames=5, height=48, width=80)
    assert control.video is not None
    assert control.mask is not None
    assert torch.equal(control.video, whole(files["video"]))
    assert torch.equal(control.mask, whole(files["mask"])[..., 0])


def test_a_larger_video_is_scaled_to_cover_and_cropped(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 128, 240, 3), generator=generator, dtype=torch.uint8)
    save_video(frames, tmp_path / "large.mp4")
    request = asked(src_video=str(tmp_path / "large.mp4"))
    control = load_control(SPEC, request)
    assert control is not None
    assert control.video is not None
    shape = request.shape
    assert (shape.height, shape.width) == (64, 96)
    # 64 / 128 is more than 96 / 240, so the height fits and the width is cut.
    video = whole(str(tmp_path / "large.mp4")).permute(0, 3, 1, 2)
    scaled = functional.interpolate(video, size=(64, 120), mode="bicubic", antialias=True)
    left = (scaled.shape[3] - 96) // 2
    assert torch.equal(control.video, scaled[..., left : left + 96].permute(0, 2, 3, 1))


def test_without_sources_nothing_is_read_and_the_size_asked_for_counts() -> None:
    control = loaded()
    assert control == ControlSources(shape=VideoShape(num_frames=9, height=64, width=96))
    assert load_control(model_spec("tiny"), make_request(model_spec("tiny"), seed=0)) is None


@pytest.mark.parametrize("name", ["wide", "high", "same"])
def test_a_reference_stands_in_the_middle_of_a_white_canvas(name: str, files: dict[str, str]) -> None:
    (picture,) = loaded(src_video=files["video"], src_ref_images=(files[name],)).references
    pixels = torch.from_numpy(np.array(Image.open(files[name]))).permute(2, 0, 1) / 255.0
    scale = min(48 / pixels.shape[1], 80 / pixels.shape[2])
    height, width = int(pixels.shape[1] * scale), int(pixels.shape[2] * scale)
    fitted = functional.interpolate(((pixels - 0.5) / 0.5)[None], size=(height, width), mode="bilinear")[0]
    expected = torch.ones(3, 48, 80)
    top, left = (48 - height) // 2, (80 - width) // 2
    expected[:, top : top + height, left : left + width] = fitted
    assert distance(picture, expected) <= 1e-6  # one rounding
    assert (picture == 1).all(0).any().item() == (name != "same")


def test_a_reference_that_would_vanish_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (2000, 2)).save(path)
    with pytest.raises(UsageError, match=rf"src_ref_images={path} of 2000\*2 pixels is too long and narrow"):
        loaded(src_ref_images=(str(path),))


# --- the context ---------------------------------------------------------------------------------------------------


def test_the_context_equals_one_of_whole_tensors(vae: Vae, files: dict[str, str]) -> None:
    control = loaded(src_video=files["video"], src_mask=files["mask"], src_ref_images=(files["wide"], files["high"]))
    video = whole(files["video"]).permute(3, 0, 1, 2).float().div(127.5).sub(1)
    mask = whole(files["mask"])[..., 0][None].float().div(127.5).sub(1).add(1).div(2).clamp(0, 1)
    expected = plain_context(video, mask, list(control.references), vae.encode)
    actual = encode_control(control, vae.encode_pixels, CPU)
    assert tuple(actual.shape) == (1, 96, 2 + 2, 6, 10)
    assert distance(actual, expected) <= SAME_ROUNDING
    assert torch.equal(actual[:, 32:], expected[:, 32:])
    shades = actual[0, 32:, 2:]
    assert ((shades > 0.3) & (shades < 0.4)).any()  # the channels of the mask are not rounded


def test_without_a_mask_all_of_the_video_may_change(vae: Vae, files: dict[str, str]) -> None:
    video = whole(files["video"]).permute(3, 0, 1, 2).float().div(127.5).sub(1)
    expected = plain_context(video, torch.ones(1, 5, 48, 80), [], vae.encode)
    actual = encode_control(loaded(src_video=files["video"]), vae.encode_pixels, CPU)
    assert distance(actual, expected) <= SAME_ROUNDING


def test_without_a_video_a_grey_one_is_encoded_once(vae: Vae) -> None:
    calls = []

    def encode(*args: Any) -> Tensor:
        calls.append(args)
        return vae.encode_pixels(*args)

    expected = plain_context(torch.zeros(3, 9, 64, 96), torch.ones(1, 9, 64, 96), [], vae.encode)
    assert torch.equal(encode_control(loaded(), encode, CPU), expected)
    assert len(calls) == 1


def test_tiles_give_the_same_context(vae: Vae, files: dict[str, str]) -> None:
    control = loaded(src_video=files["video"], src_mask=files["mask"], src_ref_images=(files["same"],))
    plan = DecodePlan(num_tile_rows=2, num_tile_cols=3, frames_at_once=1)
    tiled = encode_control(control, lambda pixels, shape: vae.encode_pixels(pixels, shape, plan), CPU)
    assert distance(tiled, encode_control(control, vae.encode_pixels, CPU)) <= SAME_ROUNDING


@pytest.mark.parametrize("num_frames", range(1, 402, 4))
def test_the_nearest_frames_are_those_of_torch(num_frames: int) -> None:
    size = (num_frames + 3) // 4
    numbers = torch.arange(num_frames, dtype=torch.float32).view(1, 1, -1)
    expected = functional.interpolate(numbers, size=size, mode="nearest-exact").flatten().tolist()
    assert nearest_frames(num_frames, size) == expected


def test_the_mask_lies_row_by_row_in_its_channels() -> None:
    mask = torch.arange(8 * 16, dtype=torch.uint8).view(1, 8, 16)
    channels = mask_channels(
        ControlSources(shape=VideoShape(num_frames=1, height=16, width=16), mask=mask.repeat(1, 2, 1)), CPU
    )
    shares = channels.mul(255).round().to(torch.uint8)
    assert shares[:, 0, 0, 1].tolist() == [16 * row + 8 + col for row in range(8) for col in range(8)]


def test_no_window_is_larger_than_a_tile_of_four_frames(vae: Vae, files: dict[str, str]) -> None:
    # The sources stay in uint8 on the host: at 1280 x 720 and 81 frames a video is 0.2 GB, and 0.9 GB in float32.
    runtime = CpuRuntime()
    control = loaded(src_video=files["video"], src_mask=files["mask"])
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        runtime.reset_memory_peaks()
        encode_control(control, _asking, CPU)
        peak = runtime.memory().allocated_peak_bytes - before
    window, context = 3 * 4 * 48 * 80 * 4, 96 * 2 * 6 * 10 * 4
    assert peak <= 3 * window + 2 * context


def _asking(pixels: Callable[..., Tensor], shape: tuple[int, int, int, int]) -> Tensor:
    """Asks for a video as the VAE does, and makes nothing of it."""
    _, num_frames, height, width = shape
    for start, stop in ((0, 1), (1, num_frames)):
        pixels(slice(start, stop), slice(0, height), slice(0, width))
    return torch.zeros(1, 16, 2, 6, 10)


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_sources_that_do_not_fit_are_refused_by_name(files: dict[str, str], tmp_path: Path) -> None:
    other, short, text = tmp_path / "other.mp4", tmp_path / "short.mp4", tmp_path / "text.png"
    save_video(torch.zeros(5, 48, 96, 3, dtype=torch.uint8), other)
    save_video(torch.zeros(4, 48, 80, 3, dtype=torch.uint8), short)
    text.write_text("no picture")
    video, mask = files["video"], files["mask"]
    for sources, message in (
        ({"src_mask": mask}, f"src_mask={mask} needs src_video as well"),
        ({"src_video": video, "src_mask": str(other)}, rf"has 96\*48 pixels and src_video={video} has 80\*48"),
        ({"src_video": video, "src_mask": str(short)}, f"has 4 frames and src_video={video} has 5"),
        ({"src_video": str(text)}, f"src_video={text} is no video"),
        ({"src_video": video, "src_mask": str(text)}, f"src_mask={text} is no video"),
        ({"src_ref_images": (files["wide"], str(text))}, f"src_ref_images={text} is no picture"),
        (
            {"image": files["wide"]},
            "image=.* belongs to the i2v models, and tiny-vace takes src_video and src_mask and",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            asked(**sources)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"src_video=.* belongs to the vace models, and tiny takes no files"):
        make_request(model_spec("tiny"), seed=0, sources=Sources(src_video=video))


def test_the_scale_of_the_context_is_of_vace_alone_and_no_negative_number() -> None:
    assert make_request(SPEC, seed=0, vace_context_scale=0.5).vace_context_scale == 0.5
    with pytest.raises(UsageError, match=r"vace_context_scale=0.5 belongs to the vace models, and tiny is none"):
        make_request(model_spec("tiny"), seed=0, vace_context_scale=0.5)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=r"vace_context_scale=.* is not a number of at least 0"):
            make_request(SPEC, seed=0, vace_context_scale=wrong)
