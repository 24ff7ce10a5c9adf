"""What a table does not say by itself, in sentences that are computed from the records and nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from wan_sweep.report.sheet import (
    PEAK_ALLOCATED,
    TOTAL_SECONDS,
    Row,
    Sheet,
    difference_pct,
    job_list,
)
from wan_sweep.units import format_bytes, format_seconds

# Components that a phase computes with; what else lies on the device then is idle.
_AT_WORK = {
    "load": frozenset({"t5", "clip", "dit", "vae"}),
    "encode_text": frozenset({"t5"}),
    "encode_image": frozenset({"clip", "vae"}),
    "denoise": frozenset({"dit"}),
    "decode": frozenset({"vae"}),
    "save": frozenset[str](),
}
# Closer than this, two results are named together: memory repeats exactly, time does not.
_MEMORY_TIE_PCT = 0.5
_TIME_TIE_PCT = 2.0
_NO_CHANGE_PCT = 0.05


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one knob does while all other knobs that differ stay the same.

    Args:
        knob: the swept knob.
        value: what it is set to.
        instead_of: what it is compared with.
        peak_pct: change of peak allocated memory in percent, one number per pair of jobs.
        step_pct: change of the seconds per step in percent, one number per pair of jobs.
        phase_pct: change of the peak of each phase in percent, one number per pair of jobs, where there is any.
    """

    knob: str
    value: str
    instead_of: str
    peak_pct: tuple[float, ...]
    step_pct: tuple[float, ...]
    phase_pct: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def sentence(self) -> str:
        """Return it in words."""
        pairs = max(len(self.peak_pct), len(self.step_pct))
        counted = "1 pair" if pairs == 1 else f"{pairs} pairs"
        peak = _range(self.peak_pct)
        if peak == "unchanged" and self.phase_pct:  # another phase hides what the knob does
            peak += f" ({', '.join(f'in {phase} {_range(changes)}' for phase, changes in self.phase_pct.items())})"
        return (
            f"{self.knob}={self.value} instead of {self.instead_of}: peak {peak}, "
            f"step {_range(self.step_pct)} ({counted} of jobs that differ in nothing else)."
        )


def headline(sheet: Sheet) -> list[str]:
    """Return which job is the reference, and which ones are best by memory and by time."""
    reference, measured = sheet.reference, sheet.measured
    if reference is None:
        return ["No job was measured, so there is nothing to compare."]
    if len(measured) == 1:
        return [f"One job was measured: {job_list([reference])}."]
    lines = [f"* Reference for the differences: {job_list([reference])}, the first that was measured."]
    least = _best(measured, PEAK_ALLOCATED, _MEMORY_TIE_PCT)
    if least:
        peak = f"peak {_bytes(least[0], PEAK_ALLOCATED)} allocated"
        lines.append(f"Least memory: {job_list(least[:1])}, {peak}{_ties(least[1:], _MEMORY_TIE_PCT)}.")
    shortest = _best(measured, TOTAL_SECONDS, _TIME_TIE_PCT)
    if shortest:
        total = f"{_seconds(shortest[0], TOTAL_SECONDS)} in total"
        lines.append(f"Shortest: {job_list(shortest[:1])}, {total}{_ties(shortest[1:], _TIME_TIE_PCT)}.")
    fastest = _best(measured, sheet.step_metric, _TIME_TIE_PCT)
    if fastest and fastest != shortest:
        step = f"{_seconds(fastest[0], sheet.step_metric)} a step"
        lines.append(f"Fastest step: {job_list(fastest[:1])}, {step}{_ties(fastest[1:], _TIME_TIE_PCT)}.")
    return lines


def bottleneck(row: Row) -> str | None:
    """Return what fills the device at a configuration's peak; None where it was not measured."""
    peak, phase = row.value(PEAK_ALLOCATED), row.peak_phase
    if peak is None or phase is None:
        return None
    weights = row.weights_at_peak()
    idle = {part: value for part, value in weights.items() if part not in _AT_WORK.get(phase, frozenset())}
    parts = ", ".join(
        f"{part} {format_bytes(value)}{' idle' if part in idle else ''}" for part, value in weights.items()
    )
    rest = peak - sum(weights.values())
    weights_text = f"{format_bytes(sum(weights.values()))} weights ({parts}) + " if weights else ""
    return f"peak {format_bytes(peak)} in {phase}: {weights_text}{format_bytes(rest)} activations."


def bottlenecks(sheet: Sheet) -> list[str]:
    """Return a sentence for each measured configuration."""
    return [f"{_name(row)}: {sentence}" for row in sheet.rows if (sentence := bottleneck(row))]


def effects(sheet: Sheet) -> list[Effect]:
    """Return what each swept knob changes, found in pairs of configurations that differ in that knob alone."""
    reference = sheet.reference
    if reference is None:
        return []
    found = []
    for knob in sheet.axes:
        base = reference.axes.get(knob)
        others = dict.fromkeys(row.axes[knob] for row in sheet.measured if knob in row.axes)
        found += [
            effect
            for value in others
            if base is not None and value != base and (effect := _effect(sheet, knob, value, base)).peak_pct
        ]
    return found


