"""How all pictures look: fonts, colours, size. No global state of matplotlib is touched."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wan_sweep.units import gib, mib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#4D4D4D")
PART_COLOURS = {"t5": "#56B4E9", "clip": "#CC79A7", "dit": "#0072B2", "vae": "#009E73", "activations": "#E69F00"}
INK = "#222222"
FAINT = "#8A8A8A"
GRID = "#E4E4E4"

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
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
def picture(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Give a figure of that many inches and write it to `path`, whole or not at all, when the block ends well."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draft = path.with_name(f".{path.name}.part")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(draft, format="png")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def entitle(figure: "Figure", title: str) -> None:
    """Write a title over the whole width, which long names of jobs do not push aside."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")


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
