"""A sweep as a report sees it: one row per configuration, its repeats together, one of them the reference."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Self

from wan_sweep.errors import RecordError
from wan_sweep.headline import PEAK_RANK
from wan_sweep.record import RECORD_FILE, Record, load_record
from wan_sweep.report.attribution import Attribution, read_attribution
from wan_sweep.schema import Scalar, text
from wan_sweep.store import ATTRIBUTION, rank_folder
from wan_sweep.units import GIB

PEAK_ALLOCATED = "memory/peak/allocated_bytes"
PEAK_RESERVED = "memory/peak/reserved_bytes"
PROCESS_USED = "memory/peak/process_used_bytes"
OUTSIDE_ALLOCATOR = "memory/outside_allocator_bytes"
TOTAL_SECONDS = "time/total_s"
STEP_SECONDS = "time/step_s"
FIRST_STEP_SECONDS = "time/first_step_s"
LOWER_BOUND_STEP_SECONDS = "time/lower_bound/step_s"
LOWER_BOUND_TOTAL_SECONDS = "time/lower_bound/total_s"
COMPONENTS = ("qwen", "t5", "clip", "dit", "vae")
LIBRARIES = "libraries"
ACTIVATIONS = "activations"
PHASES = ("extend_prompt", "load", "encode_text", "encode_image", "denoise", "decode", "save")
MODES = ("measure", "estimate")

_GIB_ABOVE_BYTES = 10 * GIB


def phase_peak(phase: str) -> str:
    """Return the name of the metric that holds a phase's peak of allocated memory."""
    return f"memory/peak/{phase}/allocated_bytes"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Middle, smallest and largest of a metric over so many repeats; bytes or seconds, as the metric is.

    unrest_pct: of the times of a single run: by how much its steps differ among themselves.
    """

    middle: float
    low: float
    high: float
    num: int = 1
    unrest_pct: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration and the records of all its repeats, by job number.

    Args:
        records: at least one.
        folder: that of the sweep.
        attribution: what filled the device at its peaks, if a pass looked into that.
    """

    records: tuple[Record, ...]
    folder: Path
    attribution: Attribution | None = None

    @property
    def number(self) -> int:
        """Number of its first job; what the report calls the configuration by."""
        return self.records[0].number

    @property
    def mode(self) -> str:
        """Whether its numbers are measured or estimated."""
        return self.records[0].mode

    @property
    def knobs(self) -> Mapping[str, Scalar]:
        """All its knobs, as they were resolved."""
        return self.records[0].knobs

    @property
    def axes(self) -> Mapping[str, str]:
        """What differs within the sweep, as typed on the command line."""
        return {knob: text(value) for knob, value in self.records[0].overrides.items()}

    @property
    def label(self) -> str:
        """What differs, short: words alone, switches and numbers with their knob."""
        record = self.records[0]
        words = [
            shortened(value) if isinstance(value, str) else f"{knob}={text(value)}"
            for knob, value in record.overrides.items()
        ]
        return " ".join(words) or text(record.knobs.get("model")) or record.name

    @cached_property
    def measured(self) -> tuple[Record, ...]:
        """The records that hold the numbers of a whole run: of jobs that were ok, now or earlier, and of estimates."""
        return tuple(record for record in self.records if _is_complete(record))

    @property
    def outcome(self) -> str:
        """The outcome, with counts where repeats ended differently."""
        outcomes = [record.outcome for record in self.records]
        kinds = list(dict.fromkeys(outcomes))
        return kinds[0] if len(kinds) == 1 else ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds)

    def find(self, name: str) -> Path | None:
        """Return the file of this name in the folder of one of its jobs, or of the job that was taken over."""
        for record in self.measured or self.records:
            for folder in (self.folder / record.name, Path(record.measured_in) if record.measured_in else None):
                if folder and (folder / name).is_file():
                    return folder / name
        return None

    def spread(self, metric: str) -> Spread | None:
        """Return a metric over the measured repeats; None where none has it."""
        values = [float(record.metrics[metric]) for record in self.measured if metric in record.metrics]
        if not values:
            return None
        is_single_time = len(values) == 1 and metric.startswith("time/")
        return Spread(
            middle=median(values),
            low=min(values),
            high=max(values),
            num=len(values),
            unrest_pct=_unrest_pct(self.measured[0].series.get("step/seconds", [])) if is_single_time else 0.0,
        )

    def value(self, metric: str) -> float | None:
        """Return the middle of a metric over the measured repeats."""
        spread = self.spread(metric)
        return spread.middle if spread else None

    @cached_property
    def phase_peaks(self) -> Mapping[str, float]:
        """The peak of allocated memory of each phase that took place, in bytes."""
        return {phase: peak for phase in PHASES if (peak := self.value(phase_peak(phase)))}

    @property
    def peak_phase(self) -> str | None:
        """The phase that holds the peak of allocated memory."""
        return max(self.phase_peaks, key=lambda phase: self.phase_peaks[phase], default=None)

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

    def parts_at_peak(self) -> dict[str, float]:
        """Return what the peak is made of: weights by component, the libraries' workspaces, activations; bytes."""
        weights = self.weights_at_peak()
        rest = (self.value(PEAK_ALLOCATED) or 0.0) - sum(weights.values())
        libraries = min(self.value(f"memory/base/{LIBRARIES}_bytes") or 0.0, rest)
        return {**weights, **({LIBRARIES: libraries} if libraries else {}), ACTIVATIONS: rest - libraries}

    def base_bytes(self) -> float | None:
        """Return the bytes of the weights on the device in the peak phase; None where nothing was measured."""
        return sum(self.weights_at_peak().values()) if self.measured else None

    def needed_bytes(self) -> float | None:
        """Return what a card must be able to give to the process: the most over all repeats; None where not known."""
        process = self.spread(PROCESS_USED)
        if process:
            return process.high
        reserved, outside = self.spread(PEAK_RESERVED), self.spread(OUTSIDE_ALLOCATOR)
        return reserved.high + outside.high if reserved and outside else None


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All rows of a sweep in the order of their jobs.

    Args:
        folder: the sweep's folder.
        rows: one per configuration.
        damaged: what is wrong with each file that cannot be read.
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
        """The first row with numbers."""
        return next(iter(self.measured), None)

    @property
    def step_metric(self) -> str:
        """The seconds per step that all rows have: the median, the first step where there is only one, or a bound."""
        if self.mode == "estimate":
            return LOWER_BOUND_STEP_SECONDS
        has_median = any(row.value(STEP_SECONDS) is not None for row in self.rows)
        return STEP_SECONDS if has_median else FIRST_STEP_SECONDS

    @property
    def total_metric(self) -> str:
        """The seconds of the whole run; of an estimate, which runs nothing, a lower bound."""
        return LOWER_BOUND_TOTAL_SECONDS if self.mode == "estimate" else TOTAL_SECONDS

    @property
    def has_repeats(self) -> bool:
        """Whether some configuration ran more than once."""
        return any(len(row.records) > 1 for row in self.rows)

    @property
    def is_in_gib(self) -> bool:
        """Whether memory columns are in GiB rather than MiB; one unit for all."""
        return any((row.value(PEAK_ALLOCATED) or 0) > _GIB_ABOVE_BYTES for row in self.rows)

    @property
    def mode(self) -> str:
        """The mode of its rows, after `by_mode`."""
        return self.rows[0].mode if self.rows else MODES[0]

    def by_mode(self) -> list[Self]:
        """Return a sheet for each mode, so that no measurement stands in one column with an estimate."""
        modes = dict.fromkeys((*MODES, *(row.mode for row in self.rows)))
        groups = [tuple(row for row in self.rows if row.mode == mode) for mode in modes]
        parts = [replace(self, rows=rows) for rows in groups if rows] or [self]
        return [parts[0], *(replace(part, damaged=()) for part in parts[1:])]


