"""Pictures from files; without torch, so that a plan can look at them.

Letters: H, W of a picture.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from wan21.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


def read_picture(name: str, path: str) -> "np.ndarray":
    """The picture in a file, [H, W, 3] in uint8.

    As upstream, transparency is dropped and a rotation that the file's metadata ask for is not done.

    Args:
        name: what the file is for, for messages.
        path: of the file.

    Raises:
        UsageError: there is no such file, it cannot be read, or it is no whole picture.
    """
    import numpy as np
    from PIL import Image

    _require_file(name, path)
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    # What the readers of the many formats raise for a damaged file.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{name}={path} is no picture that can be read ({reason}); give a PNG or JPEG file") from error


def picture_size(name: str, path: str) -> tuple[int, int]:
    """Width and height of the picture in a file, all of which is read once, however often it is asked.

    Raises:
        UsageError: as `read_picture`.
    """
    _require_file(name, path)
    state = Path(path).stat()
    return _picture_size(name, path, (state.st_mtime_ns, state.st_size))


@functools.cache
def _picture_size(name: str, path: str, state: tuple[int, int]) -> tuple[int, int]:  # noqa: ARG001 # of the file: a key
    height, width, _ = read_picture(name, path).shape
    return width, height


def _require_file(name: str, path: str) -> None:
    if not Path(path).is_file():
        state = "is not a file" if Path(path).exists() else "does not exist"
        raise UsageError(f"{name}={path} {state}; give the path of a file")
