"""The pictures that a task begins from, as the language model is shown them. No torch in here.

Letters: H, W of a picture.
"""

from typing import TYPE_CHECKING

from wan21.config import ModelSpec, Request
from wan21.examples import example_picture
from wan21.pictures import read_picture
from wan21.sources import PICTURES, TASK_SOURCES

if TYPE_CHECKING:
    import numpy as np


def shown_sources(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the sources that are the first frame, or the first and the last, of what the task makes."""
    return tuple(name for name in TASK_SOURCES.get(spec.task, ()) if name in PICTURES)


def shown_pictures(spec: ModelSpec, request: Request) -> "list[np.ndarray]":
    """The pictures, [H, W, 3] in uint8; the built-in examples where none are given.

    Raises:
        UsageError: a file that is no picture.
    """
    pictures = []
    for index, name in enumerate(shown_sources(spec)):
        path = getattr(request.sources, name)
        if path is None:
            pictures.append(example_picture(request.shape.width, request.shape.height, progress=float(index)))
        else:
            pictures.append(read_picture(name, path))
    return pictures
