"""timelines.png: the memory of all jobs over time, in one plot where that can be read, else in small ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_sweep.report.canvas import (
    INK,
    clean_value_axis,
    entitle,
    in_unit,
    line_style,
    name_lines,
    picture,
    wrapped,
)
from wan_sweep.report.sheet import Row, Sheet, shortened
from wan_sweep.report.timeline import Timeline
from wan_sweep.report.timeline_picture import legend_handles, paint
from wan_sweep.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Timelines = Sequence[tuple[Row, Timeline]]

_MOST_OVERLAID = 6
_MOST_APART = 3.0
_COLUMNS = 4
_LABEL_CHARACTERS = 33


def draw_timelines(sheet: Sheet, timelines: Timelines, path: Path) -> str:
    """Draw the highest allocated memory of each configuration over time; returns the title."""
    seconds = [timeline.seconds for _, timeline in timelines]
    fits_in_one = len(timelines) <= _MOST_OVERLAID and max(seconds) <= _MOST_APART * min(seconds)
    title = _title(timelines)
    if fits_in_one:
        _draw_in_one(sheet, timelines, path, title)
    else:
        _draw_small(sheet, timelines, path, title)
    return title


def _draw_in_one(sheet: Sheet, timelines: Timelines, path: Path, title: str) -> None:
    unit = "GiB" if sheet.is_in_gib else "MiB"
    with picture(path, 9.6, 4.6) as figure:
        axes = figure.add_subplot()
        for index, (row, timeline) in enumerate(timelines):
            envelope = timeline.envelope()
            times = [time for start, end, _ in envelope for time in (start, end)]
            peaks = [in_unit(peak, is_in_gib=sheet.is_in_gib) for *_, peak in envelope for _ in range(2)]
            # Lines that coincide are drawn ever thinner on top of each other, so that each is seen.
            width = 1.5 + (len(timelines) - 1 - index) * 1.2
            colour, dashes = line_style(row.number)
            label = wrapped(f"{row.number}  {row.label}", _LABEL_CHARACTERS)
            axes.plot(times, peaks, color=colour, linestyle=dashes, linewidth=width, label=label)
            peak = timeline.peak
            top = in_unit(peak.num_bytes, is_in_gib=sheet.is_in_gib)
            axes.plot((peak.start + peak.end) / 2, top, "o", markersize=width + 3, color=colour)
        clean_value_axis(axes, "y")
        axes.set_ylim(top=axes.dataLim.y1 * 1.1 or 1.0)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"time since the start of each job's first phase {timelines[0][1].clock}")
        axes.set_ylabel(f"highest allocated [{unit}]")
        entitle(figure, title)
        name_lines(figure, axes.lines[::2])


def _draw_small(sheet: Sheet, timelines: Timelines, path: Path, title: str) -> None:
    """Draw a small plot per configuration, all with one axis of memory, and of time unless that would hide some."""
    unit = "GiB" if sheet.is_in_gib else "MiB"
    columns = min(_COLUMNS, len(timelines))
    lines = -(-len(timelines) // columns)
    seconds = [timeline.seconds for _, timeline in timelines]
    has_one_clock = max(seconds) <= _MOST_APART * min(seconds)
    with picture(path, 2.75 * columns + 0.6, 2.25 * lines + 1.2) as figure:
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        places: list[Axes] = list(grid.flat)
        for axes, (row, timeline) in zip(places, timelines, strict=False):
            paint(axes, timeline, is_in_gib=sheet.is_in_gib)
            _entitle_small(axes, row, timeline)
            if has_one_clock:
                axes.set_xlim(right=max(seconds))
            peak = timeline.peak
            height = in_unit(peak.num_bytes, is_in_gib=sheet.is_in_gib)
            middle = (peak.start + peak.end) / 2
            axes.plot(middle, height, "o", markersize=4.5, markerfacecolor="white", markeredgecolor=INK, zorder=6)
        top = max(max(*timeline.peaks, *timeline.reserved) for _, timeline in timelines)
        places[0].set_ylim(0, in_unit(top, is_in_gib=sheet.is_in_gib) * 1.08 or 1.0)
        for axes in places[len(timelines) :]:
            axes.set_visible(False)
        clock = f"time since the start of the job's first phase {timelines[0][1].clock}" + (
            "" if has_one_clock else ", each with its own scale"
        )
        figure.supylabel(f"device memory [{unit}]", fontsize=9.5)
        entitle(figure, title, f"Across: {clock}.")
        handles = legend_handles([timeline for _, timeline in timelines])
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8.8, columnspacing=1.3)


def _entitle_small(axes: "Axes", row: Row, timeline: Timeline) -> None:
    words = f"{format_bytes(timeline.peak.num_bytes)} in {timeline.peak.phase or 'no phase'}, "
    words += format_seconds(timeline.seconds)
    name = wrapped(shortened(f"{row.number}  {row.label}", 3 * _LABEL_CHARACTERS), _LABEL_CHARACTERS)
    axes.set_title(name, loc="left", fontsize=8.4, fontweight="bold", pad=14)
    axes.text(0, 1.03, words, transform=axes.transAxes, fontsize=8.2, color="#555555", va="bottom")
    axes.tick_params(labelsize=8.2)
    axes.locator_params(axis="x", nbins=4)


def _title(timelines: Timelines) -> str:
    if len(timelines) == 1:
        return f"Memory over time of job {timelines[0][0].number}"
    by_phase: dict[str, list[int]] = {}
    for row, timeline in timelines:
        by_phase.setdefault(timeline.peak.phase or "no phase", []).append(row.number)
    if len(by_phase) == 1:
        return f"Memory over time: all peaks are in {next(iter(by_phase))}"
    counts = sorted(by_phase.items(), key=lambda pair: -len(pair[1]))
    return f"Memory over time: the peak is in {', '.join(f'{phase} in {_jobs(rows)}' for phase, rows in counts)}"


def _jobs(numbers: Sequence[int]) -> str:
    return f"job {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} jobs"
