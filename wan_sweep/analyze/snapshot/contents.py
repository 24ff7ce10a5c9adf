"""What a memory snapshot holds, checked: torch.cuda.memory._snapshot(), or the file that _dump_snapshot wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_sweep.allocator import Settings
from wan_sweep.analyze.checked import finite, whole
from wan_sweep.analyze.source import UnreadableFileError

Entry = Mapping[str, Any]

ACTIVE_STATES = {
    "active_allocated": "allocated",
    "active_awaiting_free": "awaiting_free",
    "active_pending_free": "awaiting_free",
}


@dataclass(frozen=True, kw_only=True)
class FinalBlock:
    """A block that is not free at the end."""

    address: int
    num_bytes: int
    requested_bytes: int
    is_awaiting_free: bool
    frames: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FinalSegment:
    """A segment, or a mapped stretch of an expandable one, at the end."""

    address: int
    num_bytes: int
    stream: int
    is_expandable: bool
    blocks: Sequence[FinalBlock]


@dataclass(frozen=True, kw_only=True)
class DeviceSnapshot:
    """What a snapshot says of one device: the final segments, and the history from old to new."""

    device: int
    settings: Settings
    settings_text: str
    segments: Sequence[FinalSegment]
    entries: Sequence[Entry]


def is_snapshot(value: object) -> bool:
    """Whether this looks like a snapshot at all."""
    return isinstance(value, Mapping) and isinstance(value.get("segments"), list)


def device_snapshots(raw: Mapping[str, Any], name: str) -> list[DeviceSnapshot]:
    """A part for each device that has segments or a history.

    Args:
        raw: The snapshot.
        name: What messages call it.

    Raises:
        UnreadableFileError: it is not built as a snapshot is.
    """
    if not is_snapshot(raw):
        raise UnreadableFileError(
            f"{name} holds no memory snapshot: that is a dict with 'segments' and 'device_traces', "
            "as torch.cuda.memory._dump_snapshot writes it"
        )
    try:
        traces = raw.get("device_traces") or []
        settings, text = _settings(raw)
        segments: dict[int, list[FinalSegment]] = {}
        for segment in raw["segments"]:
            segments.setdefault(whole(segment.get("device", 0)), []).append(_segment(segment))
        devices = sorted({*segments, *(index for index, entries in enumerate(traces) if entries)})
        return [
            DeviceSnapshot(
                device=device,
                settings=settings,
                settings_text=text,
                segments=segments.get(device, []),
                entries=[_checked(entry) for entry in traces[device]] if device < len(traces) else [],
            )
            for device in devices
        ]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UnreadableFileError(
            f"{name} is no memory snapshot that this tool understands: {error!r} in its segments, settings or history"
        ) from error


def _settings(raw: Mapping[str, Any]) -> tuple[Settings, str]:
    told = raw.get("allocator_settings") or {}
    max_split = int(told.get("max_split_size", -1))
    divisions = tuple(int(value) for value in (told.get("roundup_power2_divisions") or {}).values())
    is_expandable = any(segment.get("is_expandable") for segment in raw["segments"])
    settings = Settings(
        expandable_segments=bool(told.get("expandable_segments", is_expandable)),
        max_split_bytes=max_split if max_split > 0 else None,
        roundup_divisions=divisions if any(divisions) else (),
    )
    return settings, str(told.get("PYTORCH_CUDA_ALLOC_CONF") or told.get("PYTORCH_ALLOC_CONF") or "")


def _segment(raw: Mapping[str, Any]) -> FinalSegment:
    blocks = []
    address = whole(raw["address"])
    for block in raw["blocks"]:
        if block["state"] in ACTIVE_STATES:
            blocks.append(
                FinalBlock(
                    address=whole(block.get("address", address)),
                    num_bytes=whole(block["size"]),
                    requested_bytes=whole(block.get("requested_size", block["size"])),
                    is_awaiting_free=ACTIVE_STATES[block["state"]] == "awaiting_free",
                    frames=_frames(block),
                )
            )
        address += whole(block["size"])
    return FinalSegment(
        address=whole(raw["address"]),
        num_bytes=whole(raw["total_size"]),
        stream=_stream(raw),
        is_expandable=bool(raw.get("is_expandable", False)),
        blocks=blocks,
    )


def _stream(raw: Mapping[str, Any]) -> int:
    stream = raw.get("stream", 0)
    if not isinstance(stream, int):
        raise TypeError(f"{stream!r} is no stream")
    return stream


def _frames(raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    frames = raw.get("frames") or []
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise TypeError("frames are no list of dicts")
    return frames


def _checked(entry: Entry) -> Entry:
    """An entry that has what its action needs."""
    action = entry["action"]
    if action in {"alloc", "free_requested", "free_completed"} or action.startswith("segment_"):
        whole(entry["addr"])
    if action != "snapshot":
        whole(entry["size"])
    whole(entry.get("device_free", 0))
    finite(entry.get("time_us", 0))
    _stream(entry)
    _frames(entry)
    return entry
