"""Several ranks in the report: side by side, and never as one number that hides a rank."""

from pathlib import Path
from typing import Any

from tests.wan_sweep.made_up_records import MIB, metrics_of, record, write_sweep
from wan_sweep.headline import told_together
from wan_sweep.launch.slots import NOTHING, Lease
from wan_sweep.record import Record
from wan_sweep.report.csv_table import csv_text
from wan_sweep.report.job_page import job_section
from wan_sweep.report.ranks import HEADS, rank_lines, rank_rows
from wan_sweep.report.sheet import read_sheet
from wan_sweep.runner import _on


def two_ranks() -> dict[str, Any]:
    base = {"t5": 100.0, "dit": 400.0, "vae": 50.0}
    told = {
        0: {"outcome": "ok", "metrics": metrics_of(base=base, activation=300.0, step_s=0.5)},
        1: {"outcome": "ok", "metrics": metrics_of(base={"dit": 400.0}, activation=310.0, step_s=0.4)},
    }
    for rank in (0, 1):
        told[rank]["metrics"] |= {  # type: ignore[index]
            "collectives/given_per_step_bytes": 64 * MIB,
            "collectives/per_step_s": 0.125 + rank / 8,
        }
    together = told_together(told)
    return record(1, {"ulysses_size": 2}, together["metrics"], ranks=together["ranks"])


def test_each_rank_has_its_peak_its_step_and_its_exchanges(tmp_path: Path) -> None:
    write_sweep(tmp_path, two_ranks())
    (line,) = rank_lines(read_sheet(tmp_path))
    assert line.startswith(
        "Job 1 (ulysses_size=2): peak 850.0 MiB, 710.0 MiB, the highest on rank 0; a step 500 ms, 400 ms;"
    )
    assert "in collectives 125 ms, 250 ms of a step for 64.0 MiB given" in line


def test_a_table_has_a_row_for_each_rank(tmp_path: Path) -> None:
    rows = list(rank_rows(Record.from_json(two_ranks())))
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(len(row) == len(HEADS) for row in rows)
    assert [row[2] for row in rows] == ["850.0 MiB", "710.0 MiB"]
    write_sweep(tmp_path, two_ranks())
    sheet = read_sheet(tmp_path)
    assert "<h3>Ranks</h3>" in job_section(sheet.rows[0], sheet)


def test_one_rank_needs_no_words(tmp_path: Path) -> None:
    write_sweep(tmp_path, record(1, {}, metrics_of(base={"dit": 400.0}, activation=1.0)))
    assert rank_lines(read_sheet(tmp_path)) == []


def test_the_table_of_numbers_has_columns_for_each_rank() -> None:
    head, row = csv_text([Record.from_json(two_ranks())]).splitlines()
    told = dict(zip(head.split(","), row.split(","), strict=True))
    names = ("memory/peak/allocated_mib", "rank0/memory/peak/allocated_mib", "rank1/memory/peak/allocated_mib")
    assert [told[name] for name in names] == ["850.0000", "850.0000", "710.0000"]


def test_a_record_names_its_gpus_and_says_if_they_were_shared() -> None:
    plain = Record.from_json(two_ranks())
    assert _on(NOTHING, plain) is plain
    alone = _on(Lease(devices=("0", "3")), plain)
    assert (alone.environment["devices"], alone.warnings) == ("0,3", plain.warnings)
    knobs = {**two_ranks()["knobs"], "share_gpu": True}
    shared = _on(Lease(devices=("0",)), Record.from_json({**two_ranks(), "knobs": knobs}))
    assert [warning["code"] for warning in shared.warnings] == ["shared_gpu"]
