"""Weights and products in eight bits: how far they are from what they stand for, and what they take."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.wan21.test_dit import GRID_LATENTS, relative_l2
from wan21.attention import attend
from wan21.components import Components
from wan21.dit.fp8 import Fp8Operations
from wan21.dit.linear import ScaledLinear, store_in_eight_bits
from wan21.dit.model import Dit, ForwardPlan
from wan21.dit.operations import FusedOperations, Operations
from wan21.errors import UsageError
from wan21.events import SILENT
from wan21.kernels import fp8, tokens
from wan21.layout import Layout
from wan21.memory.packing import Packing
from wan21.models import model_spec
from wan21.options import Options, check_capability, check_device
from wan21.parallel.world import World
from wan21.runtime import CpuRuntime
from wan21.weights import source as staging
from wan21.weights.components import Source
from wan21.weights.fp8 import ScaledSource
from wan21.weights.load import materialize, parameter_bytes
from wan21.weights.random import RandomWeights

TINY = model_spec("tiny")
NEAREST = 2**-4  # e4m3 has three bits behind the first, so it rounds by 2^-4 of a number at most
FROM_WEIGHTS = 0.024  # of the velocity, relative; seen 0.0158
FROM_PRODUCTS = 0.032  # seen 0.0212
FROM_INT8 = 0.008  # seen 0.0042 in float32, 0.0058 in bf16


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> RandomWeights:
    return RandomWeights(TINY, 3, CpuRuntime().generator)


def components(**options: Any) -> Components:
    runtime = CpuRuntime()
    chosen = Options(precision="bf16", **options)
    return Components(TINY, chosen, RandomWeights(TINY, 3, runtime.generator), runtime, SILENT, World())


def make(operations: Operations, dtype: torch.dtype, *, scaled: bool, stored: torch.dtype = fp8.FP8) -> Dit:
    with torch.device("meta"):
        model = Dit(TINY.dit, dtype=dtype, operations=operations)
        names = store_in_eight_bits(model.sequence(), stored) if scaled else []
    materialize(model, ScaledSource(weights().dit(), names, torch.device("cpu"), stored), torch.device("cpu"))
    return model


def forward(model: Dit, batch: int = 1, **plan: Any) -> torch.Tensor:
    latents, prompts = drawn(batch, *GRID_LATENTS[1:], seed=1), [drawn(17, TINY.dit.text_dim, seed=2)] * batch
    return model(latents, 700, model.embed_text(prompts), plan=ForwardPlan(**plan))


def test_rows_in_int8_are_within_half_a_step_and_their_largest_number_is_told() -> None:
    x = drawn(6, 50) * 10.0 ** torch.arange(-3, 3).view(-1, 1)
    x[2] = 0
    rows = fp8.scale_rows_(x.clone(), torch.int8)
    assert (rows.values.dtype, rows.scale.shape) == (torch.int8, (6, 1))
    half_a_step = x.abs().amax(-1, keepdim=True) / fp8.INT8_LARGEST / 2
    assert ((rows.values * rows.scale - x).abs() <= half_a_step * (1 + 1e-5)).all()
    assert rows.values.abs().amax(-1).tolist() == [127, 127, 0, 127, 127, 127]


def test_rows_in_eight_bits_are_within_the_formats_rounding() -> None:
    x = drawn(64, 512) * torch.logspace(-20, 20, 64).unsqueeze(1)
    rows = fp8.quantize_rows(x.unsqueeze(0))
    standing_for = (rows.values.float() * rows.scale)[0]
    is_normal = x.abs() > rows.scale[0] * 2.0**-6
    assert ((standing_for - x).abs() <= NEAREST * x.abs())[is_normal].all()
    assert ((standing_for - x).abs() <= rows.scale[0] * 2.0**-10 * 1.01)[~is_normal].all()
    assert (rows.values.float().abs().amax(-1) == fp8.LARGEST).all()


def test_a_row_of_zeros_stays_zero_and_no_number_stays_none() -> None:
    rows = fp8.quantize_rows(torch.tensor([[[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0]]]))
    standing_for = (rows.values.float() * rows.scale)[0]
    assert torch.equal(standing_for[0], torch.zeros(2))
    assert standing_for[1, 1].isnan()
    assert not standing_for[2].isfinite().any()


def test_quantising_kernels_do_what_the_plain_ones_do_first() -> None:
    x, scale, shift = drawn(2, 5, 32), drawn(2, 1, 32, seed=1), drawn(1, 1, 32, seed=2)
    for norm_dtype in (torch.float32, torch.bfloat16):
        plain = tokens.modulate(x, scale, shift, 1e-6, torch.float32, norm_dtype)
        fused = fp8.modulate(x, scale, shift, 1e-6, norm_dtype)
        assert all(torch.equal(*pair) for pair in zip(fused, fp8.quantize_rows(plain), strict=True))
    hidden = nn.functional.gelu(x, approximate="tanh")
    assert all(torch.equal(*pair) for pair in zip(fp8.gelu(x), fp8.quantize_rows(hidden), strict=True))


def test_attention_of_quantised_heads_is_near_that_of_what_they_stand_for() -> None:
    """The algebra of the means, without rounding: keys shifted alike, and the mean of the values added again."""
    q, k, v = (drawn(2, 70, 3, 16, seed=i) + (3 if i else 0) for i in range(3))
    k, v = k + drawn(2, 1, 3, 16, seed=4), v + drawn(2, 1, 3, 16, seed=5)
    quantised = []
    for x, centred in ((q, False), (k, True), (v, True)):
        values, scale, mean = fp8.quantize_heads(x, centred=centred)
        assert (values.dtype, scale.shape) == (fp8.FP8, (2, 3))
        assert (values.float().abs().amax((1, 3)) == fp8.LARGEST).all()
        quantised.append(values.float() * scale[:, None, :, None])
        torch.testing.assert_close(mean, centred * x.mean(1, keepdim=True))
    expected = attend(q, k, v)
    actual = attend(*quantised).unflatten(-1, (3, 16)) + mean
    plain = attend(*(fp8.quantize_heads(x)[0].float() * fp8.quantize_heads(x)[1][:, None, :, None] for x in (q, k, v)))
    assert relative_l2(actual.flatten(2), expected) < 0.5 * relative_l2(plain, expected) < NEAREST


class Given(Source):
    """Tensors that are there."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self.tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        destination.copy_(self.tensors[name].view(-1)[first : first + destination.numel()])


