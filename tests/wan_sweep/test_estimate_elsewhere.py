"""Estimates made by other builds and versions of torch against those of the present one.

scripts/write_estimates.py wrote them; a file's name says which torch it was.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

STORED = sorted((Path(__file__).resolve().parents[1] / "data" / "estimates").glob("*.json"))


@pytest.fixture(scope="module")
def present() -> dict[str, dict[str, float]]:
    """What the torch that is installed here says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
        script: Any = importlib.import_module("write_estimates")
    found: dict[str, dict[str, float]] = script.estimates()
    return found


def test_there_are_estimates_of_another_version_than_the_present_one() -> None:
    import torch

    versions = {json.loads(path.read_text("utf-8"))["made_with"]["torch"] for path in STORED}
    assert versions - {torch.__version__}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_another_torch_says_the_same_to_the_byte(path: Path, present: dict[str, dict[str, float]]) -> None:
    assert json.loads(path.read_text("utf-8"))["estimates"] == present
