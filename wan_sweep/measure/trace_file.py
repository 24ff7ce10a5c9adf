"""One trace file made of several: what torch's profiler saved, part after part, as gzip and of bounded size."""

import codecs
import contextlib
import gzip
import json
import mmap
import os
import re
from pathlib import Path

_BEFORE_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_EVENT = re.compile(rb'"ph"\s*:')
_TRACE_NAME = re.compile(rb'"traceName"\s*:\s*"[^"]*"')
_NO_TEXT = bytes(set(range(32)) - set(b"\t\n\r"))
"""Torch 2.6 saves names of code that is gone by then, which can be any bytes; no reader takes these."""
_SLICE_BYTES = 2**20


class TraceFile:
    """A trace in Chrome's format that grows by parts and has its name only when it is whole.

    A part is a file that torch's profiler saved: a head, a list of events, a foot. This one gets the head of its first
    part, the foot of its last, and the events of all, copied as text: no part is ever parsed or held in memory. Parts
    must come from one process. Then their times count from one origin, and no two events have the same identifier for
    what ties a kernel to its operation.

    Args:
        path: the file, ending in .gz.
        max_bytes: most that it may hold, uncompressed.
        title: what viewers call the process; torch's profiler says "python" of every rank.
    """

    def __init__(self, path: Path, *, max_bytes: int, title: str) -> None:
        self.path = path
        self.uncompressed_bytes = 0
        self.num_events = 0
        self._max_bytes = max_bytes
        self._unfinished = path.with_name(f".{path.name}.part")
        self._gzip: gzip.GzipFile | None = None
        self._foot = b""
        name = {"name": "process_name", "ph": "M", "pid": os.getpid(), "tid": 0, "args": {"name": title}}
        self._title = json.dumps(name).encode()

    @property
    def room_bytes(self) -> int:
        """How much more it may take."""
        return self._max_bytes - self.uncompressed_bytes - 2 * len(self._title)

    def append(self, part: Path) -> bool:
        """Takes a part in; False, and nothing is taken, if that would make the file larger than it may be.

        Raises:
            OSError: the part has no end, or something cannot be read or written. There is no file then.
        """
        if part.stat().st_size > self.room_bytes:
            return False
        try:
            with part.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                self._copy(text, part.name)
        except BaseException:
            self._discard()
            raise
        return True

    def close(self) -> None:
        """Ends the file and gives it its name. Without parts there is none.

        Raises:
            OSError: it cannot be written. There is no file then.
        """
        if self._gzip is None:
            return
        try:
            # Each part names the process, too, and which name counts depends on the viewer: so first and last.
            self._write(self._gzip, b"," + self._title + self._foot)
            self.num_events += 1
            self._gzip.close()
            with self._unfinished.open("rb") as file:
                os.fsync(file.fileno())
            self._unfinished.replace(self.path)
            self._gzip = None
        except BaseException:
            self._discard()
            raise

    def _copy(self, text: mmap.mmap, name: str) -> None:
        head, end = _BEFORE_EVENTS.search(text), text.rfind(b"]")
        if head is None or end < head.end() or text.find(b"}", end) < 0:
            raise OSError(
                f"{name} ends in the middle: the profiler could not save it whole; see that the disk has room"
            )
        if self._gzip is None:
            self._gzip = gzip.GzipFile(self._unfinished, "wb")
            self._write(self._gzip, text[: head.end()] + self._title)
            self.num_events += 1
        self._write(self._gzip, b",")
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        for start in range(head.end(), end, _SLICE_BYTES):
            content = text[start : min(start + _SLICE_BYTES, end)].translate(None, _NO_TEXT)
            self._write(self._gzip, decoder.decode(content).encode())
        self.num_events += sum(1 for _ in _EVENT.finditer(text, head.end(), end))
        self._foot = _TRACE_NAME.sub(b'"traceName": "' + self.path.stem.encode() + b'"', text[end:])

    def _write(self, file: gzip.GzipFile, content: bytes) -> None:
        self.uncompressed_bytes += file.write(content)

    def _discard(self) -> None:
        if self._gzip is not None:
            with contextlib.suppress(OSError):  # what it still holds is not wanted, and may not fit
                self._gzip.close()
        self._unfinished.unlink(missing_ok=True)
        self._gzip = None
        self.uncompressed_bytes = self.num_events = 0
