"""memory_timeline.png: one job's memory over time, its phases, what came to the device and left it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_sweep.report.bottleneck import AT_WORK
from wan_sweep.report.canvas import FAINT, INK, PART_COLOURS, in_unit, part_colour, picture
from wan_sweep.report.labels import side_by_side
from wan_sweep.report.sheet import LIBRARIES, shortened, word_list
from wan_sweep.report.timeline import Move, Timeline, read_timeline
from wan_sweep.store import TIMELINE_FILE
from wan_sweep.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

ENVELOPE = "#FAD9A0"
ENVELOPE_LINE = "#B87900"
_BAND = "#F1F2F4"

# Inches.
_WIDTH, _LEFT, _RIGHT = 10.8, 0.78, 0.25
_HEAD, _PLOT, _LANE, _FOOT = 1.08, 3.5, 0.48, 1.0
_SMALL = 8.8
_TITLE_CHARACTERS = 96

# The least share of the highest value that shows in the picture.
_VISIBLE = 0.002


def draw_timeline(job_folder: Path) -> Path | None:
    """Draw memory_timeline.png into the folder of a job, or of one of its ranks; None where it left no events.

    Raises:
        RecordError: the events cannot be read; the message names the file.
        OSError: the picture cannot be written; an older one stays as it was.
    """
    timeline = read_timeline(job_folder)
    if timeline is None:
        return None
    draw(timeline, job_folder / TIMELINE_FILE)
    return job_folder / TIMELINE_FILE


def draw(timeline: Timeline, path: Path) -> None:
    """Draw a timeline into a file."""
    is_in_gib = max(*timeline.peaks, *timeline.reserved) >= GIB
    lanes = [moves for moves in _by_direction(timeline) if moves]
    height = _HEAD + _PLOT + _LANE * len(lanes) + _FOOT
    with picture(path, _WIDTH, height, layout=None) as figure:
        width = 1 - (_LEFT + _RIGHT) / _WIDTH
        bottom = (_FOOT + _LANE * len(lanes)) / height
        axes = figure.add_axes((_LEFT / _WIDTH, bottom, width, _PLOT / height))
        paint(axes, timeline, is_in_gib=is_in_gib)
        axes.set_ylabel("device memory [GiB]" if is_in_gib else "device memory [MiB]")
        _name_phases(axes, timeline)
        _mark_peak(axes, timeline, is_in_gib=is_in_gib)
        lowest = axes
        for place, moves in enumerate(lanes):
            lane_bottom = (_FOOT + _LANE * (len(lanes) - 1 - place)) / height
            lowest = figure.add_axes((_LEFT / _WIDTH, lane_bottom, width, _LANE / height), sharex=axes)
            _draw_lane(lowest, moves, timeline)
        for one in figure.axes:
            one.tick_params(axis="x", labelbottom=one is lowest, length=3 if one is lowest else 0)
        lowest.set_xlabel(f"time since the start of the job's first phase {timeline.clock}")
        figure.text(0.012, 1 - 0.13 / height, _title(timeline), va="top", fontsize=12.5, fontweight="bold")
        figure.text(0.012, 1 - 0.42 / height, subtitle(timeline), va="top", fontsize=_SMALL + 0.4, color="#555555")
        handles = legend_handles([timeline])
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=len(handles),
            fontsize=_SMALL,
            columnspacing=1.3,
            borderaxespad=0.6,
        )


def paint(axes: "Axes", timeline: Timeline, *, is_in_gib: bool) -> None:
    """Draw levels, interval peaks and reserved memory over the shaded phases; names and marks are the caller's."""

    def scaled(values: Sequence[float]) -> list[float]:
        return [in_unit(value, is_in_gib=is_in_gib) for value in values]

    for place, phase in enumerate(timeline.phases):
        if place % 2 == 0:
            axes.axvspan(phase.start, phase.end, facecolor=_BAND, linewidth=0, zorder=0)
    level = scaled(timeline.allocated)
    floor = [0.0] * len(level)
    for part, series in timeline.weights.items():
        top = [below + value for below, value in zip(floor, scaled(series), strict=True)]
        axes.fill_between(timeline.times, floor, top, color=part_colour(part), linewidth=0, zorder=2)
        floor = top
    upper = [max(pair) for pair in zip(floor, level, strict=True)]
    axes.fill_between(timeline.times, floor, upper, color=PART_COLOURS["activations"], linewidth=0, zorder=2)
    _paint_peaks(axes, timeline, upper, scaled(timeline.peaks))
    highest = max(*scaled(timeline.peaks), *upper)
    if timeline.has_reserve:
        held = scaled(timeline.reserved)
        axes.step(timeline.times, [*held[1:2], *held[1:]], where="pre", color=INK, linewidth=1.1, zorder=4)
        highest = max(highest, *held)
    axes.grid(visible=True, axis="y")
    axes.set_xlim(timeline.times[0], timeline.times[-1] if timeline.seconds else timeline.times[0] + 1e-3)
    axes.set_ylim(0, highest * 1.2 or 1.0)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _paint_peaks(axes: "Axes", timeline: Timeline, levels: Sequence[float], peaks: Sequence[float]) -> None:
    """Fill each interval from the level up to its peak, and draw the peak as its lid."""
    times = timeline.times
    arriving = {
        index: move.component
        for move in timeline.moves
        if move.is_arrival
        for index, start in enumerate(times[:-1])
        if move.start <= start and times[index + 1] <= move.end
    }
    for part in ("", *dict.fromkeys(arriving.values())):
        edges: list[float] = []
        below: list[float] = []
        above: list[float] = []
        for index in range(len(times) - 1):
            gap = arriving.get(index, "") != part
            edges += times[index : index + 2]
            below += levels[index : index + 2]
            above += levels[index : index + 2] if gap else [peaks[index + 1]] * 2
        colour = part_colour(part) if part else ENVELOPE
        axes.fill_between(edges, below, above, color=colour, alpha=0.4 if part else 1, linewidth=0, zorder=1.5)
    axes.hlines(peaks[1:], times[:-1], times[1:], color=ENVELOPE_LINE, linewidth=1.0, zorder=3)


