"""The section of report.html on one configuration: timeline, phases, what filled the device, how to run it again."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from wan_sweep.report.attribution import Item, Peak
from wan_sweep.report.bottleneck import bottleneck
from wan_sweep.report.fidelity import row_words
from wan_sweep.report.findings import record_warnings, unmeasured_row
from wan_sweep.report.markup import bullets, definitions, element, image, paragraph, plain_table
from wan_sweep.report.ranks import HEADS, rank_file, rank_rows, several_ranks
from wan_sweep.report.reproduce import command_of
from wan_sweep.report.sheet import COMPONENTS, PEAK_ALLOCATED, PHASES, TOTAL_SECONDS, Row, Sheet, phase_peak
from wan_sweep.schema import text
from wan_sweep.store import TIMELINE_FILE
from wan_sweep.units import format_bytes, format_seconds

_MOST_ITEMS = 25
_NOTHING = "-"


def job_section(row: Row, sheet: Sheet) -> str:
    """Return the section, closed until it is opened."""
    return element("details", element("summary", *_summary(row)), *_body(row, sheet), id=f"job-{row.number}")


def _summary(row: Row) -> Iterator[str]:
    yield escape(f"Job {row.number}: {row.label} ")
    yield element("span", escape(row.outcome), class_=row.outcome.partition(",")[0])
    peak, seconds = row.value(PEAK_ALLOCATED), row.value(TOTAL_SECONDS)
    words = [
        f"peak {format_bytes(peak)}{f' in {row.peak_phase}' if row.peak_phase else ''}" if peak else "",
        format_seconds(seconds) if seconds else "",
    ]
    told = ", ".join(word for word in words if word)
    yield element("span", escape(f" {told}"), class_="aside") if told else ""


def _body(row: Row, sheet: Sheet) -> Iterator[str]:
    yield bullets([words.lstrip(":, ") for words in unmeasured_row(row)])
    sentence = bottleneck(row, sheet)
    if sentence:
        yield paragraph(f"{sentence[:1].upper()}{sentence[1:]}.")
    record = several_ranks(row)
    for rank in range(len(record.ranks) if record else 1):
        timeline = row.find(rank_file(rank, TIMELINE_FILE))
        if timeline:
            yield image(timeline, f"Memory of job {row.number}{f', rank {rank},' if record else ''} over time")
    if record:
        yield element("h3", "Ranks")
        yield plain_table(HEADS, rank_rows(record))
    if row.phase_peaks:
        yield element("h3", "Phases")
        yield _phases(row)
    yield from _attribution(row)
    yield from _notes(row)
    yield element("h3", "Run it again")
    yield element("pre", escape(command_of(row.records[0])))
    knobs = definitions((name, text(value)) for name, value in row.records[0].knobs.items())
    yield element("details", element("summary", "All knobs"), knobs)


def _notes(row: Row) -> Iterator[str]:
    """Yield fidelity, warnings, knobs without effect, extra passes and where the files are."""
    fidelity = row_words(row)
    warnings = dict.fromkeys(words for record in row.records for words in record_warnings(record))
    idle = {knob: why for record in row.records for knob, why in record.idle_knobs.items()}
    if warnings:
        yield element("h3", "Warnings") + bullets(list(warnings))
    pairs = [("Fidelity", fidelity)] if fidelity else []
    pairs += _extension_words(row)
    pairs += [("Without effect", f"{knob}, because {why}") for knob, why in idle.items()]
    pairs += [
        (f"Pass: {name}", ", ".join(_pass_words(one))) for record in row.records for name, one in record.passes.items()
    ]
    pairs += [("Folder", record.name) for record in row.records]
    yield element("h3", "Notes") + definitions(pairs)


def _extension_words(row: Row) -> Iterator[tuple[str, str]]:
    """Yield what became of the prompt, where it was to be extended."""
    for told in filter(None, (record.prompt_extension for record in row.records)):
        by = f"{told['model']}, {told['method']}, {told['target_lang']}"
        if "problem" in told:
            yield "Prompt", f"{told['original']} (not extended by {by})"
        else:
            yield "Prompt", f"{told['prompt']} (extended by {by} from: {told['original']})"


def _pass_words(one: Mapping[str, Any]) -> Iterator[str]:
    yield str(one["outcome"])
    if one.get("reason"):
        yield str(one["reason"])
    if one.get("seconds") is not None:
        yield format_seconds(one["seconds"])
    if one.get("peak_difference_bytes") is not None:
        yield f"its peak and the measured one are {format_bytes(abs(one['peak_difference_bytes']))} apart"
    if one.get("files"):
        yield ", ".join(map(str, one["files"]))
    if one.get("bytes"):
        yield format_bytes(one["bytes"])


def _phases(row: Row) -> str:
    heads = {"phase": "", "time": "number", "peak": "number", "reserved": "number", "activations": "number"}
    lines = []
    for phase in PHASES:
        seconds, peak = row.value(f"time/{phase}_s"), row.value(phase_peak(phase))
        if seconds is None and peak is None:
            continue
        weights = ((part, row.value(f"memory/resident/{phase}/{part}_bytes")) for part in COMPONENTS)
        lines.append(
            (
                phase,
                _NOTHING if seconds is None else format_seconds(seconds),
                *(
                    _bytes(row.value(metric))
                    for metric in (
                        phase_peak(phase),
                        f"memory/peak/{phase}/reserved_bytes",
                        f"memory/activation/{phase}_bytes",
                    )
                ),
                ", ".join(f"{part} {format_bytes(value)}" for part, value in weights if value) or _NOTHING,
            )
        )
    return plain_table({**heads, "weights on the device": ""}, lines)


def _bytes(value: float | None) -> str:
    return _NOTHING if value is None else format_bytes(value)


def _attribution(row: Row) -> Iterator[str]:
    """Yield what filled the device: where memory ran out, at the peak of the run, then of the other phases."""
    if row.attribution is None:
        return
    yield element("h3", "What filled the device")
    peaks = [peak for peak in (row.attribution.oom, *row.attribution.peaks) if peak]
    seen: set[str] = set()
    for peak in peaks:
        if peak.scope != "oom" and peak.phase in seen:
            continue
        seen.add(peak.phase)
        what = "Out of memory" if peak.scope == "oom" else "Peak"
        words = f"{what} in {peak.phase}: {format_bytes(peak.allocated_bytes)}"
        summary = element("summary", escape(words), element("span", escape(f" {_share(peak)} named"), class_="aside"))
        is_open = {"open": ""} if peak is peaks[0] else {}
        yield element("details", summary, *_peak(peak), **is_open)


def _peak(peak: Peak) -> Iterator[str]:
    """Yield what was allocating at a peak, and the table of what was there: weights by component, then by tensor."""
    step = "" if peak.step is None else f", step {peak.step + 1}"
    what = f"{peak.place or peak.phase or 'no phase'}{step}" + (f" ({peak.operation})" if peak.operation else "")
    request = f" {format_bytes(peak.request_bytes)} were asked for in vain." if peak.request_bytes else ""
    note = f" {peak.note}" if peak.note else ""
    yield paragraph(f"Allocating at that moment: {what}.{request}{note}")
    kinds = {
        "bytes": "number",
        "share": "number",
        "tensors": "number",
        "kind": "",
        "component": "",
        "module": "long",
        "made in": "",
        "operation": "",
        "shape": "",
        "dtype": "",
    }
    lines: list[tuple[int, tuple[str, ...]]] = [
        (size, ("", "weights", part, "what is on the device", "", "", "", "")) for part, size in peak.weights.items()
    ]
    lines += [(item.num_bytes, _item_cells(item)) for item in peak.live if item.kind != "weights"]
    shown = sorted(lines, key=lambda line: -line[0])[:_MOST_ITEMS]
    yield plain_table(
        kinds,
        (
            (format_bytes(size), f"{100 * size / peak.allocated_bytes:.1f} %", *(cell or _NOTHING for cell in cells))
            for size, cells in shown
        ),
    )
    rest = peak.allocated_bytes - sum(size for size, _ in shown)
    if rest > 0:
        yield paragraph(f"And {format_bytes(rest)} in smaller tensors; attribution.json lists more of them.")


def _item_cells(item: Item) -> tuple[str, ...]:
    return (
        str(item.count),
        item.kind,
        item.component,
        item.inside,
        item.phase + ("" if item.step is None else f", step {item.step + 1}"),
        item.operation,
        "" if item.shape is None else "x".join(map(str, item.shape)) or "scalar",
        item.dtype,
    )


def _share(peak: Peak) -> str:
    return f"{100 * peak.named_bytes / peak.allocated_bytes:.2f} %" if peak.allocated_bytes else _NOTHING
