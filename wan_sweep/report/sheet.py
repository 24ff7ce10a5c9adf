"""A sweep as a report sees it: one row per configuration, its repeats together, one of them the reference."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from wan_sweep.errors import RecordError
from wan_sweep.record import RECORD_FILE, Record, load_record
from wan_sweep.schema import text
from wan_sweep.units import GIB

PEAK_ALLOCATED = "memory/peak/allocated_bytes"
PEAK_RESERVED = "memory/peak/reserved_bytes"
TOTAL_SECONDS = "time/total_s"
STEP_SECONDS = "time/step_s"
FIRST_STEP_SECONDS = "time/first_step_s"
COMPONENTS = ("t5", "clip", "dit", "vae")
PHASES = ("load", "encode_text", "encode_image", "denoise", "decode", "save")

_GIB_ABOVE_BYTES = 10 * GIB


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Middle, smallest and largest of a metric over the repeats; bytes or seconds, as the metric is."""

    middle: float
    low: float
    high: float

    @property
    def is_wide(self) -> bool:
        """Whether the repeats differ at all."""
        return self.high > self.low


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration and the records of all its repeats, by job number."""

    records: tuple[Record, ...]

    @property
    def number(self) -> int:
        """Number of its first job; what the report calls the configuration by."""
        return self.records[0].number

    @property
    def axes(self) -> Mapping[str, str]:
        """What differs within the sweep, as typed on the command line."""
        return {knob: text(value) for knob, value in self.records[0].overrides.items()}

    @property
    def label(self) -> str:
        """What differs, short: words alone, switches and numbers with their knob."""
        record = self.records[0]
        words = [
            value if isinstance(value, str) else f"{knob}={text(value)}" for knob, value in record.overrides.items()
        ]
        return " ".join(words) or text(record.knobs.get("model")) or record.name

    @cached_property
    def measured(self) -> tuple[Record, ...]:
        """The records that hold a complete measurement: of jobs that were ok, or were so in an earlier sweep."""
        return tuple(record for record in self.records if _is_complete(record))

    @property
    def outcome(self) -> str:
        """The outcome, with counts where repeats ended differently."""
        outcomes = [record.outcome for record in self.records]
        kinds = list(dict.fromkeys(outcomes))
        return kinds[0] if len(kinds) == 1 else ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds)

    def spread(self, metric: str) -> Spread | None:
        """Return a metric over the measured repeats; None where none has it."""
        values = [float(record.metrics[metric]) for record in self.measured if metric in record.metrics]
        return Spread(middle=median(values), low=min(values), high=max(values)) if values else None

    def value(self, metric: str) -> float | None:
        """Return the middle of a metric over the measured repeats."""
        spread = self.spread(metric)
        return spread.middle if spread else None

    @cached_property
    def peak_phase(self) -> str | None:
        """The phase that holds the peak of allocated memory."""
        peaks = {phase: self.value(f"memory/peak/{phase}/allocated_bytes") or 0.0 for phase in PHASES}
        phase = max(peaks, key=lambda name: peaks[name])
        return phase if peaks[phase] > 0 else None

    def weights_at_peak(self) -> dict[str, float]:
        """Return the bytes of each component that lies on the device while the peak phase runs.

        Older measurers tell only what each component needs, not where it is; then all of them count as present.
        """
        found = {part: self.value(f"memory/resident/{self.peak_phase}/{part}_bytes") for part in COMPONENTS}
        if all(value is None for value in found.values()):
            found = {part: self.value(f"memory/base/{part}_bytes") for part in COMPONENTS}
        peak = self.value(PEAK_ALLOCATED) or 0.0
        weights = {part: value for part, value in found.items() if value}
        return weights if sum(weights.values()) <= peak else {}

    def base_bytes(self) -> float | None:
        """Return the bytes of the weights on the device in the peak phase; None where nothing was measured."""
        return sum(self.weights_at_peak().values()) if self.measured else None


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All rows of a sweep in the order of their jobs.

    Args:
        folder: the sweep's folder.
        rows: one per configuration.
        damaged: what is wrong with each record that cannot be read.
    """

    folder: Path
    rows: tuple[Row, ...]
    damaged: tuple[str, ...] = ()

    @property
    def records(self) -> list[Record]:
        """All records, by job number."""
        return sorted((record for row in self.rows for record in row.records), key=lambda record: record.number)

    @property
    def measured(self) -> list[Row]:
        """The rows with numbers."""
        return [row for row in self.rows if row.measured]

    @property
    def axes(self) -> list[str]:
        """The knobs that differ within the sweep, in the order of the command line."""
        return list(dict.fromkeys(knob for row in self.rows for knob in row.axes))

    @property
    def reference(self) -> Row | None:
        """The first row with numbers: the one that the others are compared with."""
        return next(iter(self.measured), None)

    @property
    def step_metric(self) -> str:
        """The seconds per step that all rows have: the median, or the first step where there is only one."""
        has_median = any(row.value(STEP_SECONDS) is not None for row in self.rows)
        return STEP_SECONDS if has_median else FIRST_STEP_SECONDS

    @property
    def has_repeats(self) -> bool:
        """Whether some configuration ran more than once."""
        return any(len(row.records) > 1 for row in self.rows)

    @property
    def is_in_gib(self) -> bool:
        """Whether memory columns are in GiB rather than MiB; one unit for all."""
        return any((row.value(PEAK_ALLOCATED) or 0) > _GIB_ABOVE_BYTES for row in self.rows)


def read_sheet(sweep_dir: Path) -> Sheet:
    """Return the sweep in a folder; a damaged record is named, and the others are shown."""
    records, damaged = [], []
    for path in sorted(sweep_dir.glob(f"*/{RECORD_FILE}")):
        try:
            records.append(load_record(path))
        except RecordError as error:
            damaged.append(str(error))
    return Sheet(folder=sweep_dir, rows=tuple(group(records)), damaged=tuple(damaged))


def group(records: Iterable[Record]) -> list[Row]:
    """Return a row for each set of equal knobs, in the order of the first job of each."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda one: (one.number, one.repeat)):
        groups.setdefault(json.dumps(dict(record.knobs), sort_keys=True, default=str), []).append(record)
    return [Row(records=tuple(members)) for members in groups.values()]


def difference_pct(value: float | None, reference: float | None) -> float | None:
    """Return how much larger a value is than the reference's, in percent; None where that has no meaning."""
    if value is None or not reference:
        return None
    return 100 * (value - reference) / reference


def job_list(rows: Sequence[Row]) -> str:
    """Return "job 2 (bf16)" or "jobs 1, 2 and 4" for running text."""
    if len(rows) == 1:
        return f"job {rows[0].number} ({rows[0].label})"
    numbers = [str(row.number) for row in rows]
    return f"jobs {', '.join(numbers[:-1])} and {numbers[-1]}"


def _is_complete(record: Record) -> bool:
    if record.outcome == "ok":
        return True
    # A result taken over may be that of a job that ran out of memory; only whole runs have timed their last phase.
    return record.outcome == "skipped" and "time/save_s" in record.metrics
