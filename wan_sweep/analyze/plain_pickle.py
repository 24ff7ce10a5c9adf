"""Reads a pickle that holds plain values only. A pickle can name any function to be called; here none ever is."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from wan_sweep.analyze.source import UnreadableFileError


class _RefusedError(Exception):
    """The pickle wants something that is no plain value."""


class _PlainUnpickler(pickle.Unpickler):  # noqa: S301 - this class is what makes it safe
    """Admits dict, list, tuple, str, bytes, int, float, bool and None: what pickles build without naming anything."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _RefusedError(f"{module_name}.{global_name}")

    def persistent_load(self, pid: object, /) -> NoReturn:
        raise _RefusedError(f"an object that is stored elsewhere ({pid!r})")


def load_plain(stream: BinaryIO, path: Path) -> Any:  # noqa: ANN401 # a pickle can be anything
    """The value in a pickle.

    Raises:
        UnreadableFileError: it is damaged, or holds anything but plain values; nothing of it was executed.
    """
    try:
        return _PlainUnpickler(stream).load()
    except _RefusedError as error:
        raise UnreadableFileError(
            f"{path} is refused: it is a pickle that wants {error}, and a memory snapshot holds only plain values "
            "(dict, list, tuple, str, bytes, numbers); nothing in it was executed"
        ) from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UnreadableFileError(
            f"{path} is cut off or damaged: it is not a complete pickle ({error}); copy or record it again"
        ) from error
