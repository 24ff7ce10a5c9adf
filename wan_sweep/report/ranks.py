"""Several ranks side by side, each with its own numbers: a sum or a mean would hide the fullest and the slowest."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from wan_sweep.headline import PEAK_RANK, SLOWEST_RANK
from wan_sweep.record import Record
from wan_sweep.report.sheet import (
    COMPONENTS,
    FIRST_STEP_SECONDS,
    PEAK_ALLOCATED,
    PEAK_RESERVED,
    PHASES,
    STEP_SECONDS,
    TOTAL_SECONDS,
    Row,
    Sheet,
    job_list,
    phase_peak,
)
from wan_sweep.store import rank_folder
from wan_sweep.units import format_bytes, format_seconds

TITLE = "Ranks"

_NOTHING = "-"
_EXCHANGED_BYTES = "collectives/given_per_step_bytes"
_EXCHANGED_SECONDS = "collectives/per_step_s"
_EXPOSED_SECONDS = "collectives/exposed_per_step_s"


def several_ranks(row: Row) -> Record | None:
    """Return the first record of a configuration that was measured on several ranks."""
    return next((record for record in row.measured if len(record.ranks) > 1), None)


def fullest_rank(record: Record) -> int:
    """Return the rank with the highest peak of allocated memory; the first where there is one."""
    return int(record.metrics.get(PEAK_RANK, 0))


def rank_file(rank: int, name: str) -> str:
    """Return the name of a rank's file, as seen from the folder of its job."""
    return (rank_folder(Path(), rank) / name).as_posix()


def rank_lines(sheet: Sheet) -> list[str]:
    """Return a sentence per configuration that ran on several ranks."""
    return [_sentence(row, record) for row in sheet.rows if (record := several_ranks(row))]


def _sentence(row: Row, record: Record) -> str:
    name = job_list([row])
    fullest, slowest = fullest_rank(record), int(record.metrics.get(SLOWEST_RANK, 0))
    peaks = _each(record, PEAK_ALLOCATED, format_bytes)
    words = [f"{name[:1].upper()}{name[1:]}: peak {peaks}, the highest on rank {fullest}"]
    steps = _each(record, STEP_SECONDS, format_seconds) or _each(record, FIRST_STEP_SECONDS, format_seconds)
    if steps:
        words.append(f"a step {steps}")
    if total := _each(record, TOTAL_SECONDS, format_seconds):  # estimates have none
        words.append(f"in total {total}, the longest on rank {slowest}")
    if exchanged := _each(record, _EXCHANGED_SECONDS, format_seconds):
        given = _each(record, _EXCHANGED_BYTES, format_bytes)
        words.append(f"in collectives {exchanged} of a step{f' for {given} given' if given else ''}")
    return f"{'; '.join(words)} (ranks in order)."


def _each(record: Record, metric: str, show: Callable[[float], str]) -> str:
    """Return a metric on each rank, in order; nothing where no rank has it."""
    values = [rank["metrics"].get(metric) for rank in record.ranks]
    if all(value is None for value in values):
        return ""
    shown = [_NOTHING if value is None else show(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


HEADS: Mapping[str, str] = {
    "rank": "number",
    "weights": "number",
    "peak": "number",
    "peak in": "",
    "reserved": "number",
    "step": "number",
    "total": "number",
    "in collectives a step": "number",
    "of it alone": "number",
    "given a step": "number",
}


def rank_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """Yield a row of texts per rank, for a table with `HEADS`."""
    for rank in record.ranks:
        numbers: Mapping[str, float] = rank["metrics"]
        peaks = {phase: numbers[phase_peak(phase)] for phase in PHASES if phase_peak(phase) in numbers}
        weights = sum(numbers.get(f"memory/base/{part}_bytes", 0) for part in COMPONENTS)
        yield (
            str(rank["rank"]),
            format_bytes(weights) if weights else _NOTHING,
            _shown(numbers, PEAK_ALLOCATED, format_bytes),
            max(peaks, key=lambda phase: peaks[phase], default=_NOTHING),
            _shown(numbers, PEAK_RESERVED, format_bytes),
            _shown(numbers, STEP_SECONDS if STEP_SECONDS in numbers else FIRST_STEP_SECONDS, format_seconds),
            _shown(numbers, TOTAL_SECONDS, format_seconds),
            _shown(numbers, _EXCHANGED_SECONDS, format_seconds),
            _shown(numbers, _EXPOSED_SECONDS, format_seconds),
            _shown(numbers, _EXCHANGED_BYTES, format_bytes),
        )


def _shown(numbers: Mapping[str, float], metric: str, show: Callable[[float], str]) -> str:
    return show(numbers[metric]) if metric in numbers else _NOTHING
