"""A residual partly on the host: the same bits, fewer bytes on the device."""

from collections.abc import Iterator

import pytest
import torch

from tests.wan21.test_dit import SMALL, small
from wan21.dit.layers import chunk_rows
from wan21.dit.model import Dit, ForwardPlan
from wan21.memory.hosted import NUM_SLOTS, HostedResidual
from wan21.runtime import CpuRuntime

NUM_TOKENS = 10 * 8 * 8
ROWS = 64  # 10 windows
WINDOW_BYTES = 4 * ROWS * SMALL.dim


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Dit:
    with torch.no_grad():
        return small(torch.bfloat16)


def hosted(share: float, runtime: CpuRuntime, batch_size: int = 1) -> HostedResidual:
    return HostedResidual((batch_size, NUM_TOKENS, SMALL.dim), ROWS, share, runtime)


def velocity(model: Dit, residual: HostedResidual | None, seed: int, batch_size: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, 16, 10, 16, 16, generator=generator)
    context = model.embed_text([torch.randn(17, SMALL.text_dim, generator=generator) for _ in range(batch_size)])
    size = chunk_rows(torch.Size((batch_size, NUM_TOKENS, SMALL.dim)), ROWS)
    plan = ForwardPlan(most_queries=size, most_rows=ROWS)
    return model(latents, 700, context, plan=plan, residual=residual)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_the_velocity_has_the_bits_of_a_residual_on_the_device(model: Dit, share: float) -> None:
    residual = hosted(share, CpuRuntime())
    for seed in range(2):
        assert torch.equal(velocity(model, residual, seed), velocity(model, None, seed))


def test_videos_of_a_batch_share_windows(model: Dit) -> None:
    residual = hosted(0.5, CpuRuntime(), batch_size=2)
    assert torch.equal(velocity(model, residual, 0, batch_size=2), velocity(model, None, 0, batch_size=2))


def test_a_forward_that_failed_does_not_spoil_the_next(model: Dit) -> None:
    residual = hosted(0.5, CpuRuntime())
    for num_done in (0, 3, 7):
        for index, (_, window) in enumerate(residual.windows(writes=True)):
            window.fill_(float("nan"))
            if index == num_done:
                break
        assert torch.equal(velocity(model, residual, 1), velocity(model, None, 1))


@pytest.mark.parametrize(("share", "num_staying"), [(0.1, 9), (0.5, 5), (1.0, 0)])
def test_what_waits_on_the_host_is_not_on_the_device(share: float, num_staying: int) -> None:
    runtime = CpuRuntime()
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        residual = hosted(share, runtime)
        slots = min(NUM_SLOTS, 10 - num_staying + 1)
        assert runtime.memory().allocated_bytes - before == (num_staying + slots) * WINDOW_BYTES
        assert runtime.host_buffer_bytes() == (10 - num_staying) * WINDOW_BYTES
        residual.close()
        assert runtime.memory().allocated_bytes == before
        assert runtime.host_buffer_bytes() == 0


def test_windows_keep_what_was_written_and_only_that() -> None:
    residual = hosted(0.5, CpuRuntime())
    for rows, window in residual.windows(reads=False, writes=True):
        window.copy_(torch.arange(rows.start, rows.stop).view(1, -1, 1).expand_as(window))
    for _, window in residual.windows(writes=True):
        window.add_(1)
    seen = torch.cat([window[0, :, 0].clone() for _, window in residual.windows()])
    assert torch.equal(seen, torch.arange(NUM_TOKENS) + 1.0)
