"""What fills the device at a configuration's peak, what would be next, and what was seen to lower it: one sentence."""

from typing import NamedTuple

from wan_sweep.report.attribution import Item, Peak
from wan_sweep.report.change import Change, change_of
from wan_sweep.report.sheet import (
    ACTIVATIONS,
    LIBRARIES,
    PEAK_ALLOCATED,
    TOTAL_SECONDS,
    Row,
    Sheet,
    difference_pct,
)
from wan_sweep.report.workloads import WORKLOAD
from wan_sweep.schema import KNOBS, text
from wan_sweep.units import format_bytes

# Components that a phase computes with; what else lies on the device then is not needed there.
AT_WORK = {
    "extend_prompt": frozenset({"qwen"}),
    "load": frozenset({"t5", "clip", "dit", "vae"}),
    "encode_text": frozenset({"t5"}),
    "encode_image": frozenset({"clip", "vae"}),
    "denoise": frozenset({"dit"}),
    "decode": frozenset({"vae"}),
    "save": frozenset[str](),
}
# What is asked for rather than how it is done: another video is no way to save memory.
_ASKED_FOR = frozenset(
    {
        *WORKLOAD,
        "ckpt_dir",
        "weights_seed",
        "mode",
        "device",
        "memory_limit_gib",
        "prompt",
        "last_frame",
        "vace_context_scale",
        "upstream_quirks",
        "prompt_extend_target_lang",
        "base_seed",
        "sample_solver",
        "sample_shift",
    }
)

_MOST_ITEMS = 2
_LEAST_SHARE = 0.05
_LOWER_PCT = 1.0
_SAME_PEAK_PCT = 0.5


class Remedy(NamedTuple):
    """A measured configuration that differs in one knob and has a lower peak."""

    row: Row
    knob: str
    peak_pct: float
    time: Change | None


def bottlenecks(sheet: Sheet) -> list[str]:
    """Return a sentence for each measured configuration."""
    return [
        f"Job {row.number} ({row.label}): {sentence}." for row in sheet.rows if (sentence := bottleneck(row, sheet))
    ]


def bottleneck(row: Row, sheet: Sheet) -> str | None:
    """Return the sentence of a configuration, without its end; None where it was not measured."""
    peak, phase = row.value(PEAK_ALLOCATED), row.peak_phase
    if peak is None or phase is None:
        return None
    found = [f"peak {format_bytes(peak)} in {phase}: {', '.join(_contents(row, phase, peak))}"]
    others = {name: value for name, value in row.phase_peaks.items() if name != phase}
    if others:
        second = max(others, key=lambda name: others[name])
        found.append(f"next highest: {second} at {format_bytes(others[second])}")
    best = remedy(row, sheet)
    if best:
        lowered = format_bytes(best.row.value(PEAK_ALLOCATED) or 0)
        found.append(
            f"{best.knob}={text(best.row.records[0].knobs[best.knob])} (job {best.row.number}) lowers the peak to "
            f"{lowered} ({best.peak_pct:+.0f} %){_at_what_cost(best.time)}"
        )
    return "; ".join(found)


def remedy(row: Row, sheet: Sheet) -> Remedy | None:
    """Return the configuration with the lowest peak among those that differ from a row in one knob and have less."""
    found = []
    for other in sheet.measured:
        differing = [knob for knob in sorted(row.knobs.keys() | other.knobs.keys()) if _differs(knob, row, other)]
        pct = difference_pct(other.value(PEAK_ALLOCATED), row.value(PEAK_ALLOCATED))
        if len(differing) == 1 and differing[0] not in _ASKED_FOR and pct is not None and pct <= -_LOWER_PCT:
            found.append(Remedy(other, differing[0], pct, change_of(TOTAL_SECONDS, other, row)))
    return min(found, key=lambda one: (one.peak_pct, one.time.pct if one.time else 0.0), default=None)


