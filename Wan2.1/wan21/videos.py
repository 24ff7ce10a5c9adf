"""Videos from files, through PyAV; without torch, so that a plan can look at them.

Letters: H, W of a frame.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan21.errors import MissingPackageError, UsageError

if TYPE_CHECKING:
    import numpy as np

QUARTER = 90


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What of a video decides which of its frames are used, and how.

    height, width: of a frame as it is shown.
    spans: when each frame begins and ends, in seconds from the first one's beginning.
    """

    height: int
    width: int
    spans: tuple[tuple[float, float], ...]

    @property
    def num_frames(self) -> int:
        """All of them."""
        return len(self.spans)


def inspect_video(name: str, path: str) -> VideoFacts:
    """The facts of the video in a file, all of which is decoded once, however often it is asked.

    Args:
        name: what the file is for, for messages.
        path: of the file.

    Raises:
        UsageError: there is no such file, it is damaged, or it holds no video or no frame.
        MissingPackageError: PyAV is not installed.
    """
    if not Path(path).is_file():
        state = "is not a file" if Path(path).exists() else "does not exist"
        raise UsageError(f"{name}={path} {state}; give the path of a video file")
    state_of_file = Path(path).stat()
    return _inspected(name, path, (state_of_file.st_mtime_ns, state_of_file.st_size))


@functools.cache
def _inspected(name: str, path: str, state: tuple[int, int]) -> VideoFacts:  # noqa: ARG001 # of the file: a key
    starts: list[float] = []
    durations: list[float] = []
    sides = (0, 0)
    for frame, rate in _frames(name, path):
        seconds = float(1 / rate) if rate else 0.0
        starts.append(float(frame.time) if frame.time is not None else len(starts) * seconds)
        durations.append(float(frame.duration * frame.time_base) if frame.duration else seconds)
        found = _shown_sides(frame)
        if len(starts) > 1 and found != sides:
            raise UsageError(
                f"{name}={path} changes its size at frame {len(starts) - 1}, from {sides[1]}*{sides[0]} to "
                f"{found[1]}*{found[0]}; give a video whose frames are all of one size"
            )
        sides = found
    if not starts:
        raise UsageError(f"{name}={path} has no frames; give a video with one frame at least")
    spans = tuple(
        (start - starts[0], start - starts[0] + length) for start, length in zip(starts, durations, strict=True)
    )
    return VideoFacts(height=sides[0], width=sides[1], spans=spans)


def read_frames(name: str, path: str, frame_ids: Sequence[int]) -> Iterator["np.ndarray"]:
    """Some frames of a video, one after the other.

    Args:
        name: what the file is for, for messages.
        path: of the file.
        frame_ids: which, ascending; the same frame may be asked for several times in a row.

    Yields:
        For each a picture [H, W, 3] in uint8, turned as it is to be shown.

    Raises:
        UsageError: as `inspect_video`, or the video has no such frame.
        ValueError: they do not ascend.
    """
    import numpy as np

    if list(frame_ids) != sorted(frame_ids):
        raise ValueError(f"frame_ids={list(frame_ids)} do not ascend; a video is read from its beginning to its end")
    wanted = list(reversed(frame_ids))
    for index, (frame, _) in enumerate(_frames(name, path)):
        if not wanted:
            return
        if wanted[-1] == index:
            turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // QUARTER)
            picture = np.ascontiguousarray(turned)  # torch takes no negative strides
            while wanted and wanted[-1] == index:
                wanted.pop()
                yield picture
    if wanted:
        raise UsageError(f"{name}={path} has no frame {wanted[-1]}; it changed while it was read, so start again")


def _shown_sides(frame: Any) -> tuple[int, int]:  # noqa: ANN401 # a frame of PyAV, which may be absent
    """Height and width of a frame as it is shown."""
    is_turned = frame.rotation // QUARTER % 2
    return (frame.width, frame.height) if is_turned else (frame.height, frame.width)


def _frames(name: str, path: str) -> Iterator[tuple[Any, Any]]:
    """Every frame in the order in which it is shown, and the video's rate in frames a second, if it has one."""
    try:
        import av
    except ImportError as error:
        raise MissingPackageError(
            f"{name}={path} needs the package av to be read; install wan-sweep[video], or leave {name} out"
        ) from error
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UsageError(f"{name}={path} holds no video; give a file such as an mp4 that does")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                yield frame, stream.average_rate
    except (av.error.FFmpegError, OSError) as error:
        raise UsageError(f"{name}={path} is no video that can be read ({error.strerror}); give another file") from error
