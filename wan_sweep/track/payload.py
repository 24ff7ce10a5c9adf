"""What a record becomes in MLflow: name, tags, params, metrics and status of one run. Pure functions.

Status: FINISHED has its numbers (ok, skipped); FAILED tried and could not (oom, failed); KILLED was stopped, or never
let in, by the runner (timeout, interrupted, refused). The exact word is in the tag `outcome`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from wan_sweep.record import Record
from wan_sweep.schema import Scalar, text

_STATUS = {"ok": "FINISHED", "skipped": "FINISHED", "oom": "FAILED", "failed": "FAILED"}
_MIB = 2**20
_PARAM_CHARACTERS = 60
_TAG_CHARACTERS = 500
_ENVIRONMENT_TAGS = ("git_commit", "gpu", "driver", "torch", "cuda", "cudnn", "python", "allocator", "cpu", "platform")
_HEADLINES = ("memory/peak/allocated_bytes", "time/step_s", "time/total_s", "memory/peak/reserved_bytes")
# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#4D4D4D")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One reading as MLflow stores it.

    Args:
        key: metric name, unit last (`_mib`, `_s`, `_pct`).
        value: finite number in that unit.
        step: denoising step of a series, counted from 1; 0 for a single value.
    """

    key: str
    value: float
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Everything one run is made of; times in milliseconds since 1970."""

    name: str
    status: str
    start_ms: int
    end_ms: int
    tags: dict[str, str]
    params: dict[str, str]
    points: tuple[Point, ...]


def payload_of(record: Record) -> Payload:
    """Translate a record; the run lasts as long as the job did."""
    start_ms, end_ms = _milliseconds(record.started_at), _milliseconds(record.ended_at)
    return Payload(
        name=run_name(record),
        status=_STATUS.get(record.outcome, "KILLED"),
        start_ms=start_ms or end_ms,
        end_ms=max(start_ms, end_ms),
        tags=tags_of(record),
        params={knob: short_value(value) for knob, value in record.knobs.items()},
        points=tuple(points_of(record)),
    )


def run_name(record: Record) -> str:
    """Return a short name made of what differs in this sweep: words alone, switches and numbers with their knob."""
    parts = [
        value if isinstance(value, str) else f"{knob}={short_value(value)}" for knob, value in record.overrides.items()
    ]
    name = " ".join(parts) or text(record.knobs.get("model")) or record.key
    many = int(record.knobs.get("repeats") or 1) > 1
    return f"{name} #{record.repeat + 1}" if many else name


def short_value(value: Scalar) -> str:
    """Return a knob's value for a table cell: as typed, without long text and folders, different values never alike."""
    words = text(value)
    is_path = isinstance(value, str) and value.startswith("/")
    if not is_path and len(words) <= _PARAM_CHARACTERS:
        return words
    digest = hashlib.sha256(words.encode()).hexdigest()[:6]
    shown = PurePosixPath(words).name if is_path else words
    return f"{shown[: _PARAM_CHARACTERS - 8].rstrip()} #{digest}"


def tags_of(record: Record) -> dict[str, str]:
    """Return what a run is looked up by; values that say nothing are left out."""
    tags = {
        "sweep": record.sweep_id,
        "sweep_name": record.sweep_name,
        "role": "job",
        "job": record.name,
        "job_key": record.key,
        "outcome": record.outcome,
        "reason": record.reason,
        "failed_in": _failed_in(record),
        "mode": record.mode,
        "weights": record.weights,
        "sources": record.sources,
        "code_version": record.code_version,
        "measured_in": record.measured_in,
        **{name: record.environment.get(name) for name in _ENVIRONMENT_TAGS},
        "mlflow.source.name": "wan_sweep",
        "mlflow.source.type": "LOCAL",
        "mlflow.runColor": _COLOURS[(record.number - 1) % len(_COLOURS)],
    }
    return {name: clip(str(value)) for name, value in tags.items() if value not in {None, ""}}


def clip(words: str) -> str:
    """Return the first line of a text, cut to what a table cell bears."""
    line = words.strip().splitlines()[0] if words.strip() else ""
    return line if len(line) <= _TAG_CHARACTERS else line[: _TAG_CHARACTERS - 3] + "..."


def points_of(record: Record) -> Iterator[Point]:
    """Yield every reading: the job's, its series by step, and those of each rank where there are several."""
    yield from _points("", {**_headlines(record), **record.metrics}, record.series)
    for rank in record.ranks if len(record.ranks) > 1 else []:
        yield from _points(f"rank{rank['rank']}/", rank.get("metrics", {}), rank.get("series", {}))


def _headlines(record: Record) -> Mapping[str, float]:
    """Return what people compare first; MLflow's compare page preselects the metric that was stored first."""
    return {name: record.metrics[name] for name in _HEADLINES if name in record.metrics}


def _points(prefix: str, metrics: Mapping[str, Any], series: Mapping[str, Any]) -> Iterator[Point]:
    for name, value in metrics.items():
        yield from _reading(prefix + name, value, 0)
    for name, values in series.items():
        for step, value in enumerate(values, start=1):
            yield from _reading(prefix + name, value, step)


def _reading(name: str, value: object, step: int) -> Iterator[Point]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return
    stem = name.removesuffix("_bytes")
    if stem == name:
        yield Point(key=name, value=float(value), step=step)
    else:
        yield Point(key=f"{stem}_mib", value=value / _MIB, step=step)


def _milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000) if moment else 0


def _failed_in(record: Record) -> str | None:
    """Return the phase in which a job ended badly, as far as it is known."""
    failure = record.failure or {}
    where = str(failure.get("where") or "").partition(",")[0]
    return str(failure["phase"]) if "phase" in failure else where or None
