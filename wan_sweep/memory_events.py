"""memory_events.json: every boundary of a run with its counters, for people and for tools (docs/memory.md).

The worker appends a line per boundary to events.jsonl while it runs; afterwards, however that ended, the lines become
one document with a head.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wan_sweep.errors import RecordError
from wan_sweep.store import MEASURE, MEMORY_EVENTS_FILE, read_json, write_json

SCHEMA_VERSION = 1


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The events in a file of lines; a last line that was cut off is left out, and a missing file holds none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "allocated_bytes" in event:
            events.append(event)
    return events


def write_memory_events(folder: Path, head: Mapping[str, Any]) -> bool:
    """Turns the lines that a worker left in its job's folder into memory_events.json.

    Args:
        folder: The job's, or that of one of its ranks.
        head: What the document says of the job before its events.

    Returns:
        Whether there were any events; without, no file is written.

    Raises:
        OSError: the file cannot be written.
    """
    events = read_lines(folder / MEASURE.events)
    if not events:
        return False
    started_at = datetime.fromtimestamp(events[0]["time"], UTC).isoformat(timespec="milliseconds")
    document = {"schema_version": SCHEMA_VERSION, "rank": 0, **head, "started_at": started_at, "events": events}
    write_json(folder / MEMORY_EVENTS_FILE, document)
    return True


def read_memory_events(path: Path) -> dict[str, Any]:
    """The document in a file, or in the file of this name in a job's folder.

    Raises:
        RecordError: it cannot be read, is none, or is of another version.
    """
    if path.is_dir():
        path = path / MEMORY_EVENTS_FILE
    document = read_json(path)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or not isinstance(document.get("events"), list):
        raise RecordError(
            f"{path} is not a memory_events.json of version {SCHEMA_VERSION} (schema_version={version}); "
            "read it with the version of wan_sweep that wrote it"
        )
    return document
