"""Real processes that make a video together get what one process gets.

The lists of layouts may be extended: a world is as large as the largest of them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.wan21.ranks import Forward, Ranks, forward, generate, relative_distance
from wan21.layout import SINGLE, Layout

EXACT = 2e-5  # relative; float32 sums in another order, over all layers and steps

SEQUENCES = [
    Layout(ulysses=2),
    Layout(ulysses=4),
    Layout(ring=2),
    Layout(ring=4),
    Layout(ulysses=2, ring=2),
    Layout(ulysses=3),
]
FORWARDS = [
    Forward(),
    Forward(grid=(3, 3, 5), batch_size=2, most_rows=8),
    Forward(grid=(1, 1, 5), query_slices=2),
    Forward(grid=(3, 3, 5), query_slices=3, most_rows=64),
    Forward(grid=(3, 5, 7), most_rows=64, on_host=0.5),
]
MOST_RANKS = max(layout.world_size for layout in SEQUENCES)


def named(layout: Layout) -> str:
    marks = [f"cfg{layout.cfg}" if layout.cfg > 1 else "", "dit_fsdp" * layout.dit_fsdp, "t5_fsdp" * layout.t5_fsdp]
    return "-".join(filter(None, [f"U{layout.ulysses}R{layout.ring}", *marks]))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks(MOST_RANKS)
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> Any:
    """Results of one process, made once each."""
    known: dict[str, Any] = {}

    def result(function: Any, *arguments: Any) -> Any:
        key = repr((function, arguments))
        if key not in known:
            (known[key],) = ranks.run(1, function, SINGLE, *arguments)
        return known[key]

    return result


@pytest.mark.parametrize("case", FORWARDS, ids=str)
@pytest.mark.parametrize("layout", SEQUENCES, ids=named)
def test_a_forward_of_several_ranks_equals_that_of_one(ranks: Ranks, alone: Any, layout: Layout, case: Forward) -> None:
    expected = alone(forward, case)
    for result in ranks.run(layout.world_size, forward, layout, case):
        assert relative_distance(result["velocity"], expected["velocity"]) < EXACT
