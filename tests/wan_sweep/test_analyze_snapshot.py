import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wan_sweep.analyze import UnreadableFileError, analyze, replay_peaks
from wan_sweep.analyze.snapshot.contents import device_snapshots
from wan_sweep.analyze.snapshot.replay import Replay, ReplayError, replay
from wan_sweep.units import KIB, MIB

BASE = 0x7F00_0000_0000
SMALL = BASE + 1024 * MIB

Entry = dict[str, Any]


def entry(action: str, address: int, size: int, time_us: int = 0, **more: Any) -> Entry:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 1_000_000 + time_us, **more}


def free(address: int, size: int, time_us: int = 0, **more: Any) -> list[Entry]:
    return [entry(f"free_{what}", address, size, time_us, **more) for what in ("requested", "completed")]


def segment(address: int, blocks: Sequence[tuple[int, int, str]], **more: Any) -> Entry:
    """A segment of blocks, each with its size, what was requested, and its state."""
    return {
        "device": 0,
        "address": address,
        "total_size": sum(size for size, _, _ in blocks),
        "stream": 0,
        "is_expandable": False,
        "blocks": [{"size": size, "requested_size": asked, "state": state} for size, asked, state in blocks],
        **more,
    }


def snapshot(segments: Sequence[Entry], entries: Sequence[Entry], **settings: Any) -> dict[str, Any]:
    return {"segments": list(segments), "device_traces": [list(entries)], "allocator_settings": settings}


def replayed(made: dict[str, Any]) -> Replay:
    return replay(device_snapshots(made, "made up")[0])


def from_the_start() -> dict[str, Any]:
    """A run of three allocations, recorded from the first one on.

    allocated: 12 MiB (11 MiB + 1 in a segment of 12: less than 1 MiB would remain) + 1 KiB (for 1000 bytes) is the
    peak; the first goes, and 2 MiB + 512 take the front of its place, since more than 1 MiB remains.
    """
    entries = [
        entry("segment_alloc", BASE, 12 * MIB, 0),
        entry("alloc", BASE, 11 * MIB + 1, 10, user_metadata="load"),
        entry("segment_alloc", SMALL, 2 * MIB, 20),
        entry(
            "alloc", SMALL, 1000, 30, user_metadata="denoise", frames=[frame("torch/linear.py"), frame("wan/dit.py")]
        ),
        *free(BASE, 11 * MIB + 1, 500),
        entry("alloc", BASE, 2 * MIB + 512, 3000, user_metadata="denoise"),
        entry("snapshot", 0, 0, 4000),
    ]
    segments = [
        segment(BASE, [(2 * MIB + 512, 2 * MIB + 512, "active_allocated"), (10 * MIB - 512, 0, "inactive")]),
        segment(SMALL, [(KIB, 1000, "active_allocated"), (2 * MIB - KIB, 0, "inactive")]),
    ]
    return snapshot(segments, entries)


def frame(filename: str, line: int = 7, name: str = "forward") -> Entry:
    root = "/env/lib/python3.12/site-packages/" if filename.startswith("torch") else "/home/me/"
    return {"filename": root + filename, "line": line, "name": name}


def test_peaks_of_a_history_are_those_worked_out_by_hand() -> None:
    assert replay_peaks(from_the_start()) == {
        "requested": 11 * MIB + 1 + 1000,
        "allocated": 12 * MIB + KIB,
        "active": 12 * MIB + KIB,
        "reserved": 14 * MIB,
    }


def test_a_replay_ends_in_the_state_that_the_snapshot_shows() -> None:
    found = replayed(from_the_start())
    assert (found.num_differences, found.doubtful_bytes, found.start.reserved_bytes) == (0, 0, 0)
    assert found.at_peak.inactive_split_bytes == 2 * MIB - KIB  # the first segment is taken whole
    assert found.peaks.inactive_split_bytes == 10 * MIB - 512 + 2 * MIB - KIB  # at the end


@pytest.mark.parametrize("num_lost", [1, 2, 3, 4, 5, 6, 7])
def test_a_ring_that_lost_its_beginning_gives_what_the_whole_history_gives_from_there(num_lost: int) -> None:
    whole, made = replayed(from_the_start()), from_the_start()
    made["device_traces"][0] = made["device_traces"][0][num_lost:]
    found = replayed(made)
    assert list(found.allocated) == list(whole.allocated[num_lost:])
    assert list(found.reserved) == list(whole.reserved[num_lost:])
    assert found.start.allocated_bytes == whole.allocated[num_lost - 1]
    assert found.num_differences == 0


