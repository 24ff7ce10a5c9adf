"""What VACE is steered by: a source video, what of it may change, and pictures of what shall be seen.

The sources become a context of 96 channels on the grid of the latents: the latents of what shall stay (16), of what
shall change (16), and the mask itself, each 8 x 8 pixels of it laid out as 64 channels. Reference pictures stand in
front of the video, one latent frame each.

Letters: C channels; T, H, W of the video; t, h, w of its latents; R reference pictures.

Reference: VACE (arXiv 2503.07598), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from wan21.errors import UsageError
from wan21.excerpts import choose_excerpt
from wan21.models import ModelSpec
from wan21.pictures import read_picture
from wan21.request import Request
from wan21.shapes import SPATIAL_STRIDE, VideoShape, parse_size
from wan21.videos import read_frames

if TYPE_CHECKING:
    import numpy as np

WHITE = 1.0
"""Of what surrounds a reference picture of another shape than the video's."""

Encode = Callable[..., torch.Tensor]
"""As `Vae.encode_pixels` without its plan: pixels, and B, T, H, W, to latents."""


@dataclass(frozen=True, kw_only=True)
class ControlSources:
    """What was read, on the host; small, since it is as it came from the files.

    shape: of the video that will be made.
    video: [T, H, W, 3], uint8; None: nothing, which is a grey video all of which may change.
    mask: [T, H, W], uint8; None: all of the video may change.
    references: [3, H, W] each, float32 in [-1, 1].
    """

    shape: VideoShape
    video: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    references: tuple[torch.Tensor, ...] = ()


def load_control(spec: ModelSpec, request: Request) -> ControlSources | None:
    """The sources of a VACE model, read and brought to the video's size; None for other models.

    Raises:
        UsageError: a file cannot be read, or is of a shape of which nothing is left.
    """
    if spec.dit.vace is None:
        return None
    sources, shape = request.sources, request.shape
    video = mask = None
    if sources.src_video is not None:
        width, height = parse_size(request.size)
        budget = VideoShape(num_frames=request.frame_num, height=height, width=width)
        excerpt = choose_excerpt("src_video", sources.src_video, budget)
        video = torch.empty(shape.num_frames, shape.height, shape.width, 3, dtype=torch.uint8)
        for index, frame in enumerate(read_frames("src_video", sources.src_video, excerpt.frame_ids)):
            video[index] = covering(frame, shape)
        if sources.src_mask is not None:
            mask = torch.empty(shape.num_frames, shape.height, shape.width, dtype=torch.uint8)
            for index, frame in enumerate(read_frames("src_mask", sources.src_mask, excerpt.frame_ids)):
                mask[index] = covering(frame, shape)[..., 0]
    references = tuple(on_canvas(path, read_picture("src_ref_images", path), shape) for path in sources.src_ref_images)
    return ControlSources(shape=shape, video=video, mask=mask, references=references)


def covering(frame: "np.ndarray", shape: VideoShape) -> torch.Tensor:
    """The middle of a frame [H', W', 3] that was scaled to cover [H, W, 3]; uint8, bicubic with antialiasing."""
    pixels = torch.tensor(frame)  # not from_numpy, whose tensor would be a real one where tensors are fake
    height, width = pixels.shape[:2]
    if (height, width) == (shape.height, shape.width):
        return pixels
    scale = max(shape.width / width, shape.height / height)
    sides = (round(scale * height), round(scale * width))
    scaled = functional.interpolate(pixels.permute(2, 0, 1)[None], size=sides, mode="bicubic", antialias=True)[0]
    top, left = (sides[0] - shape.height) // 2, (sides[1] - shape.width) // 2
    return scaled[:, top : top + shape.height, left : left + shape.width].permute(1, 2, 0)


