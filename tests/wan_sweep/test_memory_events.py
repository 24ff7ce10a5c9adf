"""From lines that a worker leaves to a document that people and tools read."""

import json
from pathlib import Path

import pytest

from wan_sweep.errors import RecordError
from wan_sweep.memory_events import read_lines, read_memory_events, write_memory_events

HEAD = {"job": {"key": "k", "number": 1, "name": "1_x", "repeat": 0}, "sweep": {"name": "s"}, "device": "cpu"}
LINE = {"name": "denoise", "kind": "phase", "event": "begin", "time": 1_700_000_000.0, "allocated_bytes": 7}


def test_lines_become_a_document_with_a_head(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE)}\n")
    assert write_memory_events(tmp_path, HEAD)
    document = read_memory_events(tmp_path)
    assert document["events"] == [LINE, LINE]
    assert document["started_at"] == "2023-11-14T22:13:20.000+00:00"
    assert (document["schema_version"], document["rank"], document["device"]) == (1, 0, "cpu")


def test_a_line_that_was_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE)[:40]}")
    assert read_lines(path) == [LINE]


def test_a_job_without_events_leaves_no_document(tmp_path: Path) -> None:
    assert not write_memory_events(tmp_path, HEAD)
    assert list(tmp_path.iterdir()) == []


def test_a_document_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "memory_events.json").write_text('{"schema_version": 9, "events": []}')
    with pytest.raises(RecordError, match="schema_version=9"):
        read_memory_events(tmp_path)
