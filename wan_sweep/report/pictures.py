"""The pictures of a sweep: peaks as stacked bars, memory against time, timelines, memory and time by step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wan_sweep.report.bars import Bar, bars_of
from wan_sweep.report.canvas import (
    FAINT,
    INK,
    PALETTE,
    PART_COLOURS,
    clean_value_axis,
    entitle,
    in_unit,
    line_style,
    name_lines,
    part_colour,
    picture,
    room_below,
    wrapped,
)
from wan_sweep.report.labels import Box, place
from wan_sweep.report.overlay import Timelines, draw_timelines
from wan_sweep.report.pareto import pareto_front
from wan_sweep.report.sheet import LIBRARIES, MODES, PEAK_ALLOCATED, TOTAL_SECONDS, Row, Sheet, difference_pct, job_list
from wan_sweep.report.workloads import by_workload
from wan_sweep.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_BAR_INCHES = 0.42
_LABEL_CHARACTERS = 38
_MARKER_POINTS = 8.0
_NAMED_IN_PLACE = 6
_PARTS_PER_LINE = 6
_LEVEL_PCT = 1.0


class Picture(NamedTuple):
    """A file beside the report, and what it shows."""

    name: str
    caption: str


def draw_all(sheet: Sheet, timelines: Timelines = ()) -> list[Picture]:
    """Draw what the records of one mode allow, and the timelines that there are."""
    suffix = "" if sheet.mode == MODES[0] else f"_{sheet.mode}"
    with_peak = [row for row in sheet.measured if row.value(PEAK_ALLOCATED)]
    drawn = []

    def draw(name: str, action: Callable[[Path], str]) -> None:
        path = sheet.folder / f"{name}{suffix}.png"
        drawn.append(Picture(path.name, action(path)))

    if with_peak:
        draw("peak_memory", lambda path: draw_peaks(sheet, path))
    if any(row.value(TOTAL_SECONDS) for row in with_peak):
        draw("memory_time", lambda path: draw_memory_time(sheet, path))
    if timelines:
        draw("timelines", lambda path: draw_timelines(sheet, timelines, path))
    if any(_series(row, "step/allocated_bytes") for row in sheet.measured):
        draw("steps", lambda path: draw_steps(sheet, path))
    return drawn


def draw_peaks(sheet: Sheet, path: Path) -> str:
    """Draw a bar per configuration: weights by component, activations, and what was reserved as an outline."""
    bars = bars_of(sheet)
    unit, title = _unit(sheet), _peaks_title(sheet)
    labels = [wrapped(bar.label, _LABEL_CHARACTERS) for bar in bars]
    spacing = 1.0 if max(label.count("\n") for label in labels) < 2 else 1.35
    with picture(path, 9.0, 1.75 + _BAR_INCHES * spacing * len(bars)) as figure:
        axes = figure.add_subplot()
        largest = max(in_unit(max(bar.height, bar.reserved), is_in_gib=sheet.is_in_gib) for bar in bars)
        for place_of_bar, bar in enumerate(bars):
            _draw_bar(axes, place_of_bar, bar, largest, is_in_gib=sheet.is_in_gib)
        axes.set_yticks(range(len(bars)), labels, fontsize=8.8 if any("\n" in label for label in labels) else None)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(right=largest * 1.2)
        clean_value_axis(axes, "x")
        axes.set_xlabel(f"peak of device memory, allocated / reserved [{unit}]")
        entitle(figure, title)
        _draw_bar_legend(axes, bars)
    return title


def draw_memory_time(sheet: Sheet, path: Path) -> str:
    """Draw peak memory against the time of the whole job, and of each workload those that nothing beats in both."""
    rows = [row for row in sheet.measured if row.value(TOTAL_SECONDS) and row.value(PEAK_ALLOCATED)]
    points = {
        row.number: (
            row.value(TOTAL_SECONDS) or 0.0,
            in_unit(row.value(PEAK_ALLOCATED) or 0, is_in_gib=sheet.is_in_gib),
        )
        for row in rows
    }
    workloads = by_workload(replace(sheet, rows=tuple(rows)))
    fronts = [
        [part.rows[index] for index in pareto_front([points[row.number] for row in part.rows])] for _, part in workloads
    ]
    title = _front_title(rows, fronts)
    names = [wrapped(f"{row.number}  {row.label}", _LABEL_CHARACTERS) for row in rows]
    is_named_in_place = len(rows) <= _NAMED_IN_PLACE
    from matplotlib.lines import Line2D

    with picture(path, 8.4 if is_named_in_place else 9.4, 5.4 + room_below(names)) as figure:
        axes = figure.add_subplot()
        for (name, part), front, colour in zip(workloads, fronts, cycle(PALETTE), strict=False):
            best = [points[row.number] for row in front]
            if workloads[1:]:
                _draw_front(axes, best, colour, name, marker="o")
            elif best[1:]:
                _draw_front(axes, best, FAINT, "Pareto front", marker="")
            for row in part.rows:
                _draw_point(axes, points[row.number], colour, is_best=row in front)
        if len(workloads) <= len(PALETTE) and axes.lines[len(rows) :]:  # of more workloads colours tell nothing
            axes.legend(loc="best")
        axes.set_xlim(*_time_range([x for x, _ in points.values()]))
        axes.set_ylim(bottom=0, top=max(y for _, y in points.values()) * 1.15)
        axes.grid(visible=True)
        axes.set_xlabel("time of the whole job [s]")
        axes.set_ylabel(f"peak of allocated device memory [{_unit(sheet)}]")
        entitle(figure, title)
        if not is_named_in_place:
            handles = [Line2D([], [], linestyle="none", label=name) for name in names]
            name_lines(figure, handles, handlelength=0, handletextpad=0)
        in_place = [f"{row.number}  {row.label}" if is_named_in_place else str(row.number) for row in rows]
        _name_points(figure, axes, list(points.values()), in_place)
    return title


def draw_steps(sheet: Sheet, path: Path) -> str:
    """Draw the peak of allocated memory, and the seconds where there are any, of each denoising step."""
    rows = [row for row in sheet.measured if _series(row, "step/allocated_bytes")]
    title = _steps_title(rows)
    names = [wrapped(f"{row.number}  {row.label}", _LABEL_CHARACTERS) for row in rows]
    is_timed = any(_series(row, "step/seconds") for row in rows)  # estimates are not: nothing runs
    with picture(path, 9.4, (6.0 if is_timed else 3.6) + room_below(names)) as figure:
        memory, *timed = figure.subplots(2 if is_timed else 1, 1, sharex=True, squeeze=False)[:, 0]
        handles: list[Line2D] = []
        for index, row in enumerate(rows):
            allocated = [in_unit(value, is_in_gib=sheet.is_in_gib) for value in _series(row, "step/allocated_bytes")]
            steps = range(1, len(allocated) + 1)
            # Lines that coincide are drawn ever thinner on top of each other, so that each is seen.
            width = 1.3 + (len(rows) - 1 - index) * min(1.6, 4.5 / len(rows))
            colour, dashes = line_style(row.number)
            style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": width + 2, "linewidth": width}
            handles += memory.plot(steps, allocated, label=names[index], **style)
            durations = _series(row, "step/seconds")
            for axes in timed:
                axes.plot(range(1, len(durations) + 1), durations, **style)
        for axes, label in zip((memory, *timed), (f"peak allocated [{_unit(sheet)}]", "duration [s]"), strict=False):
            clean_value_axis(axes, "y")
            if axes.dataLim.y1 > 0:
                axes.set_ylim(top=axes.dataLim.y1 * 1.1)
            axes.set_ylabel(label)
        lowest = (memory, *timed)[-1]
        lowest.set_xlabel("denoising step")
        lowest.xaxis.get_major_locator().set_params(integer=True)
        entitle(figure, title)
        name_lines(figure, handles, handlelength=3.2)
    return title


def _draw_bar(axes: "Axes", position: int, bar: Bar, largest: float, *, is_in_gib: bool) -> None:
    if bar.gap:
        axes.barh(position, largest, height=0.62, facecolor="none", edgecolor="#D0D0D0", hatch="///", linewidth=0)
        axes.text(
            largest * 0.5, position, bar.gap, ha="center", va="center", backgroundcolor="white", color=INK, fontsize=10
        )
        return
    start = 0.0
    for part, num_bytes in bar.parts:
        length = in_unit(num_bytes, is_in_gib=is_in_gib)
        axes.barh(position, length, left=start, height=0.62, color=part_colour(part), linewidth=0)
        start += length
    reserved = in_unit(bar.reserved, is_in_gib=is_in_gib)
    if reserved > start:
        axes.barh(position, reserved - start, left=start, height=0.62, facecolor="none", edgecolor=INK, linewidth=0.9)
    digits = 2 if is_in_gib else 1 if largest < 1000 else 0
    both = f"{start:.{digits}f} / {reserved:.{digits}f}" if reserved else f"{start:.{digits}f}"
    axes.text(max(start, reserved) + largest * 0.012, position, both, va="center", fontsize=10)


def _draw_bar_legend(axes: "Axes", bars: list[Bar]) -> None:
    from matplotlib.patches import Patch

    shown = {part for bar in bars for part, _ in bar.parts}
    handles = [
        Patch(color=colour, label=part if part in {"activations", LIBRARIES} else f"{part} weights")
        for part, colour in PART_COLOURS.items()
        if part in shown
    ]
    if any(bar.reserved > bar.height for bar in bars):
        handles.append(Patch(facecolor="none", edgecolor=INK, label="reserved, not allocated"))
    if any(bar.gap for bar in bars):
        handles.append(Patch(facecolor="none", edgecolor="#D0D0D0", hatch="///", label="not measured"))
    ncols = len(handles) if len(handles) <= _PARTS_PER_LINE else -(-len(handles) // 2)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=9, columnspacing=1.3)


def _draw_front(axes: "Axes", best: Sequence[tuple[float, float]], colour: str, label: str, *, marker: str) -> None:
    """Join the points of a front from the shortest time to the longest; the legend shows the marker, too."""
    axes.plot(
        *zip(*best, strict=True),
        marker=marker,
        markersize=_MARKER_POINTS,
        color=colour,
        label=label,
        linestyle="-" if best[1:] else "none",
        linewidth=1.3,
        drawstyle="steps-post",
        zorder=1,
    )


def _draw_point(axes: "Axes", point: tuple[float, float], colour: str, *, is_best: bool) -> None:
    axes.plot(
        *point,
        "o",
        markersize=_MARKER_POINTS,
        markerfacecolor=colour if is_best else "white",
        markeredgecolor=colour,
        zorder=3 + is_best,
    )


def _name_points(figure: "Figure", axes: "Axes", points: list[tuple[float, float]], names: list[str]) -> None:
    """Write the names beside the points, after the axes have got their final place."""
    figure.draw_without_rendering()
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in points]
    scale = figure.dpi / 72
    texts = [axes.annotate(name, (0, 0), xycoords="figure pixels", fontsize=9.5, zorder=4) for name in names]
    sizes = [(text.get_window_extent().width + 4 * scale, text.get_window_extent().height) for text in texts]
    inside = axes.get_window_extent()
    frame = Box(left=inside.x0, bottom=inside.y0, width=inside.width, height=inside.height)
    boxes = place([(x, y) for x, y in pixels], sizes, frame, radius=_MARKER_POINTS * 0.6 * scale)
    to_data = axes.transData.inverted()
    for text, box, point, (x, y) in zip(texts, boxes, points, pixels, strict=True):
        text.remove()
        middle = (box.left + box.width / 2, box.bottom + box.height / 2)
        is_far = abs(middle[1] - y) > 1.6 * box.height or abs(middle[0] - x) > box.width
        axes.annotate(
            text.get_text(),
            xy=point,
            xytext=tuple(to_data.transform(middle)),
            ha="center",
            va="center",
            fontsize=9.5,
            zorder=4,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7} if is_far else None,
        )


def _time_range(seconds: list[float]) -> tuple[float, float]:
    """Return a range that has room for names, and that does not make a chasm of a small difference."""
    low, high = min(seconds), max(seconds)
    span = max(high - low, 0.25 * high)
    middle = (low + high) / 2
    return max(0.0, middle - 0.9 * span), middle + 0.9 * span


def _unit(sheet: Sheet) -> str:
    return "GiB" if sheet.is_in_gib else "MiB"


def _peaks_title(sheet: Sheet) -> str:
    with_peak = [row for row in sheet.measured if row.value(PEAK_ALLOCATED)]
    rows = sorted(with_peak, key=lambda row: row.value(PEAK_ALLOCATED) or 0.0)
    least, most = rows[0], rows[-1]
    peak = format_bytes(least.value(PEAK_ALLOCATED) or 0)
    change = difference_pct(least.value(PEAK_ALLOCATED), most.value(PEAK_ALLOCATED)) or 0.0
    if len(rows) == 1:
        return f"Peak memory: {peak}" + (f" in {least.peak_phase}" if least.peak_phase else "")
    if change > -0.5:
        return f"Peak memory: all about {peak}"
    if len(by_workload(sheet)) > 1:
        highest = format_bytes(most.value(PEAK_ALLOCATED) or 0)
        return f"Peak memory: from {peak} of job {least.number} to {highest} of job {most.number}"
    return f"Least peak memory: job {least.number}, {peak}, {-change:.0f} % less than job {most.number}"


def _front_title(rows: Sequence[Row], fronts: Sequence[Sequence[Row]]) -> str:
    """Return who is best in both, where all generate the same."""
    if len(rows) == len(fronts):  # each alone in its workload
        return "Peak memory and time"
    if len(fronts) > 1:
        return "Memory against time: a Pareto front for each workload"
    (front,) = fronts
    if len(front) == 1:
        return f"Best in both memory and time: {job_list(front)}"
    if len(front) == len(rows):
        return "Memory against time: every configuration is on the Pareto front"
    numbers = job_list(sorted(front, key=lambda row: row.number))
    return f"Memory against time: {numbers} are on the Pareto front"


def _steps_title(rows: list[Row]) -> str:
    """Return whether memory is level from step to step; the first one, which warms up, left out."""
    worst = max(rows, key=_unevenness)
    if _unevenness(worst) > _LEVEL_PCT:
        return f"The peaks of job {worst.number}'s steps differ by {_unevenness(worst):.1f} % after the first step"
    if all(len(_series(row, "step/allocated_bytes")) > 2 for row in rows):
        return f"After the first, all steps of a job have the same peak within {_LEVEL_PCT:g} %"
    return "Memory and time of each denoising step"


def _unevenness(row: Row) -> float:
    """Return how far the peaks of the steps after the first lie apart, in percent of the largest."""
    peaks = _series(row, "step/allocated_bytes")[1:]
    largest = max(peaks, default=0.0)
    return 100 * (largest - min(peaks)) / largest if largest else 0.0


def _series(row: Row, name: str) -> list[float]:
    """Return a series of the first measured repeat."""
    return [float(value) for value in row.measured[0].series.get(name, [])] if row.measured else []
