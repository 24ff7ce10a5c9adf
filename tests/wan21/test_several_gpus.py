"""The same promises as in test_several_ranks, on GPUs and through NCCL: as many of them as are there.

Each world has processes of its own, as a job has: a process that had left one with NCCL was seen to die in its second.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.wan21.ranks import Forward, forward, generate, relative_distance, run_afresh
from wan21.layout import SINGLE, Layout

NUM_GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.multi_gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]

ROUNDING = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 3e-2}  # relative; other sums in this precision, over all layers

LAYOUTS = [
    layout
    for layout in (
        Layout(ulysses=2),
        Layout(ring=2),
        Layout(cfg=2),
        Layout(ulysses=2, ring=2),
        Layout(cfg=2, ulysses=2),
        Layout(ulysses=4),
        Layout(ring=4),
        Layout(ulysses=8),
        Layout(ulysses=4, ring=2),
        Layout(ulysses=2, ring=4),
        Layout(ring=8),
        Layout(cfg=2, ulysses=4),
    )
    if layout.world_size <= NUM_GPUS
]


Known = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def known() -> Known:
    """Results by rank on GPUs, made once each."""
    found: dict[str, list[Any]] = {}

    def results(layout: Layout, function: Any, *arguments: Any) -> list[Any]:
        key = repr((layout, function.__name__, arguments))
        if key not in found:
            found[key] = run_afresh(layout.world_size, function, layout, *arguments, "cuda")
        return found[key]

    return results


@pytest.mark.parametrize("precision", list(ROUNDING))
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.ulysses != 8 and layout.cfg == 1], ids=str)
def test_a_forward_of_several_gpus_equals_that_of_one(known: Known, layout: Layout, precision: str) -> None:
    case = Forward(
        grid=(3, 15, 17), batch_size=2, most_rows=256, precision=precision, head_dim=64, is_fused=precision != "fp32"
    )
    (expected,) = known(SINGLE, forward, case)
    for result in known(layout, forward, case):
        assert relative_distance(result["velocity"], expected["velocity"]) < ROUNDING[precision]


@pytest.mark.parametrize(
    "chosen",
    [{}, {"offload": True}, {"load_strategy": "block"}, {"load_strategy": "part"}, {"residual_on_host": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_from_prompt_to_video_several_gpus_get_what_one_gets(
    known: Known, layout: Layout, chosen: dict[str, Any]
) -> None:
    (expected,) = known(SINGLE, generate, {}, {})
    for result in known(layout, generate, {}, chosen):
        assert relative_distance(result["latents"], expected["latents"]) < ROUNDING["fp32"]
        assert result["loaded"] == result["expected"]


@pytest.mark.parametrize("precision", list(ROUNDING))
def test_sharded_weights_give_the_bits_of_whole_ones(known: Known, precision: str) -> None:
    whole, sharded = (
        known(Layout(ulysses=2, dit_fsdp=fsdp, t5_fsdp=fsdp), generate, {}, {"precision": precision})
        for fsdp in (False, True)
    )
    for one, other in zip(whole, sharded, strict=True):
        assert np.array_equal(one["latents"], other["latents"])
        assert other["loaded"] == other["expected"]
        assert other["loaded"]["dit"] < 0.55 * one["loaded"]["dit"]


@pytest.mark.parametrize("load_strategy", ["block", "part"])
def test_streamed_shares_give_the_bits_of_whole_weights(known: Known, load_strategy: str) -> None:
    whole = known(Layout(ring=2), generate, {}, {})
    streamed = known(Layout(ring=2), generate, {}, {"load_strategy": load_strategy})
    assert all(np.array_equal(one["latents"], other["latents"]) for one, other in zip(whole, streamed, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_runs_with_one_seed_give_the_same_bits_on_gpus(known: Known, layout: Layout) -> None:
    first, second = known(layout, generate, {}, {}), run_afresh(layout.world_size, generate, layout, {}, {}, "cuda")
    assert all(np.array_equal(one["latents"], first[0]["latents"]) for one in (*first, *second))
