import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_records import GIB, KNOBS, MIB, main_job, metrics_of, record, write_sweep
from wan_sweep.report.bars import bars_of
from wan_sweep.report.cells import columns_of
from wan_sweep.report.findings import checks, headline, unmeasured, warnings, without_effect
from wan_sweep.report.pareto import pareto_front
from wan_sweep.report.sheet import Sheet, difference_pct, read_sheet

TINY = {"t5": 3.0, "dit": 2.0, "vae": 4.0}


@pytest.fixture(scope="module")
def main_sheet(tmp_path_factory: pytest.TempPathFactory) -> Sheet:
    return read_sheet(write_sweep(tmp_path_factory.mktemp("main"), *main_job()))


def sheet_of(folder: Path, *records: dict[str, Any]) -> Sheet:
    return read_sheet(write_sweep(folder, *records))


def repeated() -> list[dict[str, Any]]:
    jobs = enumerate(itertools.product(range(3), (True, False)), start=1)
    return [
        record(
            number,
            {"offload": offload},
            metrics_of(base=TINY, activation=41, step_s=0.2 + 0.01 * number),
            repeat=repeat,
            knobs={**KNOBS, "offload": offload, "repeats": 3},
        )
        for number, (repeat, offload) in jobs
    ]


def column(sheet: Sheet, *title: str) -> list[str]:
    return [cell.strip() for one in columns_of(sheet) if one.title == title for cell in one.cells]


def test_every_job_is_a_row_whatever_became_of_it(main_sheet: Sheet) -> None:
    assert column(main_sheet, "outcome") == ["ok", "ok", "ok", "ok", "oom", "refused"]


def test_memory_above_ten_gib_makes_all_memory_columns_gib(main_sheet: Sheet) -> None:
    assert column(main_sheet, "peak", "GiB") == ["6.00", "16.58", "6.01", "16.59", "-", "-"]
    assert column(main_sheet, "base", "GiB") == ["3.12", "13.70", "3.12", "13.70", "-", "-"]


def test_small_memory_is_in_mib(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, record(1, {}, metrics_of(base=TINY, activation=41, scale=0.1)))
    assert column(sheet, "peak", "MiB") == ["50.0"]


def test_differences_are_to_the_first_measured_job(main_sheet: Sheet) -> None:
    assert column(main_sheet, "peak", "diff %") == ["0", "+176.4", "+0.1", "+176.4", "-", "-"]
    assert column(main_sheet, "job")[:2] == ["1*", "2"]


def test_a_failed_first_job_is_not_the_reference(tmp_path: Path) -> None:
    failed = record(1, {"offload": True}, outcome="oom", reason="out of memory")
    sheet = sheet_of(tmp_path, failed, record(2, {"offload": False}, metrics_of(base=TINY, activation=41)))
    assert sheet.reference is not None
    assert sheet.reference.number == 2


def test_a_difference_to_nothing_is_nothing() -> None:
    assert difference_pct(3.0, 0.0) is None
    assert difference_pct(None, 2.0) is None
    assert difference_pct(3.0, 2.0) == pytest.approx(50)


def test_more_than_four_axes_share_a_column(tmp_path: Path) -> None:
    axes = {"precision": "bf16", "offload": True, "t5_cpu": False, "size": "832*480", "frame_num": 81}
    sheet = sheet_of(tmp_path, record(1, axes, metrics_of(base=TINY, activation=41)))
    assert column(sheet, "what differs") == ["bf16 offload=true t5_cpu=false 832*480 frame_num=81"]


def test_repeats_are_one_row_with_median_and_range(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, *repeated())
    assert column(sheet, "runs") == ["3", "3"]
    assert column(sheet, "step", "s") == ["0.230 (0.210..0.250)", "0.240 (0.220..0.260)"]


def test_repeats_that_end_differently_are_counted(tmp_path: Path) -> None:
    jobs = repeated()[::2]
    jobs[1] |= {"outcome": "timeout", "reason": "longer than timeout_s=5", "metrics": {}}
    sheet = sheet_of(tmp_path, *jobs)
    assert column(sheet, "outcome") == ["2 ok, 1 timeout"]
    assert unmeasured(sheet) == ["Job 1 (offload=true), run 2: timeout: longer than timeout_s=5"]


