"""What a worker tells while it works: events.jsonl, read as it grows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Event:
    """A span of the pipeline that begins or ends."""

    event: Literal["begin", "end"]
    kind: str
    name: str
    index: int | None = None
    total: int | None = None
    time: float = 0.0


def parse_event(line: bytes) -> Event | None:
    """The event in a line; None for a line that is none, such as a half-written one."""
    try:
        values: Any = json.loads(line)
        if values["event"] not in {"begin", "end"}:
            return None
        return Event(
            event=values["event"],
            kind=str(values["kind"]),
            name=str(values["name"]),
            index=values.get("index"),
            total=values.get("total"),
            time=float(values.get("time", 0.0)),
        )
    except (ValueError, TypeError, KeyError):
        return None


class EventTail:
    """Reads what was appended to a file since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._partial = b""

    def read(self) -> list[Event]:
        """New events; complete lines only."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(content)
        *lines, self._partial = (self._partial + content).split(b"\n")
        return [event for line in lines if (event := parse_event(line))]


class Position:
    """Where a worker is: the spans that have begun and not ended."""

    def __init__(self) -> None:
        self._open: list[Event] = []

    def follow(self, event: Event) -> None:
        """Takes an event into account."""
        if event.event == "begin":
            self._open.append(event)
            return
        for place in range(len(self._open) - 1, -1, -1):
            begun = self._open[place]
            if (begun.kind, begun.name, begun.index) == (event.kind, event.name, event.index):
                del self._open[place:]
                return

    def __str__(self) -> str:
        words = []
        for span in self._open:
            if span.kind in {"step", "block"} and span.index is not None:
                total = "" if span.total is None else f" of {span.total}"
                words.append(f"{span.kind} {span.index + 1}{total}")
            else:
                words.append(span.name)
        return ", ".join(words)


class Ears:
    """Hears all workers of a job, and knows where each of them is.

    Args:
        paths: The file of each.
        on_event: Hears what the first of them tells.
    """

    def __init__(self, paths: Sequence[Path], on_event: Callable[[Event], None]) -> None:
        self._tails = [EventTail(path) for path in paths]
        self._positions = [Position() for _ in paths]
        self._on_event = on_event

    @property
    def wheres(self) -> list[str]:
        """Where each worker is, in words."""
        return [str(position) for position in self._positions]

    def listen(self) -> bool:
        """Hears what is new; returns whether there was anything."""
        return self._hear(self._on_event)

    def catch_up(self) -> None:
        """Hears what is new without passing it on."""
        self._hear(lambda _: None)

    def _hear(self, on_event: Callable[[Event], None]) -> bool:
        has_heard = False
        for index, (tail, position) in enumerate(zip(self._tails, self._positions, strict=True)):
            for event in tail.read():
                has_heard = True
                position.follow(event)
                if index == 0:
                    on_event(event)
        return has_heard