@pytest.mark.parametrize("stored", [fp8.FP8, torch.int8])
@pytest.mark.parametrize("staging_bytes", [staging.STAGING_BYTES, 999, 1])
def test_any_stretch_of_a_source_is_what_quantising_the_whole_gives(
    staging_bytes: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "STAGING_BYTES", staging_bytes)
    num_rows, width = 24, 40
    weight, bias = drawn(num_rows, width), drawn(num_rows, seed=1)
    expected = fp8.scale_rows_(weight.clone(), stored)
    source = ScaledSource(Given(weight=weight, bias=bias), ["weight"], torch.device("cpu"), stored)
    assert source.shapes() == {"weight": (num_rows, width), "bias": (num_rows,), "weight_scale": (num_rows, 1)}

    def part(name: str, first: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        destination = torch.empty(stop - first, dtype=dtype)
        source.write_part(name, destination, first)
        return destination.float()

    for first, stop in ((2, 4), (3, 20), (0, num_rows)):  # the scales before the weight, between, and after
        assert torch.equal(part("weight_scale", first, stop), expected.scale[first:stop, 0])
        for begin, end in ((0, 1), (5, width), (width - 3, 2 * width + 7), (3 * width, num_rows * width)):
            values = expected.values.view(-1)[begin:end].float()
            assert torch.equal(part("weight", begin, end, stored), values)
    assert torch.equal(part("bias", 3, 9), bias[3:9])


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_shares_of_packed_blocks_put_together_are_the_whole(num_shares: int) -> None:
    with torch.device("meta"):
        model = Dit(TINY.dit, dtype=torch.bfloat16)
        names = store_in_eight_bits(model.sequence())
    parameters = {name: p for name, p in model.named_parameters() if name.startswith("blocks.2.")}
    packing = Packing(parameters, num_shares)
    buffer = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for share in buffer.chunk(num_shares):  # each process has a source of its own
        source = ScaledSource(weights().dit(), names, torch.device("cpu"))
        packing.fill_share(share, share.data_ptr() - buffer.data_ptr(), source.write_part)
    resident = make(Operations(), torch.bfloat16, scaled=True).state_dict()
    for name, view in packing.views(buffer).items():
        assert torch.equal(view.float(), resident[name].float())


@pytest.mark.parametrize("strategy", [{}, {"load_strategy": "block"}, {"load_strategy": "part", "resident_gib": 0.001}])
@pytest.mark.parametrize(("name", "stored"), [("fp8_weights", fp8.FP8), ("int8_weights", torch.int8)])
def test_a_scaled_forward_is_the_same_however_weights_come(
    name: Any, stored: torch.dtype, strategy: dict[str, Any]
) -> None:
    loaded = components(linear_format=name, **strategy).dit()
    with loaded.with_parked():
        actual = forward(loaded.module)
    assert torch.equal(actual, forward(make(Operations(), torch.bfloat16, scaled=True, stored=stored)))


def test_nothing_of_a_source_stays_when_it_is_closed() -> None:
    runtime = CpuRuntime()
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        with ScaledSource(Given(weight=drawn(24, 40)), ["weight"], torch.device("cpu")) as source:
            destination = torch.empty(24, 40, dtype=fp8.FP8)
            source.write("weight", destination)
            del source._source.tensors["weight"]
        assert runtime.memory().allocated_bytes - before == destination.numel()


def linear_bytes(model: Dit) -> int:
    return sum(
        parameter_bytes(layer) for layer in model.blocks.modules() if isinstance(layer, (nn.Linear, ScaledLinear))
    )


@pytest.mark.parametrize("stored", ["fp8_weights", "int8_weights"])
def test_linear_layers_take_half_the_bytes_and_a_scale_a_row(stored: str) -> None:
    plain, scaled = (components(linear_format=name).dit().module for name in ("same", stored))
    dim, ffn_dim, num_layers = TINY.dit.dim, TINY.dit.ffn_dim, TINY.dit.num_layers
    num_rows = num_layers * (9 * dim + ffn_dim)
    num_weights = num_layers * (8 * dim * dim + 2 * dim * ffn_dim)
    assert linear_bytes(plain) == 2 * num_weights + 2 * num_rows
    assert linear_bytes(scaled) == num_weights + (4 + 2) * num_rows
    assert parameter_bytes(plain) - parameter_bytes(scaled) == linear_bytes(plain) - linear_bytes(scaled)


def test_a_widened_weight_stands_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan21.dit import linear

    with torch.device("meta"):
        layer = ScaledLinear(nn.Linear(64, 48, dtype=torch.bfloat16))
    layer.to_empty(device="cpu")
    values, scale = fp8.scale_rows_(drawn(48, 64))
    layer.weight.data, layer.weight_scale.data, layer.bias.data = values, scale, drawn(48, seed=1).bfloat16()
    x = drawn(2, 7, 64, seed=2).bfloat16()
    whole = layer(x)
    assert (
        relative_l2(whole.float(), nn.functional.linear(x.float(), values.float() * scale, layer.bias.float())) < 5e-3
    )
    for num_bytes in (1, 1000, 5 * 64 * 2):
        monkeypatch.setattr(linear, "WIDENED_BYTES", num_bytes)
        torch.testing.assert_close(layer(x), whole)
    with torch.enable_grad():
        x.requires_grad_()
        torch.testing.assert_close(layer(x).detach(), whole)
        layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("operations", "dtype", "stored", "tolerance"),
    [
        (Operations, torch.float32, fp8.FP8, FROM_WEIGHTS),
        (Operations, torch.bfloat16, fp8.FP8, FROM_WEIGHTS),
        (FusedOperations, torch.bfloat16, fp8.FP8, FROM_WEIGHTS),
        (Fp8Operations, torch.bfloat16, fp8.FP8, FROM_PRODUCTS),
        (Operations, torch.float32, torch.int8, FROM_INT8),
        (FusedOperations, torch.bfloat16, torch.int8, FROM_INT8),
    ],
)
@pytest.mark.parametrize(("batch", "plan"), [(1, {}), (2, {"most_queries": 24, "most_rows": 64})])
def test_a_forward_in_eight_bits_is_near_the_one_in_float32(
    operations: type[Operations],
    dtype: torch.dtype,
    stored: torch.dtype,
    tolerance: float,
    batch: int,
    plan: dict[str, int],
) -> None:
    expected = forward(make(Operations(), torch.float32, scaled=False), batch)
    distance = relative_l2(forward(make(operations(), dtype, scaled=True, stored=stored), batch, **plan), expected)
    assert tolerance / 4 < distance < tolerance  # and it is another number


