"""The files that a video is made from besides the prompt: which task takes which, and whether they can be used.

No torch in here: whoever plans runs without a GPU imports this file.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wan21.errors import UsageError
from wan21.examples import example_picture
from wan21.pictures import picture_size, read_picture
from wan21.shapes import VideoShape
from wan21.videos import inspect_video

if TYPE_CHECKING:
    import numpy as np

TASK_SOURCES: Mapping[str, tuple[str, ...]] = {
    "i2v": ("image",),
    "flf2v": ("first_frame", "last_frame"),
    "vace": ("src_video", "src_mask", "src_ref_images"),
}
"""What each task takes; a task that is not here takes no files."""

FRAMES = ("image", "first_frame", "last_frame")
PICTURES = (*FRAMES, "src_ref_images")
STAND_INS = {**dict.fromkeys(FRAMES, "the built-in example"), "src_video": "a blank one"}
"""What is taken where nothing is given."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Paths; what is not given is None, or for several files empty.

    image: the video's first frame, of image to video.
    first_frame, last_frame: the video's first and last frame.
    src_video, src_mask, src_ref_images: of controlled generation.
    """

    image: str | None = None
    first_frame: str | None = None
    last_frame: str | None = None
    src_video: str | None = None
    src_mask: str | None = None
    src_ref_images: tuple[str, ...] = ()

    def given(self) -> dict[str, tuple[str, ...]]:
        """The paths that are given, by name."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value:
                found[field.name] = (value,) if isinstance(value, str) else value
        return found

    def fingerprints(self) -> dict[str, str]:
        """For each name that is given, digits that change with the content of its files and not with their places.

        Raises:
            UsageError: a file does not exist.
        """
        return {
            name: ",".join(_fingerprint(name, path, _state(name, path)) for path in paths)
            for name, paths in self.given().items()
        }


NO_SOURCES = Sources()


class HasTask(Protocol):
    """What of a ModelSpec matters here."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def task(self) -> str:
        """What it makes from what."""


def check_sources(spec: HasTask, sources: Sources) -> None:
    """Refuses files that the task does not take, that lack a companion, or that cannot be used.

    What is not given at all is no error where an example of our own stands in: the picture of i2v, both of flf2v.

    Raises:
        UsageError: names what was given, the rule and the way out.
    """
    taken = TASK_SOURCES.get(spec.task, ())
    given = sources.given()
    for name, paths in given.items():
        if name not in taken:
            owner = next(task for task, names in TASK_SOURCES.items() if name in names)
            theirs = f"{spec.name} takes {' and '.join(taken)}" if taken else f"{spec.name} takes no files"
            raise UsageError(
                f"{name}={','.join(paths)} belongs to the {owner} models, and {theirs}; leave {name} out, "
                f"or choose a model of {owner}"
            )
    if spec.task == "flf2v" and len(given) == 1:
        there = next(iter(given))
        absent = "last_frame" if there == "first_frame" else "first_frame"
        raise UsageError(
            f"{there}={given[there][0]} needs {absent} as well; give both, or neither for the built-in example"
        )
    if sources.src_mask is not None:
        _check_mask(sources.src_mask, sources.src_video)
    elif sources.src_video is not None:
        inspect_video("src_video", sources.src_video)
    for name in PICTURES:
        for path in given.get(name, ()):
            picture_size(name, path)


def described(spec: HasTask, sources: Sources) -> str:
    """What a video is made from besides the prompt, in a few words for the record; empty if that is nothing.

    A file goes by its name and fingerprint; what stands in for one that is not given is said to do so.
    """
    given, prints = sources.given(), sources.fingerprints()
    words = []
    for name in TASK_SOURCES.get(spec.task, ()):
        if name in given:
            files = ", ".join(Path(path).name for path in given[name])
            words.append(f"{name} {files} (sha256 {prints[name]})")
        elif name in STAND_INS:
            words.append(f"{name} {STAND_INS[name]}")
    return "; ".join(words)


def frame_sources(spec: HasTask) -> tuple[str, ...]:
    """Names of the sources that are frames of what the task makes: the first, or the first and the last."""
    return tuple(name for name in TASK_SOURCES.get(spec.task, ()) if name in FRAMES)


def read_frames(spec: HasTask, sources: Sources, shape: VideoShape) -> "list[np.ndarray]":
    """The pictures of `frame_sources`, [height, width, 3] in uint8; where none is given, examples of the video's size.

    Raises:
        UsageError: a file is gone or damaged meanwhile.
    """
    names = frame_sources(spec)
    pictures = []
    for index, name in enumerate(names):
        path, progress = getattr(sources, name), index / max(1, len(names) - 1)
        is_given = path is not None
        pictures.append(
            read_picture(name, path) if is_given else example_picture(shape.width, shape.height, progress=progress)
        )
    return pictures


def _check_mask(mask: str, video: str | None) -> None:
    """A mask belongs to a video, frame by frame and pixel by pixel."""
    if video is None:
        raise UsageError(
            f"src_mask={mask} needs src_video as well: without a video upstream passes over the mask; give both, or "
            "leave src_mask out"
        )
    ours, theirs = inspect_video("src_mask", mask), inspect_video("src_video", video)
    for what, of_mask, of_video in (
        ("pixels", f"{ours.width}*{ours.height}", f"{theirs.width}*{theirs.height}"),
        ("frames", str(ours.num_frames), str(theirs.num_frames)),
    ):
        if of_mask != of_video:
            raise UsageError(
                f"src_mask={mask} has {of_mask} {what} and src_video={video} has {of_video}; give a mask of the "
                "video's size and length"
            )


def _state(name: str, path: str) -> tuple[int, int]:
    try:
        state = Path(path).stat()
    except OSError as error:
        raise UsageError(f"{name}={path} cannot be read: {error.strerror}; give the path of a file") from error
    return state.st_mtime_ns, state.st_size


@cache
def _fingerprint(name: str, path: str, state: tuple[int, int]) -> str:  # noqa: ARG001 # of the file: a key
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UsageError(f"{name}={path} cannot be read: {error.strerror}; check its permissions") from error
