"""Estimated jobs as a user asks for them: the real command and the real worker, on a machine without a GPU."""

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import Command
from wan_sweep.memory_events import read_memory_events
from wan_sweep.record import Record, load_records

pytestmark = pytest.mark.slow

ROOM_GIB = 0.05


@pytest.fixture
def sweep(wan_sweep: Command, tmp_path: Path) -> Path:
    """One job that fits and one that does not."""
    done = wan_sweep("-m", "model=tiny", "card=RTX4060-8GB", f"memory_limit_gib=null,{ROOM_GIB}", "track=false")
    assert done.returncode == 0, done.stderr
    (tmp_path / "told.txt").write_text(done.stdout)
    (folder,) = (tmp_path / "outputs" / "sweep").iterdir()
    return folder


def test_estimated_jobs_have_records_tables_and_a_report_like_measured_ones(sweep: Path, tmp_path: Path) -> None:
    fits, does_not = load_records(sweep)
    assert [(one.mode, one.outcome) for one in (fits, does_not)] == [("estimate", "ok"), ("estimate", "oom")]
    assert does_not.reason.startswith("does not fit into 51.2 MiB of the RTX4060-8GB: out of memory in decode")
    for record in (fits, does_not):  # what does not fit says what it would need
        assert record.metrics["memory/peak/decode/allocated_bytes"] > 0
        assert record.metrics["time/lower_bound/total_s"] > 0
        assert record.knobs["card"] == record.environment["gpu"] == "RTX4060-8GB"
        assert_sure(record)
        attribution = json.loads((sweep / record.name / "attribution.json").read_text())
        assert attribution["peaks"][0]["allocated_bytes"] == record.metrics["memory/peak/allocated_bytes"]
    with (sweep / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows] == ["ok", "oom"]
    assert float(rows[0]["estimate/memory/peak/allocated_mib"]) > 0
    assert_timed(sweep, fits)
    told = (tmp_path / "told.txt").read_text()
    assert "Estimated for the RTX4060-8GB, not measured." in told
    for words in ("does not fit", "On the RTX4060-8GB (8.00 GiB) job 1 (", "by rule", "guessed"):
        assert words in told
        assert words in (sweep / "report.md").read_text()
    assert "Measured for this workload" not in told


def assert_sure(record: Record) -> None:
    assert record.estimate is not None
    for phase, one in record.estimate["confidence"].items():
        assert sum(one["by_basis_bytes"].values()) == record.metrics[f"memory/peak/{phase}/allocated_bytes"]
        assert one["at_most_bytes"] >= one["allocated_bytes"]


def assert_timed(sweep: Path, record: Record) -> None:
    events = read_memory_events(sweep / record.name)["events"]
    times = [event["elapsed_s"] for event in events]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(record.metrics["time/lower_bound/total_s"])
    assert (sweep / record.name / "memory_timeline.png").exists()
