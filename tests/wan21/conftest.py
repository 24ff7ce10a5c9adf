"""Facts about the released models that tests compare with (tests/data)."""

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Numbers obtained by running the official code."""
    return json.loads((DATA / "wan21_golden.json").read_text())


@pytest.fixture(scope="session")
def checkpoint_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Every tensor name and shape of the official checkpoints, by model."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in (DATA / "wan21_state_dict.tsv").read_text().splitlines():
        if line.startswith(("#", "model\t")):
            continue
        model, key, index_range, shape, _ = line.split("\t")
        first, last = (0, 0) if index_range == "-" else map(int, index_range.split(".."))
        for index in range(first, last + 1):
            size = () if shape == "scalar" else tuple(int(side) for side in shape.split("x"))
            shapes.setdefault(model, {})[key.replace("{i}", str(index))] = size
    return shapes
