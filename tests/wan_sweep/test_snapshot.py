"""The allocator's history in a file for memory_viz."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _memory_viz

from wan_sweep.measure.snapshot import MOST_ENTRIES, MOST_ENTRIES_WITH_STACKS, history, tagger, write_snapshot

MIB = 2**20


def made_up() -> dict[str, Any]:
    """What torch gives for one segment with one tensor in it."""
    segment = {
        "device": 0,
        "address": 4096,
        "stream": 0,
        "segment_type": "small",
        "segment_pool_id": (0, 0),
        "total_size": 2 * MIB,
        "allocated_size": 512,
        "active_size": 512,
        "requested_size": 400,
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {"address": 4096, "size": 512, "requested_size": 400, "state": "active_allocated", "frames": []},
            {"address": 4608, "size": 2 * MIB - 512, "requested_size": 0, "state": "inactive", "frames": []},
        ],
    }
    entry = {"action": "alloc", "addr": 4096, "size": 512, "stream": 0, "time_us": 1, "frames": []}
    return {"segments": [segment], "device_traces": [[entry]], "allocator_settings": {}}


def test_what_is_written_opens_in_pytorchs_own_tools(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    write_snapshot(path, made_up)
    snapshot = pickle.loads(path.read_bytes())  # noqa: S301  # written a line above
    assert snapshot == made_up()
    assert "total_allocated: 400.0B" in _memory_viz.segsum(snapshot)  # type: ignore[no-untyped-call]
    assert "<script" in _memory_viz.trace_plot(snapshot)
    assert [one.name for one in tmp_path.iterdir()] == ["snapshot.pickle"]


def test_a_snapshot_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    write_snapshot(path, made_up)
    older = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_snapshot(path, lambda: {"segments": lambda: None})
    assert path.read_bytes() == older
    assert [one.name for one in tmp_path.iterdir()] == ["snapshot.pickle"]


class Recorded:
    """Stands for torch's switch of the history."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, enabled: str | None, **settings: Any) -> None:
        self.calls.append((enabled, settings))


@pytest.mark.parametrize(
    ("stacks", "context", "num_entries"), [(False, None, MOST_ENTRIES), (True, "all", MOST_ENTRIES_WITH_STACKS)]
)
def test_the_history_is_bounded_has_stacks_on_request_and_ends_after_an_error(
    *, stacks: bool, context: str | None, num_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = Recorded()
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", switch)
    with pytest.raises(KeyError), history(stacks=stacks):
        raise KeyError
    settings = {"context": context, "stacks": "python", "max_entries": num_entries}
    assert switch.calls == [("all", settings), (None, {})]


def test_tags_go_to_cuda_alone_and_only_where_torch_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_memory_metadata", tags.append, raising=False)
    tagger(torch.device("cuda", 0))("denoise/1/3/head")
    tagger(torch.device("cpu"))("not this")
    monkeypatch.delattr(torch.cuda.memory, "_set_memory_metadata")
    tagger(torch.device("cuda", 0))("nor this")
    assert tags == ["denoise/1/3/head"]
