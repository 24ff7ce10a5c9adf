from pathlib import Path
from typing import Any

from tests.wan_sweep.made_up_records import KNOBS, main_job, metrics_of, record, write_sweep
from wan_sweep.report.cells import columns_of
from wan_sweep.report.change import change_of
from wan_sweep.report.effects import effects
from wan_sweep.report.findings import headline, warnings, without_effect
from wan_sweep.report.sheet import Sheet, read_sheet

TINY = {"t5": 3.0, "dit": 2.0, "vae": 4.0}


def sheet_of(folder: Path, *records: dict[str, Any]) -> Sheet:
    return read_sheet(write_sweep(folder, *records))


def slicing(folder: Path, off: list[float], on: list[float], *, more: float = 0.0) -> Sheet:
    """A sweep of attention_slicing with so many seconds per step in each repeat."""
    jobs = []
    for value, steps in ((False, off), (True, on)):
        for repeat, step_s in enumerate(steps):
            metrics = metrics_of(base=TINY, activation=41 + (more if value else 0.0), step_s=step_s)
            knobs = {**KNOBS, "attention_slicing": value, "repeats": len(off)}
            jobs.append(record(len(jobs) + 1, {"attention_slicing": value}, metrics, repeat=repeat, knobs=knobs))
    return sheet_of(folder, *jobs)


def sentence(sheet: Sheet) -> str:
    (effect,) = effects(sheet)
    return effect.sentence()


def test_an_effect_is_measured_between_jobs_that_differ_in_one_knob(tmp_path: Path) -> None:
    assert [effect.sentence() for effect in effects(sheet_of(tmp_path, *main_job()))] == [
        (
            "precision=bf16 instead of fp16: peak +0.0 to +0.1 %, step the same within 2 % (-1.5 to -1.1 %) "
            "(2 pairs of jobs that differ in nothing else)."
        ),
        (
            "offload=false instead of true: peak +176.2 to +176.4 %, step -3.1 to -2.6 % "
            "(2 pairs of jobs that differ in nothing else)."
        ),
    ]


def test_single_runs_are_told_apart_from_two_percent_on(tmp_path: Path) -> None:
    assert "step the same within 2 % (-1.9 %)" in sentence(slicing(tmp_path / "near", [1.0], [0.981], more=9))
    assert "step -2.5 % (1 pair" in sentence(slicing(tmp_path / "far", [1.0], [0.975], more=9))


def test_single_runs_whose_own_steps_differ_by_more_are_not_told_apart(tmp_path: Path) -> None:
    def swept(folder: Path, unrest: list[float]) -> str:
        jobs = [
            record(
                index + 1,
                {"attention_slicing": value},
                metrics_of(base=TINY, activation=41 + 9 * index, step_s=step_s),
                knobs={**KNOBS, "attention_slicing": value},
                series={"step/seconds": [5.0, *steps]},
            )
            for index, (value, step_s, steps) in enumerate(((False, 1.0, [1.0, 1.0, 1.0]), (True, 1.2, unrest)))
        ]
        return sentence(sheet_of(folder, *jobs))

    restless = swept(tmp_path / "restless", [0.9, 1.2, 1.5])
    assert "step the same within the 50 % by which the steps of one run differ (+20.0 %)" in restless
    assert "step +20.0 % (1 pair" in swept(tmp_path / "calm", [1.19, 1.2, 1.21])
    # One slow step of many says nothing about their median.
    assert "step +20.0 % (1 pair" in swept(tmp_path / "spike", [1.2] * 11 + [3.0])


def test_pairs_that_disagree_are_counted_by_direction(tmp_path: Path) -> None:
    seconds = {("fp16", False): 1.0, ("fp16", True): 1.5, ("bf16", False): 1.0, ("bf16", True): 0.8}
    jobs = [
        record(
            number,
            {"precision": precision, "attention_slicing": is_sliced},
            metrics_of(base=TINY, activation=41 + 9 * is_sliced, step_s=step_s),
        )
        for number, ((precision, is_sliced), step_s) in enumerate(seconds.items(), start=1)
    ]
    sliced = effects(sheet_of(tmp_path, *jobs))[-1].sentence()
    assert "step -20.0 to +50.0 %, slower in 1 and faster in 1 of 2 pairs (2 pairs" in sliced


