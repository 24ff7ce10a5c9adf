"""The regression gate: what grew, by how much, and the exit code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.wan_sweep.estimated_presets import estimated_peaks
from wan_sweep.record import Record
from wan_sweep.report.compare import Difference, Entry, differences, main, read_entries, write_table
from wan_sweep.schema import Job, Scalar
from wan_sweep.store import write_record
from wan_sweep.units import MIB

ALLOCATED, RESERVED = "memory/peak/allocated_bytes", "memory/peak/decode/reserved_bytes"


def record(number: int, allocated_mib: float, **knobs: Scalar) -> Record:
    return Record(
        key="0",
        number=number,
        name=f"{number}_job",
        sweep_name="sweep",
        sweep_id="now",
        sweep_folder="/sweep",
        knobs=Job(model="tiny").replace(**knobs).to_dict(),
        overrides=knobs,
        outcome="ok",
        started_at="",
        ended_at="",
        code_version="c0de",
        metrics={ALLOCATED: allocated_mib * MIB, RESERVED: 100 * MIB, "time/total_s": 1.0},
    )


def sweep(folder: Path, *records: Record) -> Path:
    for one in records:
        write_record(folder / one.name, one)
    return folder


def test_what_has_not_grown_ends_with_0_and_what_has_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = sweep(tmp_path / "a", record(1, 100, precision="fp16"), record(2, 200, precision="fp32"))
    b = sweep(tmp_path / "b", record(1, 208, precision="fp32"), record(2, 90, precision="fp16"))
    assert main([str(a), str(a)]) == 0
    assert "0 of 4 numbers grew" in capsys.readouterr().out
    assert main([str(a), str(b), "--tolerance-pct", "5"]) == 0
    assert main([str(a), str(b)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (grown,) = [line for line in lines if line.rstrip().endswith("grew")]
    assert grown.split() == ["precision=fp32", ALLOCATED, "200.0", "MiB", "208.0", "MiB", "+4.00", "%", "grew"]


def test_a_measured_job_compares_with_its_estimate(tmp_path: Path) -> None:
    measured = sweep(tmp_path / "a", record(1, 100), record(2, 100, offload=True))
    estimates = [record(1, 101, mode="estimate", card="H100-80GB"), record(2, 99, offload=True, mode="estimate")]
    estimated = sweep(tmp_path / "b", *estimates)
    found = differences(read_entries(measured), read_entries(estimated), [ALLOCATED])
    assert [one.pct for one in found] == pytest.approx([1.0, -1.0])


def test_a_job_or_a_number_that_is_gone_counts_as_grown(tmp_path: Path) -> None:
    one, other = record(1, 100), record(2, 100, offload=True)
    both, first = sweep(tmp_path / "a", one, other), sweep(tmp_path / "b", one, record(3, 1, precision="fp32"))
    gone = [entry for entry in differences(read_entries(both), read_entries(first)) if entry.is_growth(1)]
    assert [(entry.label, entry.after) for entry in gone] == [("offload=true", None)] * 2
    fewer = sweep(tmp_path / "c", replace(one, metrics={ALLOCATED: MIB}))
    assert main([str(both / one.name), str(fewer)]) == 1


def test_two_single_jobs_compare_whatever_their_knobs_are_and_times_if_asked(tmp_path: Path) -> None:
    a, b = sweep(tmp_path / "a", record(1, 1)), sweep(tmp_path / "b", record(1, 1, offload=True))
    assert main([str(a / "1_job" / "record.json"), str(b / "1_job"), "--metric", "time/*"]) == 0
    estimate = tmp_path / "estimate.json"
    estimate.write_text(json.dumps({"metrics": {ALLOCATED: 2 * MIB, RESERVED: MIB}}))
    assert main([str(a), str(estimate)]) == 1


def test_a_table_that_was_written_is_read_again(tmp_path: Path) -> None:
    entry = Entry(label="one", identity="one", metrics={ALLOCATED: 5.0, "time/total_s": 1.0})
    write_table(tmp_path / "table.json", [entry])
    assert read_entries(tmp_path / "table.json") == [replace(entry, metrics={ALLOCATED: 5.0})]


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is damaged"), ('{"x": 1}', "is no record.json, no estimate.json and no table of peaks")],
)
def test_what_cannot_be_compared_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main([str(path), str(path)]) == 2
    assert words in capsys.readouterr().err
    assert main([str(tmp_path), str(path)]) == 2
    assert "holds no record with numbers" in capsys.readouterr().err
    good = sweep(tmp_path / "good", record(1, 1))
    assert main([str(good), str(good), "--metric", "nonsense"]) == 2
    assert "has none of the metrics nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_no_preset_is_estimated_to_take_more_than_the_table_says(repository: Path) -> None:
    table = read_entries(repository / "tests" / "data" / "estimated_peaks.json")
    now = [Entry(label=label, identity=label, metrics=metrics) for label, metrics in estimated_peaks().items()]
    grown: list[Difference] = [one for one in differences(table, now) if one.is_growth(0.0)]
    # A growth that is meant: python scripts/renew_estimated_peaks.py, and commit what it writes.
    assert grown == []
