"""Finds out from its content what kind of file it is, and has it analysed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_sweep.analyze.chrome.analysis import analyze_trace, collect
from wan_sweep.analyze.finding import Analysis
from wan_sweep.analyze.json_stream import JsonFile
from wan_sweep.analyze.plain_pickle import load_plain
from wan_sweep.analyze.run import attribution, memory_events
from wan_sweep.analyze.snapshot.analysis import analyze_snapshot
from wan_sweep.analyze.source import READS, OnRead, UnreadableFileError, open_source
from wan_sweep.memory_events import SCHEMA_VERSION as MEMORY_EVENTS_VERSION

DEFAULT_TOP = 10
_SHOWN_KEYS = 6


def analyze(path: Path, *, top: int = DEFAULT_TOP, on_read: OnRead = lambda _: None) -> Analysis:
    """What a file says.

    Args:
        path: A Chrome trace, memory_events.json, attribution.json or memory snapshot; gzipped or not.
        top: How many rows a table has at most.
        on_read: Is told how many bytes were read, again and again.

    Raises:
        UnreadableFileError: the file cannot be read, is damaged, or is of another kind.
    """
    with open_source(path, on_read) as (stream, encoding):
        if encoding == "pickle":
            return analyze_snapshot(load_plain(stream, path), path, top)
        file = JsonFile(stream, path)
        collector = collect(file.events())
    if not file.has_events:
        return _analyze_object(file.header, path, top)
    if collector.num_malformed == collector.num_events and not file.header:
        raise UnreadableFileError(
            f"{path} holds a JSON array of {collector.num_events:,} elements, and none of them is an event of a trace; "
            f"this tool reads {READS}"
        )
    return analyze_trace(collector, file, path, top)


def _analyze_object(content: Mapping[str, Any], path: Path, top: int) -> Analysis:
    """One of wan_sweep's own files."""
    if isinstance(content.get("events"), list):
        _check_version(content, MEMORY_EVENTS_VERSION, path)
        return memory_events.analyze_memory_events(content, path, top)
    if isinstance(content.get("peaks"), list):
        _check_version(content, attribution.SCHEMA_VERSION, path)
        return attribution.analyze_attribution(content, path, top)
    if "metrics" in content and "job" in content:
        raise UnreadableFileError(
            f"{path} is the record of a job, which the report shows: python -m wan_sweep.report SWEEP_FOLDER; "
            f"this tool reads {READS}"
        )
    keys = ", ".join(list(content)[:_SHOWN_KEYS]) or "none"
    raise UnreadableFileError(f"{path} is JSON, but no trace: its keys are {keys}; this tool reads {READS}")


def _check_version(content: Mapping[str, Any], known: int, path: Path) -> None:
    version = content.get("schema_version")
    if version != known:
        raise UnreadableFileError(
            f"{path} has schema_version={version}; this version of wan_sweep reads {known}, so analyze the file with "
            "the version that wrote it"
        )