def test_a_block_whose_tail_shows_later_is_counted_with_it_from_the_start() -> None:
    # 20 MiB: [3 MiB requested, which stood, has a tail of 512 KiB][free]. The next allocation begins behind the tail.
    tail = 512 * KIB
    entries = [
        entry("alloc", BASE + 3 * MIB + tail, 2 * MIB, 1),
        *free(BASE, 3 * MIB, 2),
        *free(BASE + 3 * MIB + tail, 2 * MIB, 3),
    ]
    found = replayed(snapshot([segment(BASE, [(20 * MIB, 0, "inactive")])], entries))
    assert found.start.allocated_bytes == 3 * MIB + tail
    assert found.peaks.allocated_bytes == 5 * MIB + tail


def test_what_a_tail_could_add_is_told_where_it_never_shows() -> None:
    found = replayed(snapshot([segment(BASE, [(20 * MIB, 0, "inactive")])], free(BASE, 3 * MIB)))
    assert (found.peaks.allocated_bytes, found.doubtful_bytes) == (3 * MIB, MIB)


def test_a_block_that_another_stream_uses_is_active_but_not_allocated_until_its_free_is_completed() -> None:
    entries = [
        entry("segment_alloc", BASE, 20 * MIB),
        entry("alloc", BASE, 4 * MIB),
        entry("free_requested", BASE, 4 * MIB),
        entry("alloc", BASE + 4 * MIB, 3 * MIB),
        entry("free_completed", BASE, 4 * MIB),
    ]
    blocks = [(4 * MIB, 0, "inactive"), (3 * MIB, 3 * MIB, "active_allocated"), (13 * MIB, 0, "inactive")]
    found = replayed(snapshot([segment(BASE, blocks)], entries))
    assert (found.peaks.allocated_bytes, found.peaks.active_bytes) == (4 * MIB, 7 * MIB)
    assert found.num_differences == 0


def test_expandable_segments_are_mapped_and_unmapped_by_the_page() -> None:
    entries = [
        entry("segment_map", BASE, 20 * MIB),
        entry("alloc", BASE, 15 * MIB),
        entry("segment_map", BASE + 20 * MIB, 20 * MIB),
        entry("alloc", BASE + 15 * MIB, 25 * MIB),  # over the border of the two pages
        *free(BASE, 15 * MIB),
        *free(BASE + 15 * MIB, 25 * MIB),
        entry("segment_unmap", BASE + 20 * MIB, 20 * MIB),
    ]
    left = segment(BASE, [(20 * MIB, 0, "inactive")], is_expandable=True)
    found = replayed(snapshot([left], entries, expandable_segments=True))
    assert (found.peaks.allocated_bytes, found.peaks.reserved_bytes) == (40 * MIB, 40 * MIB)
    assert found.reserved[-1] == 20 * MIB
    late = replayed(snapshot([left], entries[3:], expandable_segments=True))
    assert list(late.reserved) == list(found.reserved[3:])
    assert list(late.allocated) == list(found.allocated[3:])


def test_settings_of_the_allocator_change_what_is_allocated() -> None:
    entries = [entry("segment_alloc", BASE, 100 * MIB), entry("alloc", BASE, 90 * MIB)]
    whole = segment(BASE, [(100 * MIB, 90 * MIB, "active_allocated")])
    assert replay_peaks(snapshot([whole], entries, max_split_size=64 * MIB))["allocated"] == 100 * MIB
    parts = segment(BASE, [(96 * MIB, 90 * MIB, "active_allocated"), (4 * MIB, 0, "inactive")])
    divisions = {"1": 4, "2": 4}
    assert replay_peaks(snapshot([parts], entries, roundup_power2_divisions=divisions))["allocated"] == 96 * MIB


def test_a_history_that_does_not_fit_says_which_entry() -> None:
    made = from_the_start()
    made["device_traces"][0].insert(3, entry("free_requested", SMALL, 1000))
    with pytest.raises(ReplayError, match=r"entry 3 .*free_requested.*no allocated block begins"):
        replay_peaks(made)
    with pytest.raises(ReplayError, match="device=5"):
        replay_peaks(from_the_start(), device=5)


def analyzed(tmp_path: Path, made: object) -> dict[str, Any]:
    path = tmp_path / "made.pickle"
    path.write_bytes(pickle.dumps(made))
    return analyze(path).to_json()


def live_row(num_bytes: int, requested: int, metadata: str, where: str | None) -> dict[str, Any]:
    size = {"allocated_bytes": num_bytes, "requested_bytes": requested, "num_blocks": 1}
    return {**size, "metadata": metadata, "frame": where}


