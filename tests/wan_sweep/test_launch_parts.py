import json
from collections.abc import Iterator
from pathlib import Path

from wan_sweep.launch.device import wait_for_baseline
from wan_sweep.launch.events import Event, EventTail, Position, parse_event
from wan_sweep.launch.outcome import log_tail
from wan_sweep.units import GIB


def line(**values: object) -> str:
    return json.dumps({"time": 1.0, "event": "begin", "kind": "phase", "name": "load", **values}) + "\n"


def test_a_tail_reads_each_event_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    whole, half = line(), line(name="denoise")
    path.write_text(whole + half[:10])
    assert [event.name for event in tail.read()] == ["load"]
    assert tail.read() == []
    path.write_text(whole + half)
    assert [event.name for event in tail.read()] == ["denoise"]


def test_a_line_that_is_no_event_is_passed_over() -> None:
    assert parse_event(b"{") is None
    assert parse_event(b"[]") is None
    assert parse_event(b'{"event": "begin"}') is None
    assert parse_event(line(event="explode").encode()) is None
    assert parse_event(line(allocated_bytes=1).encode()) == Event(event="begin", kind="phase", name="load", time=1.0)


def test_the_position_is_what_has_begun_and_not_ended() -> None:
    position = Position()
    assert str(position) == ""
    position.follow(Event(event="begin", kind="phase", name="load"))
    position.follow(Event(event="begin", kind="component", name="dit"))
    assert str(position) == "load, dit"
    position.follow(Event(event="end", kind="component", name="dit"))
    position.follow(Event(event="end", kind="phase", name="load"))
    position.follow(Event(event="begin", kind="phase", name="denoise"))
    position.follow(Event(event="begin", kind="step", name="step", index=2, total=4))
    position.follow(Event(event="begin", kind="block", name="block", index=0, total=30))
    assert str(position) == "denoise, step 3 of 4, block 1 of 30"
    position.follow(Event(event="end", kind="phase", name="denoise"))
    assert str(position) == ""


def test_an_end_without_a_begin_changes_nothing() -> None:
    position = Position()
    position.follow(Event(event="end", kind="phase", name="load"))
    assert str(position) == ""


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("x" * 10000 + "\n" + "\n".join(f"line {n}\n" for n in range(100)))
    lines = log_tail(tmp_path / "log.txt")
    assert (len(lines), lines[0], lines[-1]) == (20, "line 80", "line 99")
    assert log_tail(tmp_path / "none") == []


def readings(*values: int) -> Iterator[list[int]]:
    for value in values:
        yield [value]


def test_waiting_ends_when_the_device_is_back_at_its_baseline() -> None:
    values = readings(9 * GIB, 5 * GIB, 2 * GIB + 1)
    naps: list[float] = []
    assert wait_for_baseline([2 * GIB], lambda: next(values), sleep=naps.append) is None
    assert naps == [0.2, 0.2]


def test_a_device_that_stays_full_is_a_warning() -> None:
    warning = wait_for_baseline([0, GIB], lambda: [0, 3 * GIB], limit_s=0.0)
    assert warning is not None
    assert warning["code"] == "device_not_at_baseline"
    assert "2.00 GiB more than before it" in warning["text"]


def test_without_a_device_there_is_nothing_to_wait_for() -> None:
    assert wait_for_baseline([], list) is None
