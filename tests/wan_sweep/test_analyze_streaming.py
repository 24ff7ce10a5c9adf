import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.wan_sweep.made_up_traces import counted, gpu_events, lasting, launch, memory, on_device
from wan_sweep.analyze import UnreadableFileError, json_stream
from wan_sweep.analyze.chrome.analysis import analyze_trace, collect
from wan_sweep.analyze.chrome.build import make_trace
from wan_sweep.analyze.json_stream import JsonFile
from wan_sweep.analyze.source import open_source

PATH = Path("made up")
NUM_EVENTS = 30_000
# Columns of an event take 31 to 52 bytes; sorting and nesting take as much again for a moment. Its text has 230.
MOST_BYTES_PER_EVENT = 120


class Endless(io.RawIOBase):
    """A trace of so many events that is made while it is read, and never held."""

    def __init__(self, num_events: int) -> None:
        self._parts = self._make(num_events)
        self._rest = b""

    def _make(self, num_events: int) -> Iterator[bytes]:
        yield b'{"traceEvents": [\n'
        for number in range(num_events // 5):
            start = 100.0 * number
            events = [
                lasting(
                    "cpu_op", f"aten::operation_{number % 100}", start, start + 90, **{"Input Dims": [[64, 3, 224]]}
                ),
                counted(start + 5, 512, number, 10_000, 20_000),
                launch("cudaLaunchKernel", start + 10, start + 20, number),
                on_device("kernel", f"kernel_{number % 100}", start + 30, start + 110, 7, correlation=number),
                memory(start + 80, -512, number, **{"Total Allocated": 9_488, "Total Reserved": 20_000}),
            ]
            yield (",\n" * (number > 0) + ",\n".join(map(json.dumps, events))).encode()
        yield b'\n], "traceName": "last"}'

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._rest = self._rest or next(self._parts, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def test_memory_grows_by_few_bytes_an_event_and_not_with_the_text() -> None:
    tracemalloc.start()
    file = JsonFile(io.BufferedReader(Endless(NUM_EVENTS)), PATH)
    collector = collect(file.events())
    found = analyze_trace(collector, file, PATH, 5)
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert collector.num_events == NUM_EVENTS
    assert file.header == {"traceName": "last"}
    assert found.headline[0].startswith("Peak memory of cuda:0")
    assert highest < 4 * 2**20 + NUM_EVENTS * MOST_BYTES_PER_EVENT


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1000])
def test_the_size_of_a_chunk_does_not_change_what_is_read(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"a": 12.5, 'näme \\ "': [1, {"b": None}], "traceEvents": gpu_events(), "z": True}
    text = json.dumps(content, ensure_ascii=False, indent=1).encode()
    monkeypatch.setattr(json_stream, "_CHUNK_BYTES", chunk)
    file = JsonFile(io.BytesIO(text), PATH)
    assert list(file.events()) == content.pop("traceEvents")
    assert file.header == content


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("[]", []),
        ("[1]", [1]),
        ("[{}, {},]", [{}, {}]),
        ("[{},\n{}", [{}, {}]),
        ("\ufeff [ {} ] ", [{}]),
        ('{"traceEvents": []}', []),
        (
            '{"traceEvents": [{"dur": NaN, "name": "a\tb"}]}',
            [{"dur": pytest.approx(float("nan"), nan_ok=True), "name": "a\tb"}],
        ),
    ],
)
def test_what_real_traces_hold_is_read(text: str, events: list[Any]) -> None:
    assert list(JsonFile(io.BytesIO(text.encode()), PATH).events()) == events


NO_JSON = (
    '{"traceEvents": [{}',
    '{"traceEvents": [{}}]',
    "[{} {} {} {} {} {} {}]",
    '{"a" 1}',
    "{1: 2}",
    "[" * 100_000,
    '{"a": 1',
)


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(UnreadableFileError, match=r"cut off|damaged"):
        list(JsonFile(io.BytesIO(text.encode()), PATH).events())


def test_bytes_are_counted_as_they_lie_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": gpu_events()}))
    counts: list[int] = []
    with open_source(path, counts.append) as (stream, encoding):
        assert encoding == "json"
        stream.read()
    assert sum(counts) == path.stat().st_size


def test_nesting_in_bulk_equals_nesting_one_by_one() -> None:
    chance = np.random.default_rng(0)
    events = []

    def nest(start: float, end: float, depth: int) -> None:
        events.append(lasting("cpu_op", f"aten::{chance.integers(6)}", start, end))
        cuts = np.sort(chance.uniform(start, end, 6)).round(3)
        for low, high in zip(cuts[::2], cuts[1::2], strict=True):
            if depth and high - low > 0.01:
                nest(float(low), float(high), depth - 1)

    for number in range(5):
        nest(1000.0 * number, 1000.0 * number + 900, 4)
    chance.shuffle(np.array(events, dtype=object))
    trace = make_trace(collect(events), {})
    forest = trace.forest
    assert len(forest) == len(events) > 100
    for index in range(len(forest)):
        around = [
            other
            for other in range(len(forest))
            if forest.start[other] <= forest.start[index] and forest.end[index] <= forest.end[other] and other != index
        ]
        innermost = max(around, key=lambda other: forest.start[other], default=-1)
        assert forest.parent[index] == innermost
        assert forest.depth[index] == len(around)
        assert forest.is_first[index] == (forest.name[index] not in {forest.name[other] for other in around})
    inside = forest.summed_up(np.ones(len(forest)))
    assert inside[forest.depth == 0].sum() == len(forest)
    times = chance.uniform(-10, 5000, 300)
    for time, found in zip(times, forest.at(np.zeros(300, dtype=np.int32), times), strict=True):
        open_then = np.flatnonzero((forest.start <= time) & (time <= forest.end))
        assert found == max(open_then, key=lambda index: forest.depth[index], default=-1)