def unmeasured(sheet: Sheet) -> list[str]:
    """Return outcome and reason of each job without numbers of its own, and of those that took over older ones."""
    lines = []
    for row in sheet.rows:
        for record in row.records:
            if record.outcome == "ok":
                continue
            reason = record.reason.strip() or "no reason was recorded"
            run = f", run {record.repeat + 1}" if len(row.records) > 1 else ""
            lines.append(f"{_name(row)}{run}: {record.outcome}: {_one_line(reason)}{_filled_by(record.failure)}")
    return lines + [f"A record cannot be read: {damage}" for damage in sheet.damaged]


def warnings(sheet: Sheet) -> list[str]:
    """Return the warnings of the measurements with their advice, equal ones once."""
    jobs: dict[str, list[Row]] = {}
    for row in sheet.rows:
        for record in row.records:
            for warning in record.warnings:
                advice = f" {warning['advice'].strip()}" if warning.get("advice") else ""
                rows = jobs.setdefault(f"{_sentence(warning['text'])}{advice and ' ' + _sentence(advice)}", [])
                if row not in rows:
                    rows.append(row)
    return [f"{_capital(job_list(rows))}: {words}" for words, rows in jobs.items()]


def idle_knobs(sheet: Sheet) -> list[str]:
    """Return the knobs that were set and did nothing, with the reason, equal ones once."""
    jobs: dict[tuple[str, str], list[Row]] = {}
    for row in sheet.rows:
        for record in row.records:
            for knob, reason in record.idle_knobs.items():
                rows = jobs.setdefault((knob, reason), [])
                if row not in rows:
                    rows.append(row)
    return [f"{knob} changed nothing in {job_list(rows)}, because {reason}." for (knob, reason), rows in jobs.items()]


def _effect(sheet: Sheet, knob: str, value: str, base: str) -> Effect:
    def rest(row: Row) -> Mapping[str, str]:
        return {name: text for name, text in row.axes.items() if name != knob}

    pairs = [
        (row, other)
        for row, other in product(sheet.measured, repeat=2)
        if row.axes.get(knob) == value and other.axes.get(knob) == base and rest(row) == rest(other)
    ]

    def changes(metric: str) -> Iterator[float]:
        for row, other in pairs:
            change = difference_pct(row.value(metric), other.value(metric))
            if change is not None:
                yield change

    peak, step = tuple(changes(PEAK_ALLOCATED)), tuple(changes(sheet.step_metric))
    phases = {phase: tuple(changes(f"memory/peak/{phase}/allocated_bytes")) for phase in _AT_WORK}
    changed = {phase: values for phase, values in phases.items() if _range(values) not in {"unknown", "unchanged"}}
    return Effect(knob=knob, value=value, instead_of=base, peak_pct=peak, step_pct=step, phase_pct=changed)


def _best(rows: list[Row], metric: str, tie_pct: float) -> list[Row]:
    """Return the row with the smallest value first, then those that are as good as it."""
    with_value = [(value, row) for row in rows if (value := row.value(metric)) is not None]
    if not with_value:
        return []
    smallest, best = min(with_value, key=lambda pair: pair[0])
    ties = [row for value, row in with_value if row is not best and value <= smallest * (1 + tie_pct / 100)]
    return [best, *ties]


def _ties(rows: list[Row], tie_pct: float) -> str:
    if not rows:
        return ""
    numbers = job_list(rows) if len(rows) > 1 else f"job {rows[0].number}"
    return f"; {numbers} {'are' if len(rows) > 1 else 'is'} within {tie_pct:g} %"


def _range(changes: tuple[float, ...]) -> str:
    if not changes:
        return "unknown"
    if max(map(abs, changes)) < _NO_CHANGE_PCT:
        return "unchanged"
    low, high = f"{min(changes):+.1f}", f"{max(changes):+.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _filled_by(failure: Mapping[str, object] | None) -> str:
    """Return which weights lay on the device when a job failed, as far as it told."""
    residents = (failure or {}).get("resident_components_bytes")
    if not isinstance(residents, dict) or not residents:
        return ""
    parts = ", ".join(f"{part} {format_bytes(value)}" for part, value in residents.items())
    return f" (weights on the device then: {parts})"


def _name(row: Row) -> str:
    return _capital(job_list([row]))


def _bytes(row: Row, metric: str) -> str:
    return format_bytes(row.value(metric) or 0)


def _seconds(row: Row, metric: str) -> str:
    return format_seconds(row.value(metric) or 0)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _sentence(words: str) -> str:
    found = _one_line(words)
    return found if found.endswith((".", "!", "?")) else f"{found}."


def _one_line(words: str) -> str:
    return " ".join(words.split())