def test_repeats_that_failed_alike_tell_it_once(tmp_path: Path) -> None:
    jobs = [one | {"outcome": "failed", "reason": "broken", "metrics": {}} for one in repeated()[::2]]
    assert unmeasured(sheet_of(tmp_path, *jobs)) == ["Job 1 (offload=true), runs 1, 2 and 3: failed: broken"]


def test_numbers_of_a_job_that_ran_out_of_memory_are_not_compared(tmp_path: Path) -> None:
    partial = {"memory/peak/allocated_bytes": 3 * MIB, "time/load_s": 1.0}
    taken_over = record(2, {"offload": False}, partial, outcome="skipped", reason="done before in x (oom)")
    oom = record(1, {"offload": True}, partial, outcome="oom", reason="out of memory")
    assert sheet_of(tmp_path, oom, taken_over).measured == []


def test_a_result_taken_over_is_compared(tmp_path: Path) -> None:
    metrics = metrics_of(base=TINY, activation=41)
    sheet = sheet_of(tmp_path, record(1, {}, metrics, outcome="skipped", reason="done before in outputs/x"))
    assert [row.number for row in sheet.measured] == [1]
    assert unmeasured(sheet) == ["Job 1 (t2v-1.3B): skipped: done before in outputs/x"]


def test_a_damaged_record_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    write_sweep(tmp_path, record(1, {}, metrics_of(base=TINY, activation=41)))
    (tmp_path / "2_broken").mkdir()
    (tmp_path / "2_broken" / "record.json").write_text("{")
    sheet = read_sheet(tmp_path)
    assert len(sheet.rows) == 1
    assert "2_broken" in unmeasured(sheet)[0]


def test_headline_names_reference_and_best(main_sheet: Sheet) -> None:
    assert headline(main_sheet) == [
        (
            "* Reference for the differences: job 1 (fp16 offload=true), the first that was measured. "
            "~ marks times that are not told from noise."
        ),
        "Least memory: job 1 (fp16 offload=true), peak 6.00 GiB allocated; job 3 is within 0.5 %.",
        "Shortest: job 4 (bf16 offload=false), 11.2 s in total; jobs 1, 2 and 3 are within 2 %.",
        "Fastest step: job 4 (bf16 offload=false), 930 ms a step; job 2 is within 2 %.",
    ]


def test_oom_and_refused_jobs_tell_their_reason(main_sheet: Sheet) -> None:
    assert unmeasured(main_sheet) == [
        (
            "Job 5 (fp32 offload=false): oom: out of memory in denoise, step 1: 17.2 GiB in use of 18.0 GiB, 1.9 GiB "
            "asked for (weights on the device then: dit 5.29 GiB, vae 484.0 MiB)"
        ),
        "Job 6 (fp32 offload=true): refused: ulysses_size=5 does not divide num_heads=12; choose 1, 2, 3, 4, 6 or 12",
    ]


def test_equal_warnings_and_idle_knobs_are_told_once(tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "warnings": [{"code": "noise", "text": "Steps differ by 30 %", "advice": "Close other programs."}],
        "idle_knobs": {"t5_cpu": "the whole job already runs on the CPU"},
    }
    metrics = {n: metrics_of(base=TINY, activation=40 + n) for n in (1, 2)}
    sheet = sheet_of(tmp_path, *(record(n, {"offload": n == 1}, metrics[n], **told) for n in (1, 2)))
    assert warnings(sheet) == ["Jobs 1 and 2: Steps differ by 30 %. Close other programs."]
    assert without_effect(sheet) == [
        "t5_cpu changed nothing in jobs 1 and 2, because the whole job already runs on the CPU."
    ]


def test_bars_add_up_to_the_peak_and_gaps_have_a_reason(main_sheet: Sheet) -> None:
    bars = bars_of(main_sheet)
    assert dict(bars[0].parts) == {"dit": 2706 * MIB, "vae": 484 * MIB, "activations": 2954 * MIB}
    assert bars[0].height == 6 * GIB
    assert bars[0].reserved == pytest.approx(6.6 * GIB)
    assert [bar.gap for bar in bars] == ["", "", "", "", "oom", "refused"]


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    assert pareto_front([(3, 1), (1, 3), (2, 2), (3, 3), (2, 2.5)]) == [1, 2, 0]


def test_equal_points_are_on_the_front_together() -> None:
    assert pareto_front([(1, 1), (1, 1), (2, 1)]) == [0, 1]


def test_the_front_of_one_point_is_that_point() -> None:
    assert pareto_front([(5, 5)]) == [0]
    assert pareto_front([]) == []


