"""A picture of our own, for whoever generates from a picture and has none at hand; several make a video.

Letters: H, W of the picture.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SKY_TOP, SKY_LOW = (70, 120, 190), (225, 200, 170)
SEA_FAR, SEA_NEAR = (60, 110, 130), (15, 40, 70)
KITE, HULL = (200, 40, 40), (60, 40, 30)
HORIZON = 0.62
WAVES = 24
MASK_HALF_SIDE = 0.15


def example_picture(width: int, height: int, *, progress: float = 0.0) -> "np.ndarray":
    """A red kite over a harbour: the same for the same arguments.

    Args:
        width: W.
        height: H.
        progress: from 0 to 1 the kite climbs from left to right and the boat drifts; two values give two frames.

    Returns:
        [H, W, 3], uint8.
    """
    import numpy as np

    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = (y + 0.5) / height, (x + 0.5) / width

    def blend(share: "np.ndarray", first: tuple[int, ...], last: tuple[int, ...]) -> "np.ndarray":
        return np.asarray(first) + share[..., None] * (np.asarray(last) - np.asarray(first))

    depth = (y - HORIZON) / (1 - HORIZON)
    waves = 0.06 * np.sin(2 * np.pi * (WAVES * np.sqrt(depth.clip(0)) + 3 * x + progress))
    picture = np.where((y < HORIZON)[..., None], blend(y / HORIZON, SKY_TOP, SKY_LOW), blend(depth, SEA_FAR, SEA_NEAR))
    picture = picture * (1 + waves * (depth > 0))[..., None]
    across, up = (place - middle for place, middle in zip((x, y), _kite(progress), strict=True))
    picture[np.abs(across) * height / width + np.abs(up) * height / width / 1.5 < 0.05] = KITE
    along, below = x - (0.6 + 0.08 * progress), y - (HORIZON + 0.06)
    picture[(below >= 0) & (below < 0.05) & (np.abs(along) < 0.11 - below)] = HULL
    return picture.clip(0, 255).astype(np.uint8)


def example_mask(width: int, height: int, *, progress: float = 0.0) -> "np.ndarray":
    """White around the kite of the picture with these arguments, black elsewhere: [H, W, 3], uint8."""
    import numpy as np

    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    across, up = _kite(progress)
    is_near = np.maximum(np.abs((x + 0.5) / width - across), np.abs((y + 0.5) / height - up)) < MASK_HALF_SIDE
    return np.repeat(is_near[..., None], 3, axis=2).astype(np.uint8) * 255


def _kite(progress: float) -> tuple[float, float]:
    """Its middle, in shares of width and height."""
    return 0.25 + 0.4 * progress, 0.35 - 0.2 * progress