def test_the_live_set_is_named_by_metadata_and_by_the_first_frame_outside_torch(tmp_path: Path) -> None:
    memory = analyzed(tmp_path, from_the_start())["sections"]["memory"]
    assert memory["tables"]["live_at_peak"]["rows"] == [
        live_row(12 * MIB, 11 * MIB + 1, "load", None),
        live_row(KIB, 1000, "denoise", "wan/dit.py:7 forward"),
    ]
    sizes = [(row["size"], row["num_blocks"]) for row in memory["tables"]["sizes"]["rows"]]
    assert sizes == [("up to 1.0 KiB", 1), ("up to 16.0 MiB", 1)]
    assert memory["facts"]["peak_at_seconds"] == pytest.approx(30e-6)
    assert memory["facts"]["peak_metadata"] == "denoise"


def test_peaks_and_allocations_are_told_by_metadata(tmp_path: Path) -> None:
    rows = analyzed(tmp_path, from_the_start())["sections"]["metadata"]["tables"]["metadata"]["rows"]
    found = {row["metadata"]: (row["peak_allocated_bytes"], row["num_allocations"]) for row in rows}
    assert found["load"] == (12 * MIB, 1)
    assert found["denoise"] == (12 * MIB + KIB, 2)


def test_churn_counts_lifetimes_from_the_times_of_the_entries(tmp_path: Path) -> None:
    facts = analyzed(tmp_path, from_the_start())["sections"]["churn"]["facts"]
    assert facts["num_allocations"] == 3
    assert facts["short_lived_pct"] == pytest.approx(100 / 3)  # one of three was freed, after 490 us
    assert facts["median_lifetime_seconds"] == pytest.approx(490e-6)
    assert facts["allocations_per_second"] == pytest.approx(3 / 4e-3)


def test_an_oom_is_told_with_its_request_and_what_was_live_then(tmp_path: Path) -> None:
    made = from_the_start()
    oom = {"action": "oom", "device_free": 5 * MIB, "size": 99 * MIB, "stream": 0, "time_us": 1_000_100}
    made["device_traces"][0].insert(4, oom)
    found = analyzed(tmp_path, made)
    [row] = found["sections"]["oom"]["tables"]["ooms"]["rows"]
    assert (row["request_bytes"], row["allocated_bytes"]) == (99 * MIB, 12 * MIB + KIB)
    assert row["device_free_bytes"] == 5 * MIB
    live = found["sections"]["oom"]["tables"]["live_at_oom"]["rows"]
    assert [one["allocated_bytes"] for one in live] == [12 * MIB, KIB]
    assert "lack of memory: 1; the first of 99.0 MiB with 12.0 MiB allocated" in found["headline"][-1]


def test_a_history_without_stacks_metadata_and_times_is_analyzed(tmp_path: Path) -> None:
    made = from_the_start()
    bare = ("action", "addr", "size")
    made["device_traces"][0] = [{key: one[key] for key in bare} for one in made["device_traces"][0]]
    found = analyzed(tmp_path, made)["sections"]
    assert found["memory"]["facts"]["peak_allocated_bytes"] == 12 * MIB + KIB
    assert found["memory"]["facts"]["peak_at_seconds"] is None
    assert "no times" in found["churn"]["missing"]
    assert "no metadata" in found["metadata"]["missing"]


def test_a_snapshot_without_history_says_how_to_record_one_and_shows_the_end(tmp_path: Path) -> None:
    made = from_the_start() | {"device_traces": [[]]}
    found = analyzed(tmp_path, made)["sections"]
    assert "_record_memory_history" in found["memory"]["missing"]
    assert found["end"]["facts"]["allocated_bytes"] == 2 * MIB + 512 + KIB
    assert found["end"]["facts"]["reserved_bytes"] == 14 * MIB


def test_a_late_history_and_one_that_does_not_fit_are_told(tmp_path: Path) -> None:
    made = from_the_start()
    made["device_traces"][0] = made["device_traces"][0][4:]
    notes = " ".join(analyzed(tmp_path, made)["sections"]["memory"]["notes"])
    assert "begins with 12.0 MiB allocated" in notes
    made["device_traces"][0] = free(SMALL, 1000)  # but the end shows the block
    assert [one["code"] for one in analyzed(tmp_path, made)["warnings"]] == ["replay_differs"]
    made["device_traces"][0] = [entry("alloc", BASE, 1), *free(SMALL, 1), *free(SMALL, 1)]
    found = analyzed(tmp_path, made)
    assert [one["code"] for one in found["warnings"]] == ["no_replay"]
    assert "entry 3" in found["sections"]["memory"]["missing"]


NO_SNAPSHOTS = (
    {},
    [],
    "text",
    {"segments": 3},
    {"segments": [{"address": 1}]},
    {"segments": [], "device_traces": [[{}]]},
)


@pytest.mark.parametrize("value", NO_SNAPSHOTS)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnreadableFileError, match="memory snapshot"):
        analyzed(tmp_path, value)