def test_what_the_libraries_hold_is_a_part_of_its_own(tmp_path: Path) -> None:
    metrics = metrics_of(base=TINY, activation=41) | {"memory/base/libraries_bytes": 8 * MIB}
    (bar,) = bars_of(sheet_of(tmp_path, record(1, {}, metrics)))
    assert dict(bar.parts)["libraries"] == 8 * MIB
    assert bar.height == metrics["memory/peak/allocated_bytes"]


def test_what_a_card_must_give_is_the_process_or_reserved_and_what_is_outside(tmp_path: Path) -> None:
    metrics = metrics_of(base=TINY, activation=41)
    known = metrics | {"memory/peak/process_used_bytes": 700 * MIB}
    computed = metrics | {"memory/outside_allocator_bytes": 600 * MIB}
    sheet = sheet_of(
        tmp_path, *(record(n, {"base_seed": n}, one) for n, one in ((1, known), (2, computed), (3, metrics)))
    )
    reserved = metrics["memory/peak/reserved_bytes"]
    assert [row.needed_bytes() for row in sheet.rows] == [700 * MIB, reserved + 600 * MIB, None]
    assert column(sheet, "process", "MiB")[0] == "700.0"
    assert column(sheet, "process", "MiB")[2] == "-"


def test_runs_whose_allocator_tried_again_and_uneven_steps_are_flagged(tmp_path: Path) -> None:
    metrics = metrics_of(base=TINY, activation=41)
    retried = metrics | {"memory/num_alloc_retries": 2, "memory/fluctuation_pct": 7.44}
    even = metrics | {"memory/num_alloc_retries": 0, "memory/fluctuation_pct": 0.4}
    sheet = sheet_of(tmp_path, record(1, {"base_seed": 1}, retried), record(2, {"base_seed": 2}, even))
    assert warnings(sheet) == [
        (
            "Job 1 (base_seed=1): the allocator ran into the card's limit 2 times, gave memory back and tried again. "
            "Its reserved peak is capped by the card and not comparable with others, its time is longer."
        ),
        (
            "Job 1 (base_seed=1): the peaks of the steps after the first differ by 7.4 %. Steps do the same work, so "
            "see in steps.png whether something is kept from step to step."
        ),
    ]


def test_a_warning_that_the_job_gave_itself_is_not_given_twice(tmp_path: Path) -> None:
    given = {"code": "alloc_retries", "text": "2 retries", "advice": ""}
    metrics = metrics_of(base=TINY, activation=41) | {"memory/num_alloc_retries": 2}
    assert warnings(sheet_of(tmp_path, record(1, {}, metrics, warnings=[given]))) == ["Job 1 (t2v-1.3B): 2 retries."]


def test_checks_are_told_once_and_those_with_trouble_in_full(tmp_path: Path) -> None:
    told = [
        {"name": "driver", "state": "ok", "text": "575.57.08", "advice": ""},
        {"name": "torch", "state": "ok", "text": "2.11", "advice": ""},
        {"name": "processes", "state": "warning", "text": "1 other process uses the GPU", "advice": "stop it"},
    ]
    sheet = sheet_of(tmp_path, *(record(n, {"base_seed": n}, checks=told) for n in (1, 2)))
    assert checks(sheet.records) == [
        "processes: warning: 1 other process uses the GPU. Stop it.",
        "In order: driver and torch.",
    ]


def test_an_extra_pass_that_came_to_no_end_is_told(tmp_path: Path) -> None:
    passes = {"trace": {"outcome": "failed", "reason": "the disk is full"}, "attribution": {"outcome": "ok"}}
    sheet = sheet_of(tmp_path, record(1, {}, metrics_of(base=TINY, activation=41), passes=passes))
    assert unmeasured(sheet) == ["Job 1 (t2v-1.3B): its trace pass: failed: the disk is full"]


def test_a_damaged_attribution_is_named_and_the_numbers_are_shown(tmp_path: Path) -> None:
    made = record(1, {}, metrics_of(base=TINY, activation=41))
    write_sweep(tmp_path, made)
    (tmp_path / made["job"]["name"] / "attribution.json").write_text('{"schema_version": 1}')
    sheet = read_sheet(tmp_path)
    assert len(sheet.measured) == 1
    assert "attribution.json is incomplete: 'outcome' is missing" in unmeasured(sheet)[0]
