"""scripts/rounding_distances.py, and what it shows: bfloat16's own rounding is more than a promise of 2e-3 allows."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from wan21.models import model_spec
from wan21.request import make_request
from wan21.runtime import CpuRuntime
from wan21.weights.random import RandomWeights

PROMISE = 2e-3


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("rounding_distances")


def test_rounding_alone_moves_latents_further_than_the_promise(script: Any) -> None:
    spec, runtime = model_spec("tiny"), CpuRuntime()
    request = make_request(spec, seed=42, size="96*64", frame_num=5, num_steps=2)
    plain, cut, other = script.rows(spec, request, runtime)
    assert plain.from_plain == 0
    assert cut.from_float32 == pytest.approx(plain.from_float32, rel=0.2)
    # Each is so far from the run that does not round, and the other kernel's bits are others.
    for row in (plain, other):
        assert PROMISE < row.from_float32 < 5 * PROMISE
    assert PROMISE < other.from_plain < plain.from_float32 + other.from_float32


def test_the_run_in_float32_computes_with_the_weights_of_the_others(script: Any) -> None:
    spec, runtime = model_spec("tiny"), CpuRuntime()
    rounded = script.RoundedWeights(spec, 0, runtime.generator).dit()
    drawn = RandomWeights(spec, 0, runtime.generator).dit()
    for name, is_rounded in (("blocks.0.ffn.0.weight", True), ("blocks.0.modulation", False)):
        one, other = (torch.empty(source.shape(name)) for source in (rounded, drawn))
        rounded.write(name, one)
        drawn.write(name, other)
        assert torch.equal(one, other.bfloat16().float() if is_rounded else other)
        assert not torch.equal(one, one.bfloat16().float()) or is_rounded