def on_canvas(path: str, picture: "np.ndarray", shape: VideoShape) -> torch.Tensor:
    """A picture [H', W', 3] in the middle of a white one [3, H, W], as large as fits; float32 in [-1, 1].

    Bilinear, without antialiasing.

    Raises:
        UsageError: it is so long and narrow that nothing of it would be left; `path` says of which.
    """
    pixels = torch.tensor(picture).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    height, width = pixels.shape[1:]
    if (height, width) == (shape.height, shape.width):
        return pixels
    scale = min(shape.height / height, shape.width / width)
    sides = (int(height * scale), int(width * scale))
    if not all(sides):
        raise UsageError(
            f"src_ref_images={path} of {width}*{height} pixels is too long and narrow: scaled to fit into "
            f"{shape.width}*{shape.height} one side would vanish; crop the picture"
        )
    canvas = torch.full((3, shape.height, shape.width), WHITE)
    top, left = (shape.height - sides[0]) // 2, (shape.width - sides[1]) // 2
    canvas[:, top : top + sides[0], left : left + sides[1]] = functional.interpolate(
        pixels[None], size=sides, mode="bilinear", align_corners=False
    )[0]
    return canvas


class SourcePixels:
    """The two videos that the VAE sees, a window at a time, where it is.

    Args:
        sources: what was read.
        device: of the VAE.
        changes: of the pixels that may change (True) or that stay (False); the others are grey.
    """

    def __init__(self, sources: ControlSources, device: torch.device, *, changes: bool) -> None:
        self._sources = sources
        self._device = device
        self._changes = changes

    def __call__(self, frames: slice, rows: slice, cols: slice) -> torch.Tensor:
        """[1, 3, T, H, W] of a window, float32 in [-1, 1].

        Memory: that twice, and as much for the mask.
        """
        video, mask = self._sources.video, self._sources.mask
        if video is None or (mask is None and not self._changes):
            sides = (part.stop - part.start for part in (frames, rows, cols))
            return torch.zeros(1, 3, *sides, device=self._device)
        window = video[frames, rows, cols].to(self._device).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)
        if mask is None:
            return window
        is_white = as_share(mask[frames, rows, cols].to(self._device)) > 0.5
        return window.mul_(is_white if self._changes else ~is_white)


def as_share(mask: torch.Tensor) -> torch.Tensor:
    """A mask in uint8 as float32 from 0 to 1, by way of [-1, 1] as upstream."""
    return mask.float().div_(127.5).sub_(1).add_(1).div_(2).clamp_(0, 1)


def mask_channels(sources: ControlSources, device: torch.device) -> torch.Tensor:
    """The mask on the grid of the latents, [64, t, h, w], float32: of the frame nearest to each latent frame.

    Unlike what splits the video, it is not rounded to black and white.
    """
    t, h, w = sources.shape.latent
    if sources.mask is None:
        return torch.ones(SPATIAL_STRIDE**2, t, h, w, device=device)
    chosen = as_share(sources.mask[nearest_frames(sources.shape.num_frames, t)].to(device))
    blocks = chosen.view(t, h, SPATIAL_STRIDE, w, SPATIAL_STRIDE)
    return blocks.permute(2, 4, 0, 1, 3).reshape(SPATIAL_STRIDE**2, t, h, w)


def nearest_frames(num_frames: int, num_latent_frames: int) -> list[int]:
    """For each latent frame the frame whose middle is nearest, as torch's nearest-exact interpolation has it."""
    return [(2 * index + 1) * num_frames // (2 * num_latent_frames) for index in range(num_latent_frames)]


def encode_control(sources: ControlSources, encode: Encode, device: torch.device) -> torch.Tensor:
    """The context, [1, 96, R + t, h, w], float32.

    Args:
        sources: what was read.
        encode: the VAE's.
        device: where the VAE is.

    Memory: the context twice, beside what encoding takes.
    """
    shape = sources.shape
    size = (1, shape.num_frames, shape.height, shape.width)
    changing = encode(SourcePixels(sources, device, changes=True), size)
    # Without a video both are the same grey one.
    staying = changing if sources.video is None else encode(SourcePixels(sources, device, changes=False), size)
    video = torch.cat([staying, changing, mask_channels(sources, device)[None]], dim=1)
    del staying, changing
    frames = []
    for reference in sources.references:

        def window(_: slice, rows: slice, cols: slice, picture: torch.Tensor = reference) -> torch.Tensor:
            return picture[None, :, None, rows, cols].to(device)

        latents = encode(window, (1, 1, shape.height, shape.width))
        nothing = latents.new_zeros(1, video.shape[1] - latents.shape[1], *latents.shape[2:])
        frames.append(torch.cat([latents, nothing], dim=1))
    return torch.cat([*frames, video], dim=2)
