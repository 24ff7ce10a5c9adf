"""How all pictures look: fonts, colours, size. No global state of matplotlib is touched."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wan_sweep.units import gib, mib

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#4D4D4D")
PART_COLOURS = {
    "t5": "#56B4E9",
    "clip": "#CC79A7",
    "dit": "#0072B2",
    "vae": "#009E73",
    "libraries": "#8A8A8A",
    "activations": "#E69F00",
}
INK = "#222222"
FAINT = "#8A8A8A"

_NAMES_BESIDE = 8
_NAMES_PER_LINE = 3

_GRID = "#E4E4E4"
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": FAINT,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}


@contextmanager
def picture(
    path: Path, width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Iterator["Figure"]:
    """Give a figure of that many inches and write it to `path`, whole or not at all, when the block ends well.

    Args:
        path: file to write.
        width: in inches.
        height: in inches.
        layout: who places the axes: matplotlib, which takes its time, or None for the caller.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draft = path.with_name(f".{path.name}.part")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(draft, format="png")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def part_colour(part: str) -> str:
    """Return the colour of a part of memory; that of a component which has none of its own is always the same."""
    return PART_COLOURS.get(part) or PALETTE[sum(part.encode()) % len(PALETTE)]


def entitle(figure: "Figure", title: str, below: str = "") -> None:
    """Write a title over the whole width, which long names of jobs do not push aside, and a small line below it."""
    figure.suptitle(f"{title}\n" if below else title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    if below:
        height = figure.get_figheight()
        figure.text(0.011, 1 - 0.36 / height, below, va="top", fontsize=9.2, color="#555555")


def line_style(number: int) -> tuple[str, str]:
    """Return colour and dashes of a job's line; the colours are those of the runs in MLflow."""
    place = number - 1
    return PALETTE[place % len(PALETTE)], ("-", "--", ":", "-.")[place // len(PALETTE) % 4]


def wrapped(words: str, width: int) -> str:
    """Return a long name in several lines."""
    return "\n".join(textwrap.wrap(words, width, subsequent_indent="    ", break_on_hyphens=False))


def room_below(names: Sequence[str]) -> float:
    """Return the inches that `name_lines` needs below a picture for names, which may have several lines."""
    if len(names) <= _NAMES_BESIDE:
        return 0.0
    return 0.3 + -(-len(names) // _NAMES_PER_LINE) * max(name.count("\n") + 1 for name in names) * 0.19


def name_lines(figure: "Figure", handles: Sequence["Artist"], **style: float) -> None:
    """Write a legend beside a picture, or below it where there are many names."""
    is_beside = len(handles) <= _NAMES_BESIDE
    figure.legend(
        handles=handles,
        loc="outside right center" if is_beside else "outside lower left",
        ncols=1 if is_beside else _NAMES_PER_LINE,
        fontsize=9.5 if is_beside else 8.8,
        **style,
    )


def in_unit(num_bytes: float, *, is_in_gib: bool) -> float:
    """Return bytes as the number that an axis in GiB, or else in MiB, shows."""
    return gib(num_bytes) if is_in_gib else mib(num_bytes)


def clean_value_axis(axes: "Axes", axis: Literal["x", "y"]) -> None:
    """Start an axis of values at zero and give it a grid and no line of its own."""
    axes.grid(visible=True, axis=axis)
    if axis == "x":
        axes.set_xlim(left=0)
        axes.spines["bottom"].set_visible(False)
    else:
        axes.set_ylim(bottom=0)
        axes.spines["left"].set_visible(False)
    axes.tick_params(axis=axis, length=0)
