import itertools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.wan_sweep.made_up_events import Events, leave, memory_events, run_events, write_main_sweep
from tests.wan_sweep.made_up_records import MIB, record, write_sweep
from wan_sweep.errors import RecordError
from wan_sweep.report import draw_timeline, write_reports
from wan_sweep.report.labels import side_by_side
from wan_sweep.report.overlay import draw_timelines
from wan_sweep.report.sheet import read_sheet
from wan_sweep.report.timeline import Timeline, read_timeline
from wan_sweep.report.timeline_picture import draw, subtitle

SIZES = {"t5": 100.0, "dit": 40.0, "vae": 8.0}
PEAKS = {"encode_text": 20.0, "denoise": 30.0, "decode": 60.0}
SECONDS = {"encode_text": 0.5, "denoise": 4.0, "decode": 2.0, "save": 0.5}


def timeline_of(folder: Path, events: list[dict[str, Any]], **changes: Any) -> Timeline:
    made = record(1, {}, **changes)
    write_sweep(folder, made)
    timeline = read_timeline(leave(folder, made, "memory_events.json", memory_events(made, events)))
    assert timeline is not None
    return timeline


def whole_run(folder: Path, *, offload: bool, **more: int) -> Timeline:
    return timeline_of(folder, run_events(offload=offload, sizes=SIZES, peaks=PEAKS, seconds=SECONDS, **more))


def test_the_peak_is_the_highest_interval_and_knows_where_it_is(tmp_path: Path) -> None:
    peak = whole_run(tmp_path, offload=False, steps=3).peak
    assert peak.num_bytes == (32 + 100 + 40 + 8 + 60) * MIB
    assert peak.place == "decode"
    assert peak.weights == {"libraries": 32 * MIB, "t5": 100 * MIB, "dit": 40 * MIB, "vae": 8 * MIB}


def test_steps_are_counted_from_one_and_blocks_as_their_weights_are_called(tmp_path: Path) -> None:
    run = Events()
    run.load({"dit": 1.0}, SIZES)
    run.work("denoise", 3.0, 50.0, steps=3, blocks=4)
    assert timeline_of(tmp_path, run.events).peak.place == "denoise, step 1 of 3, block 1"


def test_what_stands_before_the_first_phase_belongs_to_the_libraries(tmp_path: Path) -> None:
    timeline = whole_run(tmp_path, offload=True, steps=2)
    assert set(timeline.weights["libraries"]) == {32 * MIB}
    assert timeline.weights["t5"][-1] == 0


def test_weights_are_not_drawn_where_less_is_allocated(tmp_path: Path) -> None:
    run = Events()
    run.load({"dit": 1.0}, SIZES)
    run.work("decode", 1.0, 10.0)
    gone = run.events[-1]
    gone["allocated_bytes"] = 3 * MIB
    assert timeline_of(tmp_path, run.events).weights["dit"][-2:] == (40 * MIB, 0)


def test_moves_tell_bytes_and_seconds_of_what_came_and_left(tmp_path: Path) -> None:
    moves = whole_run(tmp_path, offload=True, steps=2).moves
    assert [(move.component, move.is_arrival) for move in moves] == [
        (part, comes) for part in ("t5", "dit", "vae") for comes in (True, False)
    ]
    assert [move.num_bytes for move in moves[:2]] == [100 * MIB, 100 * MIB]
    assert moves[0].seconds == pytest.approx(0.4)


def test_with_offload_each_load_is_a_phase_between_the_others(tmp_path: Path) -> None:
    names = [phase.name for phase in whole_run(tmp_path, offload=True, steps=2).phases]
    assert names == ["load", "encode_text", "load", "denoise", "load", "decode", "save"]


def test_a_killed_job_has_a_timeline_up_to_its_last_boundary(tmp_path: Path) -> None:
    events = run_events(offload=False, sizes=SIZES, peaks=PEAKS, seconds=SECONDS, steps=4)
    cut = next(place for place, event in enumerate(events) if event["index"] == 2)
    timeline = timeline_of(tmp_path, events[:cut], outcome="oom", reason="out of memory in denoise")
    assert timeline.phases[-1].name == "denoise"
    assert timeline.phases[-1].end == timeline.times[-1]
    assert timeline.trouble == "Out of memory in denoise"


def test_the_clock_starts_with_the_first_boundary(tmp_path: Path) -> None:
    events = run_events(offload=False, sizes=SIZES, peaks=PEAKS, seconds=SECONDS)
    late = [{**event, "elapsed_s": event["elapsed_s"] + 7.0} for event in events]
    timeline = timeline_of(tmp_path, late)
    assert timeline.times[0] == 0
    assert timeline.seconds == pytest.approx(events[-1]["elapsed_s"])


