"""Streamed blocks: the same results as resident ones, from two fixed buffers."""

import gc

import pytest
import torch
from torch import nn

from wan21.memory.slicing import choose_query_slices
from wan21.memory.streaming import StreamedBlocks
from wan21.runtime import CpuRuntime

WIDTH = 8


class Scale(nn.Module):
    """A block with parameters of two dtypes, one of an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.shift = nn.Parameter(torch.empty(1, WIDTH, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.bfloat16()).float() + self.shift


def weight(index: int, name: str, shape: torch.Size) -> torch.Tensor:
    seed = 1000 * index + sum(map(ord, name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def meta_block() -> nn.Module:
    with torch.device("meta"):
        return Scale()


def write(index: int, name: str, to: torch.Tensor) -> None:
    to.copy_(weight(index, name, to.shape))


def streamed(num_blocks: int, runtime: CpuRuntime) -> StreamedBlocks:
    return StreamedBlocks(meta_block, num_blocks, write, runtime)


def resident(num_blocks: int) -> list[nn.Module]:
    blocks = [Scale() for _ in range(num_blocks)]
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            parameter.data.copy_(weight(index, name, parameter.shape))
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7])
def test_every_pass_equals_resident_blocks(num_blocks: int) -> None:
    blocks = streamed(num_blocks, CpuRuntime())
    for seed in range(3):
        x = expected = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
        for block in blocks:
            x = block(x)
        for block in resident(num_blocks):
            expected = block(expected)
        assert torch.equal(x, expected)


@torch.no_grad()
def test_a_pass_given_up_in_the_middle_does_not_spoil_the_next() -> None:
    blocks = streamed(5, CpuRuntime())
    for index, block in enumerate(blocks):
        block(torch.zeros(1, WIDTH))
        if index == 2:
            break
    x = expected = torch.ones(1, WIDTH)
    for block in blocks:
        x = block(x)
    for block in resident(5):
        expected = block(expected)
    assert torch.equal(x, expected)


def test_only_two_blocks_take_device_memory_and_the_host_holds_all() -> None:
    runtime = CpuRuntime()
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        blocks = streamed(6, runtime)
        assert runtime.memory().allocated_bytes - before == StreamedBlocks.device_bytes_for(meta_block(), 6)
        standing = runtime.memory().allocated_bytes
        with torch.no_grad():
            for block in blocks:
                block(torch.zeros(1, WIDTH))
        assert runtime.memory().allocated_bytes - standing < 4096
    assert runtime.host_buffer_bytes() >= 6 * sum(p.numel() * p.element_size() for p in meta_block().parameters())


def test_host_memory_is_given_back() -> None:
    runtime = CpuRuntime()
    blocks = streamed(3, runtime)
    assert runtime.host_buffer_bytes() > 0
    del blocks
    gc.collect()
    assert runtime.host_buffer_bytes() == 0


def test_the_number_of_slices_is_what_was_asked_or_fits_the_video() -> None:
    assert choose_query_slices(1, 32_760) == 1
    assert choose_query_slices(5, 32_760) == 5
    assert choose_query_slices("auto", 32_760) == 8
    assert choose_query_slices("auto", 180) == 2
    assert choose_query_slices(1000, 180) == 180
