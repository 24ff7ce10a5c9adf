"""Draws the panels of an analysis, one below the other, in the style of the reports."""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wan_sweep.analyze.finding import Analysis
from wan_sweep.analyze.panels import Bars, Line, Panel, Timeline
from wan_sweep.analyze.source import UnreadableFileError
from wan_sweep.analyze.wording import one_line, show
from wan_sweep.report.canvas import FAINT, INK, PALETTE, PART_COLOURS, clean_value_axis, entitle, picture
from wan_sweep.units import GIB, KIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 11.0
_TIMELINE_INCHES = 3.4
_SHARE_INCHES = 1.9
_BAR_INCHES = 0.3
_MOST_POINTS = 2000
_MOST_STRETCHES = 60
_LONGEST_NAME = 70
_SHADES = ("#EEF3F8", "#FBF4E6")
_LEAST_SHARE_FOR_A_NAME = 0.045
_ROOM_ABOVE = 1.25
_HUNDREDTH = 0.01
_LEAST_SECONDS = 2.0


def draw(analysis: Analysis, path: Path) -> None:
    """Writes the picture as PNG.

    Raises:
        UnreadableFileError: the analysis has nothing that can be drawn.
        OSError: the file cannot be written.
    """
    if not analysis.panels:
        raise UnreadableFileError(f"{analysis.path} holds nothing that can be drawn; leave --png out")
    heights = [_height(panel) for panel in analysis.panels]
    with warnings.catch_warnings(), picture(path, _WIDTH, sum(heights) + 0.5) as figure:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in another script gets empty boxes
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
        for part, panel in zip(parts[:, 0], analysis.panels, strict=True):
            axes = part.subplots()
            axes.set_title(panel.title, loc="left", fontsize=11)
            if isinstance(panel, Bars):
                _draw_bars(axes, panel)
            else:
                _draw_timeline(axes, panel)
        entitle(figure, _plain(f"{analysis.title}: {Path(analysis.path).name}"))


def _height(panel: Panel) -> float:
    if isinstance(panel, Bars):
        return 0.8 + _BAR_INCHES * len(panel.bars)
    return _TIMELINE_INCHES if panel.unit == "bytes" else _SHARE_INCHES


def _draw_bars(axes: "Axes", panel: Bars) -> None:
    largest = max(value for _, value in panel.bars)
    for place, (_, value) in enumerate(panel.bars):
        axes.barh(place, value, height=0.66, color=PALETTE[0], linewidth=0)
        axes.text(value + largest * 0.008, place, show(value, panel.unit), va="center", fontsize=9)
    names = [_plain(name) for name, _ in panel.bars]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, largest * 1.12 or 1)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _plain(text: str) -> str:
    """Text from a file, of which nothing is taken for a formula."""
    text = one_line(text)
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."
    return text.replace("$", r"\$")


def _draw_timeline(axes: "Axes", panel: Timeline) -> None:
    highest = max((float(np.max(line.values)) for line in panel.lines if len(line.values)), default=0.0)
    unit, scale = _scale(highest) if panel.unit == "bytes" else ("%", _HUNDREDTH)
    left, right = panel.limits
    per_second, time_unit = (1, "seconds") if right - left >= _LEAST_SECONDS else (1000, "milliseconds")
    _shade(axes, panel, left, right)
    if panel.layers:
        colours = [PART_COLOURS.get(name, PALETTE[5 + place % 3]) for place, (name, _) in enumerate(panel.layers)]
        values = [np.asarray(level, dtype=np.float64) / scale for _, level in panel.layers]
        labels = [_plain(f"{name} weights") for name, _ in panel.layers]
        axes.stackplot(panel.layer_times, *values, labels=labels, colors=colours, step="post", linewidth=0, alpha=0.85)
    for place, line in enumerate(panel.lines):
        times, levels = thinned(line)
        is_outline = line.label == "reserved"
        colour = FAINT if is_outline else INK if panel.layers else PALETTE[place % len(PALETTE)]
        dashes = "--" if is_outline else "-"
        axes.plot(
            times, levels / scale, dashes, drawstyle="steps-post", color=colour, linewidth=1.2, label=_plain(line.label)
        )
        if panel.unit == "share":
            axes.fill_between(times, levels / scale, step="post", color=colour, alpha=0.25, linewidth=0)
    clean_value_axis(axes, "y")
    axes.set_ylim(top=(100.0 if panel.unit == "share" else highest / scale or 1.0) * _ROOM_ABOVE)
    axes.set_xlim(left, right)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(lambda time, _: f"{time * per_second:g}")
    axes.set_xlabel(time_unit)
    if panel.peak is not None:
        _mark(axes, panel.peak, (left, right), scale)
    if len(panel.lines) + len(panel.layers) > 1:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=6, fontsize=9, borderpad=0.1, columnspacing=1.3
        )


def _scale(highest: float) -> tuple[str, float]:
    if highest >= GIB:
        return "GiB", GIB
    return ("MiB", MIB) if highest >= MIB else ("KiB", KIB)


def _shade(axes: "Axes", panel: Timeline, left: float, right: float) -> None:
    """Shades and names the stretches, if they are few enough to be told apart."""
    if len(panel.stretches) > _MOST_STRETCHES:
        return
    for place, stretch in enumerate(panel.stretches):
        axes.axvspan(stretch.start, stretch.end, color=_SHADES[place % len(_SHADES)], linewidth=0, zorder=0)
        share = (stretch.end - stretch.start) / (right - left)
        if share >= max(_LEAST_SHARE_FOR_A_NAME, 0.0105 * len(stretch.label)):
            middle = (stretch.start + stretch.end) / 2
            where = axes.get_xaxis_transform()
            axes.text(middle, 0.97, _plain(stretch.label), transform=where, ha="center", va="top", fontsize=9)


def _mark(axes: "Axes", peak: tuple[float, float], limits: tuple[float, float], scale: float) -> None:
    time, value = peak
    left, right = limits
    is_late = (time - left) / (right - left) > 0.8
    axes.plot(time, value / scale, "o", color=PALETTE[5], markersize=5, zorder=5)
    axes.annotate(
        f"peak {format_bytes(value)}",
        (time, value / scale),
        xytext=(-6 if is_late else 6, 4),
        textcoords="offset points",
        ha="right" if is_late else "left",
        va="bottom",
        fontsize=9.5,
        zorder=5,
    )


def thinned(line: Line) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A few points for the time of each pixel.

    They are the lowest and the highest, so that no peak is lost, and the first and the last, so that what lasts is
    true.
    """
    times, values = np.asarray(line.times, dtype=np.float64), np.asarray(line.values, dtype=np.float64)
    if len(values) <= _MOST_POINTS:
        return times, values
    edges = np.linspace(times[0], times[-1], _MOST_POINTS // 4 + 1)
    bounds = np.unique(np.concatenate([[0], np.searchsorted(times, edges), [len(times)]]))
    kept = set()
    for start, stop in pairwise(bounds.tolist()):
        part = values[start:stop]
        kept |= {start, start + int(np.argmin(part)), start + int(np.argmax(part)), stop - 1}
    chosen = np.array(sorted(kept))
    return times[chosen], values[chosen]
