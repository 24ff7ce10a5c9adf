"""`python -m wan_sweep.report.compare A B`: whether B takes more memory, or time, than A; for anybody's CI.

A and B are each a record.json, the folder of a job or of a sweep, an estimate.json, or a table that `write_table` left.
Exit codes: 0 nothing has grown beyond the tolerance, 1 something has or is gone, 2 the two cannot be compared.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wan_sweep.errors import RecordError, UsageError
from wan_sweep.record import RECORD_FILE, Record, load_record, load_records
from wan_sweep.schema import KNOBS, text
from wan_sweep.store import read_json, write_json
from wan_sweep.units import format_bytes, format_seconds

DEFAULT_METRICS = ("memory/peak/*allocated_bytes", "memory/peak/*reserved_bytes")
DEFAULT_TOLERANCE_PCT = 1.0
TABLE_KIND = "wan_sweep peaks"
EXIT_GREW, EXIT_USAGE = 1, 2

_WHERE_NOT_WHAT = frozenset({"mode", "card", "device", "memory_limit_gib"})
"""Knobs that say where a number comes from: a measured job may be compared with its estimate."""
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One configuration's numbers.

    Attributes:
        label: what it is called in the table.
        identity: by which its counterpart is found; empty where nothing tells of the knobs.
    """

    label: str
    identity: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of one configuration in A and B; `after` is None where B has no such number."""

    label: str
    metric: str
    before: float
    after: float | None

    @property
    def pct(self) -> float | None:
        """By how many percent it has grown; None where one of the two is missing or zero."""
        return 100 * (self.after - self.before) / self.before if self.after is not None and self.before else None

    def is_growth(self, tolerance_pct: float) -> bool:
        """Whether it is larger by more than the tolerance, or gone."""
        if self.after is None:
            return True
        return self.after > self.before * (1 + tolerance_pct / 100)


def read_entries(path: Path) -> list[Entry]:
    """The configurations in a file or folder.

    Raises:
        UsageError: there is none.
        RecordError: a file cannot be read.
    """
    if path.is_dir():
        records = [load_record(path)] if (path / RECORD_FILE).exists() else load_records(path)
        entries = [_of_record(record) for record in records if record.metrics]
        if not entries:
            raise UsageError(f"{path} holds no record with numbers; give the folder of a job or of a sweep, or a file")
        return entries
    values = read_json(path)
    if values.get("kind") == TABLE_KIND:
        return [Entry(label=label, identity=label, metrics=metrics) for label, metrics in values["peaks"].items()]
    if "job" in values and "knobs" in values:
        return [_of_record(load_record(path))]
    if "metrics" in values:
        return [Entry(label=path.parent.name or path.stem, identity="", metrics=values["metrics"])]
    raise UsageError(
        f"{path} is no record.json, no estimate.json and no table of peaks; give one of these, or a folder"
    )


def write_table(path: Path, entries: Sequence[Entry], patterns: Sequence[str] = DEFAULT_METRICS) -> None:
    """Keeps numbers in one small file, to compare with later.

    Raises:
        OSError: it cannot be written.
    """
    peaks = {entry.label: {name: entry.metrics[name] for name in _matching(entry, patterns)} for entry in entries}
    write_json(path, {"kind": TABLE_KIND, "peaks": peaks})


def differences(
    before: Sequence[Entry], after: Sequence[Entry], patterns: Sequence[str] = DEFAULT_METRICS
) -> list[Difference]:
    """Every metric of every configuration of A beside that of B."""
    found = []
    for entry, other in _pairs(before, after):
        for name in _matching(entry, patterns):
            value = None if other is None else other.metrics.get(name)
            found.append(Difference(label=entry.label, metric=name, before=entry.metrics[name], after=value))
    return found


def table_of(found: Sequence[Difference], tolerance_pct: float) -> Table:
    """The differences for people, those that count marked."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("configuration", "metric", "A", "B", "change", ""):
        table.add_column(title, justify="right" if title in {"A", "B", "change"} else "left", no_wrap=True)
    for one in found:
        grew = one.is_growth(tolerance_pct)
        change = "-" if one.pct is None else f"{one.pct:+.2f} %"
        after = "missing" if one.after is None else _shown(one.metric, one.after)
        mark = Text("grew" if one.after is not None else "gone", style="red") if grew else Text("")
        table.add_row(one.label, one.metric, _shown(one.metric, one.before), after, change, mark)
    return table


def _of_record(record: Record) -> Entry:
    knobs = {
        name: record.knobs[name]
        for name, knob in KNOBS.items()
        if knob.rule.in_key and name not in _WHERE_NOT_WHAT and name in record.knobs
    }
    words = " ".join(f"{name}={text(value)}" for name, value in record.overrides.items())
    identity = json.dumps([knobs, record.repeat], sort_keys=True)
    return Entry(label=words or record.name, identity=identity, metrics=record.metrics)


def _pairs(before: Sequence[Entry], after: Sequence[Entry]) -> Iterator[tuple[Entry, Entry | None]]:
    if len(before) == len(after) == 1:
        yield before[0], after[0]
        return
    others = {entry.identity: entry for entry in after}
    for entry in before:
        yield entry, others.get(entry.identity)


def _matching(entry: Entry, patterns: Sequence[str]) -> list[str]:
    return [name for name in entry.metrics if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _shown(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return format_bytes(value)
    return format_seconds(value) if metric.endswith("_s") else f"{value:g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wan_sweep.report.compare", description=__doc__)
    parser.add_argument("before", metavar="A", type=Path, help="record, estimate, table, or a folder with records")
    parser.add_argument("after", metavar="B", type=Path, help="the same, of what is to be judged")
    parser.add_argument(
        "--tolerance-pct", type=float, default=DEFAULT_TOLERANCE_PCT, help="growth that is let pass (default: 1)"
    )
    parser.add_argument(
        "--metric", action="append", help=f"metrics to compare, * for any (default: {' '.join(DEFAULT_METRICS)})"
    )
    parser.add_argument("--all", action="store_true", help="list what did not grow, too")
    asked = parser.parse_args(arguments)
    patterns = asked.metric or DEFAULT_METRICS
    try:
        found = differences(read_entries(asked.before), read_entries(asked.after), patterns)
    except (UsageError, RecordError) as error:
        sys.stderr.write(f"wan_sweep: {error}\n")
        return EXIT_USAGE
    if not found:
        sys.stderr.write(f"wan_sweep: {asked.before} has none of the metrics {' '.join(patterns)}\n")
        return EXIT_USAGE
    grown = [one for one in found if one.is_growth(asked.tolerance_pct)]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    shown = found if asked.all else grown
    if shown:
        console.print(table_of(shown, asked.tolerance_pct))
    console.print(
        f"{len(grown)} of {len(found)} numbers grew by more than {asked.tolerance_pct:g} % or are gone.", soft_wrap=True
    )
    return EXIT_GREW if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
