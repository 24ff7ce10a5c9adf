"""Estimates and measurements never share a column."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.wan_sweep.made_up_records import KNOBS, metrics_of, record, write_sweep
from wan_sweep.report import print_summary, write_reports
from wan_sweep.report.sheet import Sheet, read_sheet

BASE = {"t5": 30.0, "dit": 20.0, "vae": 4.0}


def jobs() -> list[dict[str, Any]]:
    made = []
    for number, (mode, offload) in enumerate(
        [("measure", False), ("estimate", False), ("measure", True), ("estimate", True)], start=1
    ):
        activation = 200 if mode == "measure" else 201
        metrics = metrics_of(base=BASE, activation=activation - (50 if offload else 0))
        overrides = {"mode": mode, "offload": offload}
        made.append(record(number, overrides, metrics, mode=mode, knobs={**KNOBS, **overrides}))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_sweep(tmp_path_factory.mktemp("modes"), *jobs())
    write_reports(made)
    return made


@pytest.fixture(scope="module")
def parts(folder: Path) -> list[Sheet]:
    return read_sheet(folder).by_mode()


def test_each_mode_has_a_sheet_of_its_own(parts: list[Sheet]) -> None:
    assert [(part.mode, [row.number for row in part.rows]) for part in parts] == [
        ("measure", [1, 3]),
        ("estimate", [2, 4]),
    ]


def test_each_mode_is_compared_with_its_own_reference(parts: list[Sheet]) -> None:
    assert [part.reference.number for part in parts if part.reference] == [1, 2]


def test_equal_knobs_in_two_modes_are_no_repeats(tmp_path: Path) -> None:
    metrics = metrics_of(base=BASE, activation=41)
    made = [record(n, {}, metrics, mode=mode) for n, mode in ((1, "measure"), (2, "estimate"))]
    assert [len(row.records) for row in read_sheet(write_sweep(tmp_path, *made)).rows] == [1, 1]


def test_the_csv_has_columns_of_their_own_for_estimates(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text("utf-8"))))
    measured, estimated = "memory/peak/allocated_mib", "estimate/memory/peak/allocated_mib"
    assert [bool(row[measured]) for row in rows] == [True, False, True, False]
    assert [bool(row[estimated]) for row in rows] == [False, True, False, True]
    assert [row["mode"] for row in rows] == ["measure", "estimate", "measure", "estimate"]


def test_the_report_has_a_table_and_pictures_for_each_mode(folder: Path) -> None:
    text = (folder / "report.md").read_text("utf-8")
    measured, estimated = text.split("## Estimated")
    assert measured.count("peak MiB") == estimated.count("peak MiB") == 1
    assert "| 254.0 |" in measured.replace("    ", " ").replace("  ", " ")
    assert "](peak_memory.png)" in measured
    assert "](peak_memory_estimate.png)" in estimated
    assert "the first that was estimated" in estimated
    assert (folder / "peak_memory_estimate.png").exists()


def test_the_page_and_the_terminal_keep_them_apart_too(folder: Path) -> None:
    page = (folder / "report.html").read_text("utf-8")
    assert page.count('<table class="sortable">') == 2
    buffer = io.StringIO()
    print_summary(folder, Console(file=buffer, width=160))
    assert buffer.getvalue().index("Measured") < buffer.getvalue().index("Estimated")


def test_one_mode_needs_no_headings(tmp_path: Path) -> None:
    write_reports(write_sweep(tmp_path, record(1, {}, metrics_of(base=BASE, activation=41))))
    assert "## Measured" not in (tmp_path / "report.md").read_text("utf-8")
