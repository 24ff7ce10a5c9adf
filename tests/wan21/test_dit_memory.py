"""What one forward of the transformer allocates, each way to carry it out, counted on a CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.wan21.test_dit import realistic_
from wan21.dit.layers import chunk_rows
from wan21.dit.model import Dit, ForwardPlan
from wan21.memory.hosted import HostedResidual
from wan21.models import DitConfig
from wan21.runtime import CpuRuntime

CONFIG = DitConfig(dim=128, ffn_dim=512, num_heads=2, num_layers=3, text_dim=32, text_len=8)
LATENTS = (1, 16, 5, 32, 48)
NUM_TOKENS = 5 * 16 * 24
OF_A_TENSOR = 2 * NUM_TOKENS * CONFIG.dim  # [L, D] in bfloat16


@pytest.fixture(scope="module")
def model() -> Dit:
    with torch.no_grad():
        model = Dit(CONFIG, dtype=torch.bfloat16)
        realistic_(model)
        return model


def peaks(model: Dit, num_forwards: int = 1, share: float = 0.0, **plan: Any) -> list[int]:
    """The most that each forward had beyond what stood before it."""
    runtime = CpuRuntime()
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad(), runtime.counting():
        context = model.embed_text([torch.ones(5, CONFIG.text_dim)])
        time = model.embed_time(700, latents.device)
        turns = model.rotations((5, 16, 24), latents.device)
        way = ForwardPlan(**plan)
        standing = runtime.memory().allocated_bytes
        shape = (1, NUM_TOKENS, CONFIG.dim)
        residual = HostedResidual(shape, way.most_rows, share, runtime) if share else None
        for _ in range(num_forwards):
            runtime.memory()
            runtime.reset_memory_peaks()
            model(latents, time, context, turns=turns, plan=way, residual=residual)
            found.append(runtime.memory().allocated_peak_bytes - standing)
    return found


def test_sliced_queries_save_queries_and_outputs_of_the_whole_video(model: Dit) -> None:
    (whole,), (sliced,) = peaks(model, most_rows=64), peaks(model, most_queries=64, most_rows=64)
    assert whole - sliced > 1.5 * OF_A_TENSOR


def test_fewer_rows_at_once_save_memory(model: Dit) -> None:
    (many,), (few,) = peaks(model, most_queries=64), peaks(model, most_queries=64, most_rows=64)
    of_the_hidden = 2 * CONFIG.ffn_dim * (chunk_rows(torch.Size((1, NUM_TOKENS, CONFIG.dim)), 4096) - 64)
    assert many - few > of_the_hidden


def test_the_hidden_layer_lies_where_keys_and_values_were() -> None:
    """Of any width, as long as there is room: 960 rows of 512 take what keys and values of 1,920 tokens of 128 do."""

    def peak(ffn_dim: int, most_rows: int) -> int:
        with torch.no_grad():
            (peak,) = peaks(Dit(replace(CONFIG, ffn_dim=ffn_dim), dtype=torch.bfloat16), most_rows=most_rows)
        return peak

    assert peak(512, 960) == peak(256, 960)
    assert peak(1024, 960) > peak(512, 960)


def test_a_forward_takes_residual_keys_values_and_chunks_only(model: Dit) -> None:
    (peak,) = peaks(model, most_queries=64, most_rows=64)
    residual_keys_values = 4 * OF_A_TENSOR  # the residual is in float32
    assert residual_keys_values < peak < 1.5 * residual_keys_values


def test_a_residual_on_the_host_saves_its_share(model: Dit) -> None:
    (everything,), (half,) = (peaks(model, most_queries=64, most_rows=64, share=share) for share in (0.0, 0.5))
    of_the_slots = 3 * 4 * 64 * CONFIG.dim
    assert everything - half == pytest.approx(OF_A_TENSOR - of_the_slots, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("most_queries", [None, 64])
def test_every_forward_has_the_same_peak(model: Dit, most_queries: int | None, share: float) -> None:
    assert len(set(peaks(model, num_forwards=3, most_queries=most_queries, share=share, most_rows=64))) == 1
