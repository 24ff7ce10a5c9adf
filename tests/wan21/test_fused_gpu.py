"""Our kernels on a GPU against their references in torch, at the model's widths and at odd numbers of rows."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan21.kernels import tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-10, torch.float16: 2**-13}
WIDTHS = [(1536, 12), (5120, 40), (384, 3)]
DEVICE = "cuda"


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few numbers that were rounded the other way."""
    difference = (actual.float() - expected.float()).norm()
    assert difference < ROUNDING[expected.dtype] * expected.float().norm()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("dim", "num_heads"), WIDTHS)
@pytest.mark.parametrize("rows", [1, 37, 2048])
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_equal_their_references(batch: int, rows: int, dim: int, num_heads: int, dtype: torch.dtype) -> None:
    whole = torch.randn(batch, rows + 3, dim, device=DEVICE)
    x = whole[:, 2 : 2 + rows]
    scale, shift, gate = (torch.randn(size, 1, dim, device=DEVICE) for size in (batch, 1, batch))
    for norm_dtype in {torch.float32, dtype}:
        expected = tokens._modulate_reference(x, scale, shift, 1e-6, dtype, norm_dtype)
        same(tokens.modulate(x, scale, shift, 1e-6, dtype, norm_dtype), expected)

    projected, weight = torch.randn(batch, rows, dim, device=DEVICE, dtype=dtype), torch.randn(dim, device=DEVICE)
    head_dim = dim // num_heads
    turns = torch.polar(torch.ones(rows, 1, head_dim // 2), torch.randn(rows, 1, head_dim // 2)).to(DEVICE)
    for positions in (turns, None):
        rooms = torch.zeros(2, batch, rows + 5, num_heads, head_dim, device=DEVICE, dtype=dtype)
        tokens.rms_heads_(projected, weight, positions, 1e-6, rooms[0, :, 1 : 1 + rows])
        real = None if positions is None else torch.view_as_real(positions)
        tokens._rms_heads_reference(rooms[1, :, 1 : 1 + rows], projected, weight, real, 1e-6)
        same(rooms[0], rooms[1])  # and nothing was written outside

    for factor in (gate, None):
        sums = whole.clone(), whole.clone()
        tokens.add_gated_(sums[0][:, 2 : 2 + rows], projected, factor)
        tokens._add_gated_reference(sums[1][:, 2 : 2 + rows], projected, factor)
        torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("num_keys", "repeats"), [(1, 512), (38, 475), (64, 1), (129, 384), (257, 1), (512, 1)])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(12, 128), (3, 64), (2, 24)])
def test_attention_to_few_keys_equals_its_reference(
    num_heads: int, head_dim: int, num_keys: int, repeats: int, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(2, n, num_heads, head_dim, device=DEVICE, dtype=dtype) for n in (777, num_keys, num_keys))
    with sdpa_kernel(SDPBackend.MATH):
        exact = tokens._attend_counted_reference(*(x.double() for x in (q, k, v)), repeats).to(dtype)
    # Weights are rounded to the number format before they are multiplied with the values.
    difference = (tokens.attend_counted(q, k, v, repeats).float() - exact.float()).norm()
    assert difference < 4 * ROUNDING[dtype] * exact.float().norm()


def test_the_gelu_of_sums_is_nearer_to_float32_than_that_of_rounded_ones() -> None:
    x, weight = (torch.randn(shape, device=DEVICE) for shape in ((300, 256), (512, 256)))
    weight, bias = weight / 16, torch.randn(512, device=DEVICE)
    halves = (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    exact = functional.gelu(functional.linear(*(one.float() for one in halves)), approximate="tanh")
    plain = functional.gelu(functional.linear(*halves), approximate="tanh").float()
    elsewhere = torch.empty(300, 512, device=DEVICE, dtype=torch.bfloat16)
    fused = tokens.linear_gelu(*halves).float()
    assert torch.equal(tokens.linear_gelu(*halves, elsewhere).float(), fused)
    assert (fused - exact).norm() < (plain - exact).norm() < 5e-3 * exact.norm()
