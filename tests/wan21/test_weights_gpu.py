"""Weights on their way to a CUDA device: equal wherever they land, and little staged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan21.runtime import Runtime, make_runtime
from wan21.weights import source as source_module
from wan21.weights.checkpoint import SafetensorsSource
from wan21.weights.components import Source
from wan21.weights.random import RandomSource
from wan21.weights.safetensors_header import read_header

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = (9000, 5000)  # 180 MB in float32: several pieces
# The allocator rounds a large request up to a multiple of 2 MiB.
ROUNDING_BYTES = 4 * 2**20


@pytest.fixture
def runtime() -> Runtime:
    return make_runtime("cuda")


def staged_bytes(runtime: Runtime, source: Source, destination: torch.Tensor) -> int:
    """Device memory that one write took for itself."""
    runtime.synchronize()
    runtime.reset_memory_peaks()
    before = runtime.memory().allocated_bytes
    source.write("a.weight", destination)
    runtime.synchronize()
    return runtime.memory().allocated_peak_bytes - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_drawn_weights_are_equal_on_host_and_device(runtime: Runtime, dtype: torch.dtype) -> None:
    source = RandomSource("dit", {"a.weight": SHAPE}, 0, runtime.generator)
    on_host, on_device = torch.empty(SHAPE, dtype=dtype), torch.empty(SHAPE, dtype=dtype, device=runtime.device)
    for destination in (on_host, on_device):
        assert staged_bytes(runtime, source, destination) <= source_module.STAGING_BYTES + ROUNDING_BYTES
    assert torch.equal(on_host, on_device.cpu())


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_weights_are_equal_on_host_and_device(
    runtime: Runtime, tmp_path: Path, stored_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    stored = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(stored_dtype)
    save_file({"a.weight": stored}, tmp_path / "a.safetensors")
    destination = torch.empty(SHAPE, dtype=dtype, device=runtime.device)
    with SafetensorsSource(read_header(tmp_path / "a.safetensors").tensors) as source:
        assert staged_bytes(runtime, source, destination) <= source_module.STAGING_BYTES + ROUNDING_BYTES
    assert torch.equal(stored.to(dtype), destination.cpu())