def test_operators_have_shapes_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, one = torch.empty(2, 3, 32), torch.empty(1, 1, 32)
        for rows in (fp8.modulate(x, one, one, 1e-6, torch.float32), fp8.quantize_rows(x), fp8.gelu(x)):
            assert (rows.values.shape, rows.values.dtype, rows.scale.shape) == (x.shape, fp8.FP8, (2, 3, 1))
        weight = fp8.ScaledRows(torch.empty(16, 32, dtype=fp8.FP8), torch.empty(16, 1))
        result = fp8.scaled_linear(rows, weight, torch.empty(16, dtype=torch.bfloat16))
        values, scale, mean = fp8.quantize_heads(x.view(2, 3, 4, 8), centred=True)
    assert (result.shape, result.dtype) == ((2, 3, 16), torch.bfloat16)
    assert (values.shape, values.dtype, scale.shape) == ((2, 3, 4, 8), fp8.FP8, (2, 4))
    assert mean.shape == (2, 1, 4, 8)


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        ({"linear_format": "fp8"}, "cpu", "not on device=cpu; choose linear_format=fp8_weights"),
        ({"linear_format": "fp8", "precision": "bf16"}, "cuda", "kernels=torch has none; choose kernels=fused"),
        ({"linear_format": "fp8", "kernels": "fused", "precision": "fp16"}, "cuda", "choose precision=bf16, or linear"),
        ({"attention_kernel": "fa3_fp8", "precision": "fp16"}, "cuda", "attention_kernel=fa3_fp8 cannot compute in"),
        ({"attention_kernel": "fa3_fp8"}, "cpu", "attention_kernel=fa3_fp8 runs on an NVIDIA GPU"),
    ],
)
def test_what_a_device_cannot_do_in_eight_bits_is_refused_by_name(
    options: dict[str, Any], device: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        check_device(Options(**options), device)


def test_weights_in_eight_bits_run_on_any_device() -> None:
    options = Options(linear_format="fp8_weights")
    check_device(options, "cpu")
    check_capability(options, (7, 5))


@pytest.mark.parametrize(
    ("options", "capability", "words"),
    [
        ({"linear_format": "fp8"}, (8, 6), "compute capability 8.9 or higher, and this one has compute capability 8.6"),
        ({"attention_kernel": "fa3_fp8"}, (10, 0), "attention_kernel=fa3_fp8 needs a Hopper GPU"),
        ({"attention_kernel": "fa3"}, (8, 9), "attention_kernel=fa3 needs a Hopper GPU"),
    ],
)
def test_gpus_without_the_units_are_refused_by_name(
    options: dict[str, Any], capability: tuple[int, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        check_capability(Options(**options), capability)
    check_capability(Options(**options), (9, 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear_format": "int8"}, "linear_format=int8 is not known; choose same, fp8, fp8_weights"),
        ({"linear_format": "fp8_weights", "layout": Layout(dit_fsdp=True)}, "choose load_strategy=block"),
        ({"attention_kernel": "fa3_fp8", "layout": Layout(ring=2)}, "attention_kernel=fa3_fp8 does not tell its"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options(**options)
