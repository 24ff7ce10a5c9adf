"""What a video that starts from a picture, or runs between two, is conditioned on.

The transformer gets two things beside the prompt: CLIP's tokens of the pictures, which cross attention reads, and laid
beside the noisy latents the VAE's latents of a video whose other frames are grey, with a mask that tells which frames
are given.

Letters: C channels of the latents; T, H, W of the video; t, h, w of its latents; I image tokens.

Reference: Wan2.1 (arXiv 2503.20314), section 5.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from wan21.models import ModelSpec
from wan21.request import Request
from wan21.shapes import TEMPORAL_STRIDE, VideoShape
from wan21.sources import read_frames
from wan21.vae.vae import Pixels

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The same for all videos of a request.

    tokens: of CLIP, [pictures, I, width].
    latents: mask and latents of the given frames, [1, 4 + C, t, h, w], float32.
    """

    tokens: torch.Tensor
    latents: torch.Tensor

    def beside(self, sample: torch.Tensor) -> torch.Tensor:
        """Noisy latents [B, C, t, h, w] with the given ones beside them, [B, 4 + 2 C, t, h, w]."""
        return torch.cat([sample, self.latents.expand(sample.shape[0], -1, -1, -1, -1)], dim=1)


def load_pictures(spec: ModelSpec, request: Request) -> list[torch.Tensor]:
    """The pictures of a task that starts from pictures, in the order of their frames; none for other tasks.

    Where none is given, examples of our own are drawn as large as the video.

    Returns:
        [3, H, W] each, float32 in [-1, 1], on the host and as large as they are in the files.

    Raises:
        UsageError: a file is gone or damaged meanwhile.
    """
    if spec.clip is None:
        return []
    pictures = map(_pixels, read_frames(spec, request.sources, request.shape))
    first, *others = pictures
    crop = crop_as_upstream if request.upstream_quirks else crop_like
    return [first, *(crop(other, first) for other in others)]


def _pixels(picture: "np.ndarray") -> torch.Tensor:
    # Not from_numpy, whose tensor would be a real one where tensors are fake.
    return torch.tensor(picture).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def crop_like(picture: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The middle of a picture, as much of it as has the ratio of sides of the other; a view.

    Args:
        picture: [3, H, W].
        model: [3, H', W'].
    """
    height, width = picture.shape[1:]
    model_height, model_width = model.shape[1:]
    scale = min(height / model_height, width / model_width)
    kept_height, kept_width = (max(1, round(scale * side)) for side in (model_height, model_width))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return picture[:, top : top + kept_height, left : left + kept_width]


def crop_as_upstream(picture: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """What upstream cuts out of a picture of another size: width and height of its box are swapped.

    The box has the size to which the picture would have to be scaled to cover the other; it is not scaled. Where the
    box is larger than the picture, it is filled with grey.

    Args:
        picture: [3, H, W].
        model: [3, H', W'].

    Returns:
        [3, ...], stretched to the video's size later; the picture itself if both are of one size.
    """
    height, width = picture.shape[1:]
    model_height, model_width = model.shape[1:]
    if (height, width) == (model_height, model_width):
        return picture
    scale = max(model_width / width, model_height / height)
    box = (round(width * scale), round(height * scale))  # rows, columns: swapped
    missing = [max(0, wanted - there) for wanted, there in zip(box, (height, width), strict=True)]
    rows, cols = ((side // 2, side - side // 2) for side in missing)
    padded = functional.pad(picture, (*cols, *rows))
    top, left = (round((there - wanted) / 2) for there, wanted in zip(padded.shape[1:], box, strict=True))
    return padded[:, top : top + box[0], left : left + box[1]]


def resized(picture: torch.Tensor, shape: VideoShape) -> torch.Tensor:
    """A picture [3, H', W'] stretched to a frame, [3, H, W]: bicubic, without antialiasing."""
    size = (shape.height, shape.width)
    return functional.interpolate(picture[None], size=size, mode="bicubic", align_corners=False, antialias=False)[0]


def frame_mask(shape: VideoShape, num_pictures: int) -> torch.Tensor:
    """Which frames are given: [4, t, h, w], float32, ones and zeros.

    A latent frame stands for four frames, one per channel; the first stands for the first frame four times.

    Args:
        shape: of the video.
        num_pictures: 1 for the first frame, 2 for first and last.
    """
    t, h, w = shape.latent
    is_given = torch.zeros(TEMPORAL_STRIDE * t)
    is_given[:TEMPORAL_STRIDE] = 1
    if num_pictures == 2:
        is_given[-1] = 1
    return is_given.view(t, TEMPORAL_STRIDE).T[..., None, None].expand(-1, -1, h, w)


def frame_pixels(frames: Sequence[torch.Tensor], shape: VideoShape, device: torch.device) -> Pixels:
    """The video with the given frames and grey between, as the VAE asks for it.

    Args:
        frames: the first, and perhaps the last, [3, H, W], on the host.
        shape: of the video.
        device: where the VAE is.

    Returns:
        What gives a window of it, [1, 3, T, H, W].
    """
    places = dict(zip((0, shape.num_frames - 1), frames, strict=False))

    def window(times: slice, rows: slice, cols: slice) -> torch.Tensor:
        sides = (part.stop - part.start for part in (times, rows, cols))
        pixels = torch.zeros(1, 3, *sides, device=device)
        for place, frame in places.items():
            if times.start <= place < times.stop:
                pixels[0, :, place - times.start] = frame[:, rows, cols].to(device)
        return pixels

    return window
