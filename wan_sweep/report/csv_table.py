"""results.csv: a row per job, with the metrics as MLflow names them."""

import csv
import io
from collections.abc import Sequence

from wan_sweep.record import Record
from wan_sweep.report.workloads import unswept
from wan_sweep.schema import text
from wan_sweep.units import mib


def csv_text(records: Sequence[Record]) -> str:
    """Return the table: job, outcome, reason, the knobs that differ, the metrics in MiB, seconds and percent.

    Of several ranks each has its metrics in columns of its own, too.

    Where some jobs were measured and others estimated, a column tells which, and estimates have columns of their own.
    """
    followed = unswept(records)
    knobs = [*dict.fromkeys(knob for record in records for knob in record.overrides), *followed]
    if any(record.repeat for record in records):
        knobs.append("repeat")
    if len({record.mode for record in records}) > 1 and "mode" not in knobs:
        knobs.append("mode")
    numbers = [_numbers(record) for record in records]
    pairs = zip(records, numbers, strict=True)
    metrics = list(dict.fromkeys((_column(record, name), name) for record, known in pairs for name in known))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["job", "outcome", "reason", *knobs, *(column for column, _ in metrics)])
    for record, known in zip(records, numbers, strict=True):
        settings = {knob: "" if (value := record.knobs.get(knob)) is None else text(value) for knob in followed}
        settings |= {knob: text(value) for knob, value in record.overrides.items()}
        settings |= {"repeat": str(record.repeat), "mode": record.mode}
        values = [
            _tracked_value(name, known[name]) if name in known and _column(record, name) == column else ""
            for column, name in metrics
        ]
        reason = " ".join(record.reason.split())
        writer.writerow([record.number, record.outcome, reason, *(settings.get(knob, "") for knob in knobs), *values])
    return buffer.getvalue()


def _numbers(record: Record) -> dict[str, float]:
    """Return the metrics of the job and, where there are several, those of each rank."""
    ranks = record.ranks if len(record.ranks) > 1 else []
    of_ranks = {f"rank{rank['rank']}/{name}": value for rank in ranks for name, value in rank["metrics"].items()}
    return {**record.metrics, **of_ranks}


def _column(record: Record, metric: str) -> str:
    """Return the name of the column for a record's metric: as in MLflow, estimates with their mode in front."""
    stem = metric.removesuffix("_bytes")
    name = metric if stem == metric else f"{stem}_mib"
    return name if record.mode == "measure" else f"{record.mode}/{name}"


def _tracked_value(metric: str, value: float) -> str:
    return (
        f"{mib(value):.4f}" if metric.endswith("_bytes") else f"{value:g}" if isinstance(value, int) else f"{value:.6g}"
    )