def test_a_timeline_is_drawn_into_the_jobs_folder(tmp_path: Path) -> None:
    write_main_sweep(tmp_path)
    folders = sorted(tmp_path.glob("[12]_*"))
    assert [draw_timeline(folder) for folder in folders] == [folder / "memory_timeline.png" for folder in folders]
    with (
        Image.open(folders[0] / "memory_timeline.png") as with_lanes,
        Image.open(folders[1] / "memory_timeline.png") as without,
    ):
        assert with_lanes.width == without.width > 1200
        assert with_lanes.height > without.height  # what leaves has a lane of its own


def test_an_estimated_timeline_says_that_nothing_ran(tmp_path: Path) -> None:
    made = record(1, {})
    write_sweep(tmp_path, made)
    events = run_events(offload=False, sizes=SIZES, peaks=PEAKS, seconds=SECONDS, steps=2)
    for mode, device, clock in (
        ("measure", "H100-80GB", "[s]"),
        ("estimate", "estimated for the H100-80GB", "at the least [s], as nothing ran"),
    ):
        document = {**memory_events(made, events), "device": "H100-80GB", "mode": mode}
        timeline = read_timeline(leave(tmp_path, made, "memory_events.json", document))
        assert timeline is not None
        assert timeline.clock == clock
        assert subtitle(timeline).split("   |   ")[1] == device


def test_a_job_without_events_has_no_timeline(tmp_path: Path) -> None:
    assert draw_timeline(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_timeline_without_weights_and_of_no_length_can_be_drawn(tmp_path: Path) -> None:
    run = Events()
    run.boundary("begin", "phase", "load")
    draw(timeline_of(tmp_path, run.events), tmp_path / "short.png")
    assert (tmp_path / "short.png").stat().st_size > 1000


def test_damaged_events_are_named_and_do_not_stop_the_report(tmp_path: Path) -> None:
    made = record(1, {}, outcome="failed", reason="broken")
    write_sweep(tmp_path, made)
    events = [{"elapsed_s": 0.0}]
    folder = leave(tmp_path, made, "memory_events.json", memory_events(made, events))
    with pytest.raises(RecordError, match=r"memory_events\.json is incomplete"):
        read_timeline(folder)
    write_reports(tmp_path)
    assert "memory\\_events.json is incomplete" in (tmp_path / "report.md").read_text("utf-8")


def test_the_envelope_has_no_dips_that_are_too_short_to_be_seen_and_all_spikes(tmp_path: Path) -> None:
    run = Events()
    run.boundary("begin", "phase", "denoise")
    for duration, height in ((1.0, 50.0), (0.001, 10.0), (1.0, 50.0), (0.001, 90.0), (1.0, 20.0)):
        run.boundary("end", "step", "step", after=duration, peak=height)
    envelope = timeline_of(tmp_path, run.events).envelope()
    assert [peak / MIB for *_, peak in envelope] == [50, 50, 90, 20]
    assert [end for _, end, _ in envelope[:-1]] == [start for start, *_ in envelope[1:]]


def test_few_jobs_share_a_plot_and_jobs_of_other_lengths_get_their_own(tmp_path: Path) -> None:
    write_main_sweep(tmp_path)
    sheet = read_sheet(tmp_path)
    both = [(row, timeline) for row in sheet.rows[:2] if (timeline := read_timeline(tmp_path / row.records[0].name))]
    assert draw_timelines(sheet, both, tmp_path / "one.png") == "Memory over time: all peaks are in denoise"
    run = Events()
    run.load({"dit": 0.01}, SIZES)
    brief = timeline_of(tmp_path / "brief", run.events)
    title = draw_timelines(sheet, [both[0], (both[1][0], brief)], tmp_path / "small.png")
    assert title == "Memory over time: the peak is in denoise in job 1, load in job 2"
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "small.png") as small:
        assert one.size != small.size


def test_names_in_a_line_stay_at_their_place_or_move_as_little_as_need_be() -> None:
    assert side_by_side([10.0, 50.0], [8.0, 8.0], 0.0, 100.0) == [10.0, 50.0]
    assert side_by_side([50.0, 52.0], [10.0, 10.0], 0.0, 100.0) == [46.0, 56.0]
    assert side_by_side([1.0, 2.0, 99.0], [10.0, 10.0, 10.0], 0.0, 100.0) == [5.0, 15.0, 95.0]
    crowded = side_by_side([5.0] * 20, [10.0] * 20, 0.0, 100.0)
    assert all(right - left == pytest.approx(10) for left, right in itertools.pairwise(crowded))