def idle_at_peak(row: Row) -> dict[str, float]:
    """Return the weights that lie on the device in the peak phase and take no part in it, in bytes."""
    at_work = AT_WORK.get(row.peak_phase or "", frozenset())
    return {part: value for part, value in row.weights_at_peak().items() if part not in at_work}


def _differs(knob: str, row: Row, other: Row) -> bool:
    """Return whether two configurations differ in a knob that their results depend on."""
    counts = knob not in KNOBS or KNOBS[knob].rule.in_key
    return counts and row.knobs.get(knob) != other.knobs.get(knob)


def _at_what_cost(time: Change | None) -> str:
    if time is None:
        return ""
    spread = f" ({time.low:+.1f} to {time.high:+.1f} % over repeats)" if time.low != time.high else ""
    if time.is_clear:
        return f" in {abs(time.pct):.1f} % {'more' if time.pct > 0 else 'less'} time{spread}"
    return f" in the same time within {time.noise} ({time.pct:+.1f} %)"


def _contents(row: Row, phase: str, peak: float) -> list[str]:
    """Return the parts of the peak in words: weights at work, idle ones, libraries, activations by name if known."""
    attributed = row.attribution.of_phase(phase) if row.attribution else None
    if attributed and abs(difference_pct(attributed.allocated_bytes, peak) or 0.0) > _SAME_PEAK_PCT:
        attributed = None  # the shorter pass did not meet this peak, so its names are not those of this one
    parts = row.parts_at_peak()
    idle = idle_at_peak(row)
    weights = {part: value for part, value in parts.items() if part not in {LIBRARIES, ACTIVATIONS}}
    found = [f"{format_bytes(value)} {part} weights" for part, value in weights.items() if part not in idle]
    if len(idle) == 1:
        found += [f"{format_bytes(value)} {part} weights not needed in this phase" for part, value in idle.items()]
    elif idle:
        listed = ", ".join(f"{part} {format_bytes(value)}" for part, value in idle.items())
        found.append(f"{format_bytes(sum(idle.values()))} weights not needed in this phase ({listed})")
    libraries, rest = parts.get(LIBRARIES, 0.0), parts[ACTIVATIONS]
    found += _activations(rest, attributed, peak)
    return found + ([f"{format_bytes(libraries)} libraries"] if libraries else [])


def oom_contents(peak: Peak) -> str:
    """Return what lay on the device when a request failed, in words."""
    step = "" if peak.step is None else f", step {peak.step + 1}"
    place = f"{peak.phase or 'no phase'}{step}{f', {peak.place}' if peak.place else ''}{_in_brackets(peak.operation)}"
    asked = f"{format_bytes(peak.request_bytes)} asked for in" if peak.request_bytes else "in"
    weights = [f"{format_bytes(value)} {part} weights" for part, value in peak.weights.items() if value]
    parts = ", ".join(weights + _activations(peak.activation_bytes, peak, peak.allocated_bytes))
    note = f" ({peak.note.rstrip('.')})" if peak.note else ""
    return f"{asked} {place} with {format_bytes(peak.allocated_bytes)} allocated: {parts}{note}"


def _activations(num_bytes: float, attributed: Peak | None, whole: float) -> list[str]:
    """Return activations in words: the few largest by name where names are known, the first always, then the rest.

    What was made before the first phase are the libraries' workspaces, which are named by themselves.
    """
    live = attributed.live if attributed else ()
    items = [item for item in live if item.kind in {"activation", "workspace"} and item.phase][:_MOST_ITEMS]
    named = [item for item in items if item is items[0] or item.num_bytes > _LEAST_SHARE * whole]
    rest = num_bytes - sum(item.num_bytes for item in named)
    found = [_item_words(item) for item in named]
    return found + ([f"{format_bytes(rest)} {'other ' if named else ''}activations"] if rest > 0 else [])


def _item_words(item: Item) -> str:
    what = "workspace " if item.kind == "workspace" else ""
    return f"{format_bytes(item.num_bytes)} {what}in {item.place}{_in_brackets(item.origin)}"


def _in_brackets(words: str) -> str:
    return f" ({words})" if words else ""