def read_records(sweep_dir: Path) -> tuple[list[Record], list[str]]:
    """Return the readable records of a sweep by job number, and what is wrong with the others."""
    records, damaged = [], []
    for path in sorted(sweep_dir.glob(f"*/{RECORD_FILE}")):
        try:
            records.append(load_record(path))
        except RecordError as error:
            damaged.append(str(error))
    return sorted(records, key=lambda record: (record.number, record.repeat)), damaged


def read_sheet(sweep_dir: Path) -> Sheet:
    """Return the sweep in a folder; a damaged file is named, and the others are shown."""
    records, damaged = read_records(sweep_dir)
    rows = []
    for row in group(records, sweep_dir):
        path = row.find(_attribution_file(row))
        try:
            rows.append(replace(row, attribution=read_attribution(path)) if path else row)
        except RecordError as error:
            damaged.append(str(error))
            rows.append(row)
    return Sheet(folder=sweep_dir, rows=tuple(rows), damaged=tuple(damaged))


def _attribution_file(row: Row) -> str:
    """Return the file that tells who fills the device at the peak: that of the rank with the highest one."""
    fullest = next((int(one.metrics[PEAK_RANK]) for one in row.records if PEAK_RANK in one.metrics), 0)
    return (rank_folder(Path(), fullest) / ATTRIBUTION.result).as_posix()


def group(records: Iterable[Record], folder: Path) -> list[Row]:
    """Return a row for each set of equal knobs in one mode, in the order of the first job of each."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        identity = [record.mode, dict(record.knobs)]
        groups.setdefault(json.dumps(identity, sort_keys=True, default=str), []).append(record)
    return [Row(records=tuple(members), folder=folder) for members in groups.values()]


def difference_pct(value: float | None, reference: float | None) -> float | None:
    """Return how much larger a value is than the reference's, in percent; None where that has no meaning."""
    if value is None or not reference:
        return None
    return 100 * (value - reference) / reference


def job_list(rows: Sequence[Row]) -> str:
    """Return "job 2 (bf16)" or "jobs 1, 2 and 4" for running text."""
    if len(rows) == 1:
        return f"job {rows[0].number} ({rows[0].label})"
    return f"jobs {word_list([str(row.number) for row in rows])}"


def shortened(words: str, width: int = 48) -> str:
    """Return a text that is no longer than so many characters, such as the beginning of a prompt."""
    return words if len(words) <= width else f"{words[: width - 3].rstrip()}..."


def word_list(words: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _unrest_pct(steps: Sequence[float]) -> float:
    """Return the range of the times of the steps after the first, in percent of their median.

    Steps do the same work. Of many a tenth is left out at each end, since a single slow one moves no median.
    """
    ordered = sorted(steps[1:])
    ends = len(ordered) // 10
    middle = ordered[ends : len(ordered) - ends]
    return 100 * (middle[-1] - middle[0]) / median(middle) if len(middle) > 1 else 0.0


def _is_complete(record: Record) -> bool:
    if record.outcome == "ok":
        return True
    if record.mode == "estimate":  # what does not fit has all the numbers that it would need
        return record.outcome in {"oom", "skipped"} and PEAK_RESERVED in record.metrics
    # A result taken over may be that of a job that ran out of memory; only whole runs have timed their last phase.
    return record.outcome == "skipped" and "time/save_s" in record.metrics
