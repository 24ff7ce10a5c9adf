"""Which frames of a video VACE takes, and to what size it brings them: as upstream, by the budget of tokens.

No torch in here: whoever plans runs without a GPU imports this file.
"""

import math
from dataclasses import dataclass

from wan21.errors import UsageError
from wan21.shapes import PATCH, SPATIAL_STRIDE, TEMPORAL_STRIDE, VideoShape
from wan21.videos import VideoFacts, inspect_video

UNIT = SPATIAL_STRIDE * PATCH
"""Pixels on a side of a token."""


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """What becomes of a source video.

    frame_ids: of the source, ascending; the same one may come several times.
    shape: frames and sides of the result.
    """

    frame_ids: tuple[int, ...]
    shape: VideoShape


def choose_excerpt(name: str, path: str, budget: VideoShape) -> Excerpt:
    """What becomes of the video in a file; `excerpt_of` says how that is chosen.

    Args:
        name: what the file is for, for messages.
        path: of the file.
        budget: the size and the frames that were chosen.

    Raises:
        UsageError: it cannot be read, is smaller than a token, or too long and narrow.
    """
    video = inspect_video(name, path)
    try:
        return excerpt_of(video, budget)
    except UsageError as error:
        raise UsageError(f"{name}={path}: {error}") from error


def excerpt_of(video: VideoFacts, budget: VideoShape) -> Excerpt:
    """Frames spread evenly over a video, in sides that are like its own.

    A video that is small enough keeps its size, rounded down to whole tokens, and may have more frames than the budget
    says; a larger one is brought to about the budget's area.

    Args:
        video: the source.
        budget: the size that was chosen; what it has of pixels and of tokens is the most that the excerpt may have.

    Raises:
        UsageError: the video is smaller than a token, or too long and narrow.
    """
    height, width = video.height, video.width
    most_tokens = budget.num_tokens
    area = min(most_tokens, budget.height * budget.width // UNIT**2, (height // UNIT) * (width // UNIT))
    if not area:
        raise UsageError(f"{width}*{height} pixels are too small: both sides have to be at least {UNIT}")
    latent_frames = min((video.num_frames - 1) // TEMPORAL_STRIDE + 1, most_tokens // area)
    area = min(area, most_tokens // latent_frames)
    rows = round(math.sqrt(area * (height / width)))
    if not rows or not area // rows:
        raise UsageError(
            f"{width}*{height} pixels are too long and narrow: in {area} tokens one side would vanish; crop the video"
        )
    num_frames = TEMPORAL_STRIDE * (latent_frames - 1) + 1
    shape = VideoShape(num_frames=num_frames, height=UNIT * rows, width=UNIT * (area // rows))
    return Excerpt(frame_ids=_spread(video, num_frames), shape=shape)


def _spread(video: VideoFacts, num_frames: int) -> tuple[int, ...]:
    """For each of so many evenly spaced times, the first frame that is shown then, from the start to the last frame."""
    end = sum(video.spans[-1]) / 2
    step = end / (num_frames - 1) if num_frames > 1 else 0.0
    frame_ids, index = [], 0
    for number in range(num_frames):
        time = number * step if number < num_frames - 1 or not number else end
        # Where nothing is shown, which upstream takes for the first frame, the last one before it stands.
        while index + 1 < video.num_frames and video.spans[index][1] < time and video.spans[index + 1][0] <= time:
            index += 1
        frame_ids.append(index)
    return tuple(frame_ids)
