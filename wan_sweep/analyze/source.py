"""The bytes of a file, decompressed if need be, counted as they are read; and what kind of file they make."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from wan_sweep.errors import SweepError

Encoding = Literal["json", "pickle"]
OnRead = Callable[[int], None]

READS = (
    "a Chrome trace, a memory_events.json or attribution.json of wan_sweep, or a memory snapshot of torch "
    "(each may be gzipped)"
)

_GZIP_MAGIC = b"\x1f\x8b"
_PICKLE_MAGIC = b"\x80"
_BUFFER_BYTES = 1 << 20
_SNIFFED_BYTES = 4096
_OTHERS = {
    b"PK\x03\x04": "a zip archive, such as torch.save writes",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "a picture",
    b"<": "HTML or XML; if a page holds a trace, save the JSON itself",
}


class UnreadableFileError(SweepError):
    """A file cannot be analysed: it is missing, damaged, or of a kind that is not known."""

    exit_code = 2


class _CountedFile(io.RawIOBase):
    """A file that says how many of its bytes were read."""

    def __init__(self, path: Path, on_read: OnRead) -> None:
        self._file = path.open("rb", buffering=0)
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer) or 0
        self._on_read(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """The content of a gzipped file; what is wrong with it is told in words."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._file = file
        self._path = path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        try:
            return self._gzip.readinto(buffer)
        except EOFError as error:
            raise UnreadableFileError(
                f"{self._path} is cut off: its gzip data ends too early; copy or record it again"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UnreadableFileError(
                f"{self._path} is damaged: it is not valid gzip ({error}); copy or record it again"
            ) from error

    def close(self) -> None:
        self._gzip.close()
        self._file.close()
        super().close()


@contextmanager
def open_source(path: Path, on_read: OnRead) -> Iterator[tuple[io.BufferedReader, Encoding]]:
    """Opens a file and looks at its first bytes; its name does not matter.

    Args:
        path: The file.
        on_read: Is told how many bytes of the file, as it lies on the disk, were read.

    Raises:
        UnreadableFileError: it is missing, empty, no file, damaged, or of a kind that is not read.
    """
    try:
        stream: io.BufferedReader = io.BufferedReader(_CountedFile(path, on_read), _BUFFER_BYTES)
    except IsADirectoryError as error:
        raise UnreadableFileError(f"{path} is a folder; name the file in it that is to be analysed") from error
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        if stream.peek(2)[:2] == _GZIP_MAGIC:
            stream = io.BufferedReader(_Decompressed(stream, path), _BUFFER_BYTES)
        yield stream, _encoding(stream.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES], path)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror or error}") from error
    finally:
        stream.close()


def _encoding(head: bytes, path: Path) -> Encoding:
    if not head:
        raise UnreadableFileError(f"{path} is empty; record it again")
    if head.startswith(_PICKLE_MAGIC):
        return "pickle"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in {b"{", b"["}:
        return "json"
    for magic, what in _OTHERS.items():
        if text.startswith(magic):
            raise UnreadableFileError(f"{path} is {what}; this tool reads {READS}")
    raise UnreadableFileError(f"{path} begins with {text[:12]!r}, which is neither JSON nor a pickle; give {READS}")