def _by_direction(timeline: Timeline) -> tuple[list[Move], list[Move]]:
    """Return what came, and what left."""
    return [move for move in timeline.moves if move.is_arrival], [
        move for move in timeline.moves if not move.is_arrival
    ]


def _name_phases(axes: "Axes", timeline: Timeline) -> None:
    """Write each phase's name over its band; where bands are narrow, names move aside and a line leads to the band."""
    names = [
        axes.text(0, 0, phase.name, fontsize=_SMALL + 0.6, fontweight="bold" if is_peak else "normal", va="bottom")
        for phase in timeline.phases
        for is_peak in [phase.start <= timeline.peak.start and timeline.peak.end <= phase.end]
    ]
    middles = [(phase.start + phase.end) / 2 for phase in timeline.phases]
    _put_in_line(axes, names, middles, anchor=1.0, line=1.045)


def _put_in_line(axes: "Axes", texts: Sequence["Text"], at: Sequence[float], *, anchor: float, line: float) -> None:
    """Put texts side by side, each as near as may be to its time, with a line from `anchor` to it; heights in axes."""
    if not texts:
        return
    box = axes.get_window_extent()
    low, high = axes.get_xlim()
    widths = [text.get_window_extent().width / box.width + 0.014 for text in texts]
    belongs = [(time - low) / (high - low) for time in at]
    places = side_by_side(belongs, widths, -0.004, 1.004)
    for text, place, home in zip(texts, places, belongs, strict=True):
        text.set(x=place, y=line, transform=axes.transAxes, ha="center")
        text.set_clip_on(False)
        axes.plot(
            [home, place],
            [anchor, line - 0.008 * (1 if line > anchor else -1)],
            color=FAINT,
            linewidth=0.7,
            transform=axes.transAxes,
            clip_on=False,
            zorder=1,
        )


def _mark_peak(axes: "Axes", timeline: Timeline, *, is_in_gib: bool) -> None:
    """Mark the middle of the highest interval, and write above everything what it is, on the side that has room."""
    peak = timeline.peak
    x, y = (peak.start + peak.end) / 2, in_unit(peak.num_bytes, is_in_gib=is_in_gib)
    low, high = axes.get_xlim()
    is_left = x > low + 0.55 * (high - low)
    axes.plot(x, y, "o", markersize=6.5, markerfacecolor="white", markeredgecolor=INK, markeredgewidth=1.4, zorder=6)
    axes.annotate(
        f"{format_bytes(peak.num_bytes)} in {peak.place}",
        xy=(x, y),
        xytext=(x + (high - low) * (-0.012 if is_left else 0.012), axes.get_ylim()[1] * 0.895),
        ha="right" if is_left else "left",
        va="bottom",
        fontsize=10,
        fontweight="bold",
        zorder=7,
        arrowprops={
            "arrowstyle": "-",
            "color": INK,
            "linewidth": 0.9,
            "relpos": (1.0 if is_left else 0.0, 0.0),
            "shrinkA": 0,
            "shrinkB": 4,
        },
    )


