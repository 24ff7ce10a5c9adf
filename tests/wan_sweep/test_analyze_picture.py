from pathlib import Path

import numpy as np
import pytest

from wan_sweep.analyze import UnreadableFileError
from wan_sweep.analyze.finding import Analysis
from wan_sweep.analyze.panels import Bars, Line, Stretch, Timeline
from wan_sweep.analyze.picture import draw, thinned

PNG = b"\x89PNG"


def test_thinning_keeps_the_peak_and_every_level_that_lasts() -> None:
    # 50,000 changes in the first thousandth of the time, with one high peak, and then a level that lasts.
    chance = np.random.default_rng(0)
    times = np.append(np.sort(chance.uniform(0, 1e-3, 50_000)), [0.5, 1.0])
    values = np.append(chance.uniform(10, 20, 50_000), [15.0, 15.0])
    values[12_345], values[49_999] = 99.0, 17.5
    shown_times, shown = thinned(Line(label="allocated", times=times, values=values))
    assert len(shown) < 4_000
    assert shown.max() == 99.0
    assert shown_times[shown.argmax()] == times[12_345]
    for moment, level in ((0.25, 17.5), (0.75, 15.0)):
        assert shown[np.searchsorted(shown_times, moment, side="right") - 1] == level


@pytest.mark.parametrize("num_bytes", [0, 700, 3 * 2**20, 80 * 2**30])
def test_levels_of_any_size_and_times_of_any_length_are_drawn(num_bytes: int, tmp_path: Path) -> None:
    timeline = Timeline(
        title="memory",
        limits=(0.0, 1e-5 if num_bytes == 700 else 500.0),
        unit="bytes",
        lines=[Line(label="allocated", times=[0.0], values=[num_bytes])],
        layer_times=[0.0, 1.0],
        layers=[("dit", [0.0, 1.0])],
        stretches=[Stretch(label=f"{number} $x_$", start=number, end=number + 1) for number in range(80)],
        peak=(0.0, num_bytes),
    )
    bars = Bars(title="operations", unit="seconds", bars=[("void f<g>(\n$x_$)" * 20, 1e-6), ("none", 0.0)])
    found = Analysis(kind="any", title="Any", path="any.json", headline=[], sections=[], panels=[timeline, bars])
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_an_analysis_without_panels_says_that_it_cannot_be_drawn(tmp_path: Path) -> None:
    found = Analysis(kind="any", title="Any", path="any.json", headline=[], sections=[])
    with pytest.raises(UnreadableFileError, match="nothing that can be drawn"):
        draw(found, tmp_path / "picture.png")
