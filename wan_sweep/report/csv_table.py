"""results.csv: a row per job, with the metrics as MLflow names them."""

import csv
import io
from collections.abc import Sequence

from wan_sweep.record import Record
from wan_sweep.schema import text
from wan_sweep.units import mib


def csv_text(records: Sequence[Record]) -> str:
    """Return the table: job, outcome, reason, the knobs that differ, the metrics in MiB, seconds and percent."""
    knobs = list(dict.fromkeys(knob for record in records for knob in record.overrides))
    if any(record.repeat for record in records):
        knobs.append("repeat")
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["job", "outcome", "reason", *knobs, *map(_tracked_name, metrics)])
    for record in records:
        settings = {**{knob: text(value) for knob, value in record.overrides.items()}, "repeat": str(record.repeat)}
        values = [_tracked_value(name, record.metrics[name]) if name in record.metrics else "" for name in metrics]
        reason = " ".join(record.reason.split())
        writer.writerow([record.number, record.outcome, reason, *(settings.get(knob, "") for knob in knobs), *values])
    return buffer.getvalue()


def _tracked_name(metric: str) -> str:
    stem = metric.removesuffix("_bytes")
    return metric if stem == metric else f"{stem}_mib"


def _tracked_value(metric: str, value: float) -> str:
    return (
        f"{mib(value):.4f}" if metric.endswith("_bytes") else f"{value:g}" if isinstance(value, int) else f"{value:.6g}"
    )