def test_repeats_tell_times_apart_only_if_they_do_not_overlap(tmp_path: Path) -> None:
    overlapping = slicing(tmp_path / "overlapping", [1.00, 1.10, 1.20], [0.90, 1.00, 1.05], more=9)
    apart = slicing(tmp_path / "apart", [1.00, 1.01, 1.02], [0.99, 0.99, 0.995], more=9)
    assert "step the same within the spread of repeats (-9.1 %, -25.0 to +5.0 % over repeats)" in sentence(overlapping)
    assert "step -2.0 % (-2.9 to -0.5 % over repeats) (1 pair" in sentence(apart)


def test_a_time_within_noise_is_not_called_faster(tmp_path: Path) -> None:
    lines = headline(slicing(tmp_path, [1.00, 1.10, 1.20], [0.90, 1.00, 1.05]))
    assert "job 1 is as fast within the spread of repeats." in lines[2]


def test_differences_in_the_table_have_their_spread_and_mark_noise(tmp_path: Path) -> None:
    sheet = slicing(tmp_path, [1.00, 1.10, 1.20], [0.90, 1.00, 1.05])
    cells = {column.title: column.cells for column in columns_of(sheet)}
    assert cells["step", "diff %"] == ("0", "~-9.1 (-25.0..+5.0)")
    assert cells["peak", "diff %"] == ("0", "0")


def test_a_change_of_bytes_that_repeat_has_no_spread(tmp_path: Path) -> None:
    first, second = slicing(tmp_path, [1.0], [1.0], more=95).rows
    change = change_of("memory/peak/allocated_bytes", second, first)
    assert change is not None
    assert change.low == change.high == change.pct > 0


def test_a_knob_that_leaves_every_byte_and_the_time_alone_changed_nothing(tmp_path: Path) -> None:
    sheet = slicing(tmp_path, [1.0], [1.005])
    (found,) = without_effect(sheet)
    assert found == (
        "attention_slicing=true instead of false changed nothing measurable in memory and time: the peak of every "
        "phase is the same to the byte, step the same within 2 % (+0.5 %) (1 pair of jobs that differ in nothing else)."
    )
    assert effects(sheet)[0].is_nothing


def test_a_single_byte_or_a_slower_step_is_an_effect(tmp_path: Path) -> None:
    assert without_effect(slicing(tmp_path / "byte", [1.0], [1.0], more=2**-20)) == []
    assert without_effect(slicing(tmp_path / "time", [1.0], [1.1])) == []


def test_what_jobs_declare_is_not_found_a_second_time(tmp_path: Path) -> None:
    metrics = metrics_of(base=TINY, activation=41)
    idle = {"attention_slicing": "the kernel needs none"}
    sheet = sheet_of(
        tmp_path,
        record(1, {"attention_slicing": False}, metrics),
        record(2, {"attention_slicing": True}, metrics, idle_knobs=idle),
    )
    assert without_effect(sheet) == [
        "attention_slicing changed nothing in job 2 (attention_slicing=true), because the kernel needs none."
    ]


def test_where_the_peak_hides_what_a_knob_does_the_phases_tell(tmp_path: Path) -> None:
    metrics = metrics_of(base={"t5": 0.0, "dit": 0.0, "vae": 0.0}, activation=41, scale=0.1)
    encode = "memory/peak/encode_text/allocated_bytes"
    less = {**metrics, encode: metrics[encode] / 2}
    sheet = sheet_of(
        tmp_path, record(1, {"attention_slicing": False}, metrics), record(2, {"attention_slicing": True}, less)
    )
    assert sentence(sheet) == (
        "attention_slicing=true instead of false: peak unchanged (in encode_text -50.0 %), step the same within 2 % "
        "(1 pair of jobs that differ in nothing else)."
    )


def test_a_trace_that_had_to_be_cut_is_told(tmp_path: Path) -> None:
    left_out = "no decode: it takes 2.00 GiB, and of the 1.00 GiB that a trace may have 512.0 MiB are left"
    metrics = metrics_of(base=TINY, activation=41)
    cut, whole = (
        record(1, {}, metrics, passes={"trace": {"outcome": "ok", "reason": "", "stopped": words}})
        for words in (left_out, "")
    )
    assert warnings(sheet_of(tmp_path / "cut", cut)) == [
        f"Job 1 (t2v-1.3B): its trace does not hold all that it could: {left_out}."
    ]
    assert warnings(sheet_of(tmp_path / "whole", whole)) == []
