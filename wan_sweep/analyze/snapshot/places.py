"""Says which code allocated a block, from the stack or the metadata that the history recorded with it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from wan_sweep.analyze.snapshot.replay import BEFORE_THE_HISTORY, Allocation, Replay

_OF_TORCH = re.compile(r"(site|dist)-packages[/\\]torch[/\\]")
_SHOWN_FOLDERS = 2
BEFORE = "before the history"


def frame_label(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost Python frame outside torch; empty where no frames were recorded."""
    python = [frame for frame in frames if str(frame.get("filename", "")).endswith(".py")]
    outside = [frame for frame in python if not _OF_TORCH.search(frame["filename"])]
    chosen = next(iter(outside or python or frames), None)
    if chosen is None:
        return ""
    path = re.split(r"[/\\]", str(chosen.get("filename", "")))
    return f"{'/'.join(path[-_SHOWN_FOLDERS:])}:{chosen.get('line', '?')} {chosen.get('name', '')}".rstrip()


def first_part(metadata: str) -> str:
    """The phase in phase/step/block/module, and all of a text without such parts."""
    return metadata.split("/", 1)[0]


class Places:
    """Frames and metadata of what a replay allocated."""

    def __init__(self, replay: Replay) -> None:
        self._entries = replay.snapshot.entries
        self.has_frames = any(entry.get("frames") for entry in self._entries)
        self.has_metadata = any(entry.get("user_metadata") for entry in self._entries)

    def frame(self, one: Allocation) -> str:
        """Which line of code allocated it; empty where that was not recorded."""
        if one.born == BEFORE_THE_HISTORY:
            label = frame_label(one.final.frames) if one.final is not None else ""
            return label or (BEFORE if self.has_frames else "")
        return frame_label(self._entries[one.born].get("frames") or ())

    def metadata(self, one: Allocation) -> str:
        """The metadata that was set when it was allocated; empty where none was."""
        if one.born == BEFORE_THE_HISTORY:
            return BEFORE if self.has_metadata else ""
        return self.metadata_at(one.born)

    def metadata_at(self, index: int) -> str:
        """The metadata of an entry."""
        return str(self._entries[index].get("user_metadata") or "") if index >= 0 else ""

    def frame_at(self, index: int) -> str:
        """The code of an entry."""
        return frame_label(self._entries[index].get("frames") or ()) if index >= 0 else ""
