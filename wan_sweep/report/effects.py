"""What each swept knob changes, found in pairs of configurations that differ in that knob alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from wan_sweep.report.change import Change, change_of
from wan_sweep.report.sheet import PEAK_ALLOCATED, PHASES, Row, Sheet, difference_pct, phase_peak, shortened
from wan_sweep.report.workloads import WORKLOAD
from wan_sweep.schema import Scalar

_NO_CHANGE_PCT = 0.05


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one knob does while all other knobs that differ stay the same.

    Args:
        knob: the swept knob.
        value: what it is set to.
        instead_of: what it is compared with.
        pairs: the configurations with the one value and with the other.
        peak_pct: change of peak allocated memory in percent, one number per pair.
        steps: change of the seconds per step, one per pair.
        phase_pct: change of the peak of each phase in percent, one number per pair, where there is any.
        is_same_memory: whether the peak of every phase is the same to the byte in all pairs and repeats.
    """

    knob: str
    value: str
    instead_of: str
    pairs: tuple[tuple[Row, Row], ...]
    peak_pct: tuple[float, ...]
    steps: tuple[Change, ...]
    phase_pct: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    is_same_memory: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether nothing that was measured tells the two values apart."""
        return self.is_same_memory and bool(self.steps) and not any(step.is_clear for step in self.steps)

    def sentence(self) -> str:
        """Return it in words."""
        what = f"{self.knob}={shortened(self.value)} instead of {shortened(self.instead_of)}"
        if self.is_nothing:
            return (
                f"{what} changed nothing measurable in memory and time: the peak of every phase is the same to the "
                f"byte, {self._step_words()} ({self._pairs()})."
            )
        peak = _range(self.peak_pct)
        if peak == "unchanged" and self.phase_pct:  # another phase hides what the knob does
            peak += f" ({', '.join(f'in {phase} {_range(changes)}' for phase, changes in self.phase_pct.items())})"
        return f"{what}: peak {peak}, {self._step_words()} ({self._pairs()})."

    def _pairs(self) -> str:
        counted = "1 pair" if len(self.pairs) == 1 else f"{len(self.pairs)} pairs"
        return f"{counted} of jobs that differ in nothing else"

    def _step_words(self) -> str:
        """Return what became of the time of a step: how much, over which spread, and whether that says anything."""
        if not self.steps:
            return "step unknown"
        middle = _range([step.pct for step in self.steps])
        low, high = min(step.low for step in self.steps), max(step.high for step in self.steps)
        spread = (
            f"{low:+.1f} to {high:+.1f} % over repeats" if any(step.low != step.high for step in self.steps) else ""
        )
        num_clear = sum(step.is_clear for step in self.steps)
        if num_clear == 0:
            noise = " or ".join(dict.fromkeys(step.noise for step in self.steps))
            seen = ", ".join(words for words in (middle if middle != "unchanged" else "", spread) if words)
            return f"step the same within {noise}" + (f" ({seen})" if seen else "")
        words = f"step {middle}" + (f" ({spread})" if spread else "")
        num_slower = sum(step.is_clear and step.pct > 0 for step in self.steps)
        if 0 < num_slower < num_clear:
            return f"{words}, slower in {num_slower} and faster in {num_clear - num_slower} of {len(self.steps)} pairs"
        is_mixed = num_clear < len(self.steps)
        return f"{words}, more than noise in {num_clear} of {len(self.steps)} pairs" if is_mixed else words


def effects(sheet: Sheet) -> list[Effect]:
    """Return the effect of each value of each swept knob, compared with the reference's value."""
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


def _effect(sheet: Sheet, knob: str, value: str, base: str) -> Effect:
    def rest(row: Row) -> Mapping[str, Scalar]:
        """Everything else that was swept, and what follows from the knob by default, such as a model's size."""
        workload = {name: row.knobs.get(name) for name in WORKLOAD}
        return {name: value for name, value in (workload | dict(row.axes)).items() if name != knob}

    pairs = tuple(
        (row, other)
        for row, other in product(sheet.measured, repeat=2)
        if row.axes.get(knob) == value and other.axes.get(knob) == base and rest(row) == rest(other)
    )
    phases = {phase: _differences(phase_peak(phase), pairs) for phase in PHASES}
    steps = (change_of(sheet.step_metric, row, other) for row, other in pairs)
    return Effect(
        knob=knob,
        value=value,
        instead_of=base,
        pairs=pairs,
        peak_pct=_differences(PEAK_ALLOCATED, pairs),
        steps=tuple(step for step in steps if step),
        phase_pct={phase: values for phase, values in phases.items() if _range(values) not in {"unknown", "unchanged"}},
        is_same_memory=all(_has_same_memory(row, other) for row, other in pairs),
    )


def _differences(metric: str, pairs: Sequence[tuple[Row, Row]]) -> tuple[float, ...]:
    found = (difference_pct(row.value(metric), other.value(metric)) for row, other in pairs)
    return tuple(pct for pct in found if pct is not None)


def _has_same_memory(row: Row, other: Row) -> bool:
    """Return whether both have the same phases, each with one and the same peak in all repeats of both."""
    for phase in PHASES:
        metric = phase_peak(phase)
        peaks = {record.metrics.get(metric) for record in (*row.measured, *other.measured)}
        if len(peaks) > 1:
            return False
    return bool(row.phase_peaks)


def _range(changes: Sequence[float]) -> str:
    if not changes:
        return "unknown"
    if max(map(abs, changes)) < _NO_CHANGE_PCT:
        return "unchanged"
    low, high = f"{min(changes):+.1f}", f"{max(changes):+.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
