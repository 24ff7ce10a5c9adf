"""Reads a JSON file piece by piece, so that a trace larger than the memory can be analysed.

Python's own decoder takes the events one after the other from a buffer of a few MiB. It is as fast as a streaming
parser, and admits the NaN and the control characters that real traces hold.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from wan_sweep.analyze.source import UnreadableFileError

EVENTS_KEY = "traceEvents"

_CHUNK_BYTES = 1 << 20
_MAX_VALUE_CHARACTERS = 256 << 20
_LONGEST_LITERAL = 12
_LONGEST_BREAK = 3
_SPACE = re.compile("[ \t\n\r\ufeff]*")
_COMMA = re.compile("[ \t\n\r]*,[ \t\n\r]*")


class JsonFile:
    """One JSON file, read once from its beginning to its end.

    Attributes:
        header: What a top-level object holds beside its events; complete when `events` has ended.
        has_events: Whether there is an array of events.
        is_closed: False for an array of events without its last bracket, which the format allows.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.header: dict[str, Any] = {}
        self.has_events = False
        self.is_closed = True
        self._stream = stream
        self._path = path
        self._text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decode = json.JSONDecoder(strict=False).raw_decode
        self._buffer = ""
        self._position = 0
        self._num_dropped = 0
        self._is_at_end = False

    def events(self) -> Iterator[Any]:
        """The elements of the array of events: of the whole file, or of a top-level object's `traceEvents`.

        Raises:
            UnreadableFileError: the JSON is cut off or damaged.
        """
        if self._next() == "[":
            yield from self._elements(may_stay_open=True)
        else:
            for key in self._members():
                if key == EVENTS_KEY and self._next() == "[":
                    yield from self._elements(may_stay_open=False)
                else:
                    self.header[key] = self._value()
        if self._next():
            raise self._damaged(
                "a second value follows, as in a .jsonl file; of a job, analyze memory_events.json instead"
            )

    def _members(self) -> Iterator[str]:
        """The keys of an object; the caller reads each value."""
        self._expect("{")
        while self._next() != "}":
            key = self._value()
            if not isinstance(key, str):
                raise self._damaged("a key is no text")
            self._expect(":")
            yield key
            if self._next() != "}":
                self._expect(",")
        self._expect("}")

    def _elements(self, *, may_stay_open: bool) -> Iterator[Any]:
        self.has_events = True
        self._expect("[")
        while (character := self._next()) != "]":
            if not character and may_stay_open:
                self.is_closed = False
                return
            yield from self._buffered_elements()
            yield self._value()
            if (character := self._next()) or not may_stay_open:
                self._expect("," if character != "]" else "]")
                if character == "]":
                    return
        self._expect("]")

    def _buffered_elements(self) -> Iterator[Any]:
        """The elements that lie in the buffer with the comma behind them: all but one or two of each chunk."""
        decode, buffer, position = self._decode, self._buffer, self._position
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            while True:
                value, end = decode(buffer, position)
                comma = _COMMA.match(buffer, end)
                if comma is None or comma.end() == len(buffer) or buffer[comma.end()] == "]":
                    return
                self._position = position = comma.end()
                yield value

    def _value(self) -> Any:  # noqa: ANN401 # JSON can be anything
        self._next()
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _LONGEST_LITERAL
                if not (is_cut and self._read_on()):
                    raise self._cut_off() if is_cut else self._damaged(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._damaged("it is nested too deeply") from error
            else:
                length = end - self._position
                # A number near the end of the buffer may go on: 1 may become 1.5, and 1e+ become 1e+5.
                if end <= len(self._buffer) - _LONGEST_BREAK or not self._read_on():
                    self._position += length
                    return value

    def _next(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            self._position = _SPACE.match(self._buffer, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._buffer) or not self._read_on():
                return self._buffer[self._position : self._position + 1]

    def _expect(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise self._damaged(f"{found!r} stands where {character!r} belongs") if found else self._cut_off()
        self._position += 1

    def _read_on(self) -> bool:
        """Reads at least as much again as is left, so that a long value is tried only a few times."""
        rest = self._buffer[self._position :]
        if len(rest) > _MAX_VALUE_CHARACTERS:
            raise self._damaged(f"one value has more than {_MAX_VALUE_CHARACTERS >> 20} Mi characters")
        self._num_dropped += self._position
        self._position = 0
        if self._is_at_end:
            self._buffer = rest
            return False
        chunk = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._is_at_end = not chunk
        self._buffer = rest + self._text.decode(chunk, final=self._is_at_end)
        return len(self._buffer) > len(rest) or not self._is_at_end

    def _cut_off(self) -> UnreadableFileError:
        return UnreadableFileError(
            f"{self._path} is cut off, or damaged at its very end: its JSON is not complete; copy or record it again"
        )

    def _damaged(self, what: str, position: int | None = None) -> UnreadableFileError:
        place = self._num_dropped + (self._position if position is None else position)
        return UnreadableFileError(f"{self._path} is damaged: its JSON is wrong at character {place:,}: {what}")