def _draw_lane(axes: "Axes", moves: Sequence[Move], timeline: Timeline) -> None:
    """Draw when each component came, or left, with its bytes and seconds."""
    is_arrival = moves[0].is_arrival
    for place, phase in enumerate(timeline.phases):
        if place % 2 == 0:
            axes.axvspan(phase.start, phase.end, facecolor=_BAND, linewidth=0, zorder=0)
    for move in moves:
        # The edge gives a width to moves that are too short to be seen.
        colour = part_colour(move.component)
        width = move.end - move.start
        axes.barh(0.78, width, left=move.start, height=0.3, color=colour, edgecolor=colour, linewidth=1.6, zorder=3)
    texts = [
        axes.text(
            0,
            0,
            f"{move.component} {format_bytes(move.num_bytes)}"
            + (f", {format_seconds(move.seconds)}" if move.seconds else ""),
            fontsize=_SMALL - 0.4,
            va="top",
        )
        for move in moves
    ]
    axes.set_ylim(0, 1)
    _put_in_line(axes, texts, [(move.start + move.end) / 2 for move in moves], anchor=0.6, line=0.45)
    axes.set_yticks([0.6], ["comes" if is_arrival else "leaves"], fontsize=_SMALL)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color("#D8D8D8")


def legend_handles(timelines: Sequence[Timeline]) -> list["Patch | Line2D"]:
    """Return what a legend names: only what can be seen in one of the timelines."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    parts = dict.fromkeys(part for one in timelines for part, series in one.weights.items() if any(series))
    handles: list[Patch | Line2D] = [
        Patch(color=part_colour(part), label=part if part == LIBRARIES else f"{part} weights") for part in parts
    ]
    if any(map(_shows_activations, timelines)):
        handles.append(Patch(color=PART_COLOURS["activations"], label="activations at boundaries"))
    handles.append(Patch(facecolor=ENVELOPE, edgecolor=ENVELOPE_LINE, label="highest allocated between them"))
    if any(one.has_reserve for one in timelines):
        handles.append(Line2D([], [], color=INK, linewidth=1.1, label="reserved"))
    return handles


def _shows_activations(timeline: Timeline) -> bool:
    rest = max(
        level - sum(series[index] for series in timeline.weights.values())
        for index, level in enumerate(timeline.allocated)
    )
    return rest > _VISIBLE * timeline.peak.num_bytes


def _title(timeline: Timeline) -> str:
    """Return what ended the job badly, else where the peak is and the largest thing that fills it."""
    if timeline.trouble:
        return shortened(timeline.trouble, _TITLE_CHARACTERS)
    peak = timeline.peak
    weights = {part: value for part, value in peak.weights.items() if part != LIBRARIES}
    at_work = AT_WORK.get(peak.phase, frozenset())
    idle = {part: value for part, value in weights.items() if part not in at_work}
    needed = {part: value for part, value in weights.items() if part in at_work}
    parts = (
        (sum(idle.values()), f"{word_list([*idle])} weights that this phase does not need"),
        (sum(needed.values()), f"{word_list([*needed])} weights"),
        (
            peak.num_bytes - sum(peak.weights.values()),
            "weights on their way" if peak.phase == "load" else "activations",
        ),
    )
    largest, what = max(parts)
    share = 100 * largest / peak.num_bytes if peak.num_bytes else 0.0
    return f"Peak {format_bytes(peak.num_bytes)} in {peak.phase or 'no phase'}: {share:.0f} % of it {what}"


def subtitle(timeline: Timeline) -> str:
    """Which job it is, of which rank, and on what it ran or would run."""
    device = f"estimated for the {timeline.device}" if timeline.is_estimate else timeline.device
    words = [f"job {timeline.number}: {timeline.name.partition('_')[2].replace(',', ', ')}", device]
    if timeline.rank is not None:
        words.insert(1, f"rank {timeline.rank}")
    if timeline.has_reserve:
        words.append(f"reserved at most {format_bytes(max(timeline.reserved))}")
    return "   |   ".join(words)
