"""Sweeps whose jobs do not all generate the same: memory and time are compared within a workload only."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_records import GIB, KNOBS, metrics_of, record, write_sweep
from wan_sweep.report.advice import advice
from wan_sweep.report.cells import columns_of
from wan_sweep.report.csv_table import csv_text
from wan_sweep.report.effects import effects
from wan_sweep.report.findings import headline
from wan_sweep.report.pictures import draw_memory_time, draw_peaks
from wan_sweep.report.sheet import Sheet, read_sheet
from wan_sweep.report.workloads import by_workload

IMAGE = {"model": "t2i-14B", "size": "1024*1024", "frame_num": 1}
VIDEO = {"model": "i2v-14B", "size": "1280*720", "frame_num": 81}
SMALL = {"model": "t2v-1.3B", "size": "832*480", "frame_num": 81}

IMAGE_NAME = "t2i-14B 1024*1024, 1 frame, 3 steps"
VIDEO_NAME = "i2v-14B 1280*720, 81 frames, 3 steps"


def job(number: int, workload: dict[str, Any], gib: float, seconds: float, **swept: Any) -> dict[str, Any]:
    """A job that was asked for by its model, and by what else was swept; size and frames follow from the model."""
    swept = {"model": workload["model"], **swept}
    metrics = metrics_of(base={"dit": gib * 1000}, activation=41, step_s=seconds / 5) | {
        "memory/peak/process_used_bytes": int(gib * GIB),
        "time/total_s": seconds,
    }
    return record(number, swept, metrics, knobs={**KNOBS, **workload, **swept})


def refused(number: int, model: str, **swept: Any) -> dict[str, Any]:
    """A job that was refused, so that size, frames and steps were never decided."""
    swept = {"model": model, **swept}
    undecided = {"size": None, "frame_num": None, "sample_steps": None}
    return record(number, swept, outcome="refused", reason="no", knobs={**KNOBS, **swept, **undecided})


def sheet_of(folder: Path, *records: dict[str, Any]) -> Sheet:
    return read_sheet(write_sweep(folder, *records))


def cells(sheet: Sheet) -> dict[tuple[str, ...], list[str]]:
    return {column.title: [cell.strip() for cell in column.cells] for column in columns_of(sheet)}


@pytest.fixture
def tasks(tmp_path: Path) -> Sheet:
    """Three jobs, each with a workload of its own."""
    return sheet_of(tmp_path, job(1, IMAGE, 28, 2.5), job(2, SMALL, 7, 8), job(3, VIDEO, 90, 66))


@pytest.fixture
def two(tmp_path: Path) -> Sheet:
    """Two workloads with two jobs each, and one that was refused: the image takes less of both than any video."""
    return sheet_of(
        tmp_path,
        job(1, IMAGE, 20, 5, offload=False),
        job(2, IMAGE, 10, 10, offload=True),
        job(3, VIDEO, 40, 100, offload=False),
        job(4, VIDEO, 30, 120, offload=True),
        refused(5, "i2v-14B", offload="maybe"),
    )


def test_jobs_that_each_generate_something_else_are_not_compared(tasks: Sheet) -> None:
    assert headline(tasks) == [
        "Each job generates something else (model, size and frame_num differ), so none is compared with another."
    ]
    assert effects(tasks) == []
    table = cells(tasks)
    assert table["job",] == ["1", "2", "3"]
    assert not {title for title in table if "diff %" in title}


def test_what_follows_from_the_model_has_columns_where_it_differs(tasks: Sheet) -> None:
    table = cells(tasks)
    assert table["size",] == ["1024*1024", "832*480", "1280*720"]
    assert table["frame_num",] == ["1", "81", "81"]
    assert ("sample_steps",) not in table
    rows = list(csv.DictReader(io.StringIO(csv_text(tasks.records))))
    assert list(rows[0])[3:6] == ["model", "size", "frame_num"]
    assert [row["size"] for row in rows] == table["size",]


def test_of_a_workload_with_one_job_is_told_which_cards_are_enough(tasks: Sheet) -> None:
    rule, *lines = advice(tasks)
    assert rule.startswith("Measured for each workload by itself on NVIDIA H100 80GB HBM3; ")
    assert "Fastest" not in rule
    assert lines == [
        f"{IMAGE_NAME}: Job 1 (t2i-14B) needs 28.00 GiB: 40 GiB are enough, 24 GiB are not; 2.50 s in total.",
        "t2v-1.3B 832*480, 81 frames, 3 steps: Job 2 (t2v-1.3B) needs 7.00 GiB: 8 GiB are enough; 8.00 s in total.",
        f"{VIDEO_NAME}: Job 3 (i2v-14B) needs 90.00 GiB: 80 GiB are not enough; 1 min 06 s in total.",
    ]


def test_a_sweep_of_one_job_is_told_which_cards_are_enough(tmp_path: Path) -> None:
    rule, line = advice(sheet_of(tmp_path, job(1, IMAGE, 28, 2.5)))
    assert rule.startswith("Measured for this workload on")
    assert line == "Job 1 (t2i-14B) needs 28.00 GiB: 40 GiB are enough, 24 GiB are not; 2.50 s in total."


def test_each_workload_has_its_reference_and_its_best(two: Sheet) -> None:
    table = cells(two)
    assert table["job",] == ["1*", "2", "3*", "4", "5"]
    assert table["step", "diff %"] == ["0", "+100.0", "0", "+20.0", "-"]
    assert table["size",][-1] == "-"
    assert headline(two) == [
        (
            "* Reference for the differences: jobs 1 and 3, each the first that was measured of those that generate "
            "the same."
        ),
        (
            f"{IMAGE_NAME}: Least memory: job 2 (t2i-14B offload=true), peak 9.81 GiB allocated. "
            "Shortest: job 1 (t2i-14B offload=false), 5.00 s in total."
        ),
        (
            f"{VIDEO_NAME}: Least memory: job 4 (i2v-14B offload=true), peak 29.34 GiB allocated. "
            "Shortest: job 3 (i2v-14B offload=false), 1 min 40 s in total."
        ),
    ]


def test_each_workload_has_its_advice(two: Sheet) -> None:
    rule, *lines = advice(two)
    assert "Fastest is the shortest total" in rule
    assert lines == [
        f"{IMAGE_NAME}: 8 GiB: nothing that was measured fits; the least, job 2, needs 10.00 GiB.",
        f"{IMAGE_NAME}: 12 and 16 GiB: job 2 (t2i-14B offload=true), 10.0 s in total, needs 10.00 GiB.",
        f"{IMAGE_NAME}: 24, 40 and 80 GiB: job 1 (t2i-14B offload=false), 5.00 s in total, needs 20.00 GiB.",
        f"{VIDEO_NAME}: 8, 12, 16 and 24 GiB: nothing that was measured fits; the least, job 4, needs 30.00 GiB.",
        f"{VIDEO_NAME}: 40 and 80 GiB: job 3 (i2v-14B offload=false), 1 min 40 s in total, needs 40.00 GiB.",
    ]


def test_a_knob_has_an_effect_within_workloads_and_the_model_none_between_them(two: Sheet) -> None:
    (effect,) = effects(two)
    assert (effect.knob, [(row.number, other.number) for row, other in effect.pairs]) == ("offload", [(2, 1), (4, 3)])


def test_pictures_have_a_front_for_each_workload(two: Sheet) -> None:
    assert draw_memory_time(two, two.folder / "a.png") == "Memory against time: a Pareto front for each workload"
    assert draw_peaks(two, two.folder / "b.png") == "Peak memory: from 9.81 GiB of job 2 to 39.10 GiB of job 3"


def test_a_job_that_is_alone_among_others_is_named(tmp_path: Path) -> None:
    sheet = sheet_of(
        tmp_path,
        job(1, IMAGE, 20, 5, offload=False),
        job(2, IMAGE, 10, 10, offload=True),
        job(3, VIDEO, 40, 100, offload=False),
    )
    first, *_, last = headline(sheet)
    assert first.endswith(
        ": job 1 (t2i-14B offload=false), the first that was measured of those that generate the same."
    )
    assert last == "No other job generates what job 3 (i2v-14B offload=false) generates, so it is not compared."
    assert cells(sheet)["peak", "diff %"] == ["0", "-49.9", "-"]


@pytest.mark.parametrize(
    ("swept", "other"),
    [
        ("model", {**SMALL, "model": "t2v-14B"}),
        ("size", {**SMALL, "size": "480*832"}),
        ("frame_num", {**SMALL, "frame_num": 41}),
    ],
)
def test_what_is_generated_has_an_effect_where_all_else_is_the_same(
    tmp_path: Path, swept: str, other: dict[str, Any]
) -> None:
    jobs = [job(number, one, 7.0 * number, 8, **{swept: one[swept]}) for number, one in enumerate((SMALL, other), 1)]
    (effect,) = [one for one in effects(sheet_of(tmp_path, *jobs)) if one.knob == swept]
    assert effect.sentence().startswith(f"{swept}={other[swept]} instead of {SMALL[swept]}: peak +99.4 %")


def test_a_size_that_was_never_decided_is_no_other_workload(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, job(1, SMALL, 7, 8, offload=True), refused(2, "t2v-1.3B", offload=False))
    assert ("size",) not in cells(sheet)
    assert headline(sheet) == ["One job was measured: job 1 (t2v-1.3B offload=true)."]


def test_a_workload_is_named_by_whatever_differs(tmp_path: Path) -> None:
    guided = [{**SMALL, "sample_guide_scale": scale} for scale in (1.0, 5.0)]
    sheet = sheet_of(tmp_path, *(job(number, one, 7, 8 * number) for number, one in enumerate(guided, 1)))
    assert [name for name, _ in by_workload(sheet)] == [
        f"t2v-1.3B 832*480, 81 frames, 3 steps, sample_guide_scale={scale}" for scale in (1, 5)
    ]


def test_estimates_that_are_not_compared_say_what_their_times_are(tmp_path: Path) -> None:
    jobs = [job(1, IMAGE, 28, 2.5) | {"mode": "estimate"}, job(2, VIDEO, 35, 66) | {"mode": "estimate"}]
    each, times = headline(sheet_of(tmp_path, *jobs))
    assert each.startswith("Each job generates something else")
    assert times.startswith("Times are lower bounds")
