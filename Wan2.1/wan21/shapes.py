"""Sizes of videos, latents and token grids, as plain integers.

Letters: T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8); L tokens
(t * h/2 * w/2).
"""

import math
from dataclasses import dataclass

from wan21.errors import UsageError

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
PATCH = 2
NUM_POSITIONS = 1024
"""Tokens along one side, at most, for which the models have positions."""


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """Frames, height and width of a video in pixels, and what follows from them.

    Raises:
        UsageError: frames is not 4n + 1, or a side is not a multiple of 16.
    """

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.num_frames < 1 or (self.num_frames - 1) % TEMPORAL_STRIDE:
            below = max(1, (self.num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
            raise UsageError(
                f"frame_num={self.num_frames} is not of the form 4n+1, which the VAE needs; "
                f"choose {below} or {below + TEMPORAL_STRIDE}"
            )
        unit = SPATIAL_STRIDE * PATCH
        for name, side in (("width", self.width), ("height", self.height)):
            if side < unit or side % unit:
                raise UsageError(
                    f"{name}={side} is not a positive multiple of {unit}; choose {max(1, side // unit) * unit}"
                )

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width: (t, h, w)."""
        return (
            (self.num_frames - 1) // TEMPORAL_STRIDE + 1,
            self.height // SPATIAL_STRIDE,
            self.width // SPATIAL_STRIDE,
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        t, h, w = self.latent
        return t, h // PATCH, w // PATCH

    @property
    def num_tokens(self) -> int:
        """Tokens of one video: L."""
        t, h, w = self.grid
        return t * h * w


def sides_like(picture: tuple[int, int], *, area: int) -> tuple[int, int]:
    """Height and width of a video of about this area whose sides are as a picture's.

    In floating point exactly as upstream: what comes out just below a whole number is rounded down with the rest, so
    that 832 x 480 with its own area gives 832 x 464.

    Args:
        picture: its width and height.
        area: pixels of a frame, about.

    Raises:
        UsageError: the picture is so long and narrow that a side would vanish, or be longer than there are positions.
    """
    width, height = picture
    ratio = height / width
    sides = [
        SPATIAL_STRIDE * round(math.sqrt(pixels) // SPATIAL_STRIDE // PATCH * PATCH)
        for pixels in (area * ratio, area / ratio)
    ]
    unit = SPATIAL_STRIDE * PATCH
    if not all(unit <= side <= NUM_POSITIONS * unit for side in sides):
        raise UsageError(
            f"a picture of {width}*{height} pixels is too long and narrow: with an area of {area} pixels one side of "
            f"the video would be less than {unit} or more than {NUM_POSITIONS * unit} pixels; crop the picture"
        )
    return sides[0], sides[1]


def parse_size(size: str) -> tuple[int, int]:
    """Width and height from text such as "832*480".

    Raises:
        UsageError: the text is not two positive integers with a `*` between them.
    """
    parts = size.split("*")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"size={size} is not WIDTH*HEIGHT; write for example size=832*480")
    return int(parts[0]), int(parts[1])
