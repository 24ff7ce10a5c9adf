"""What operations allocate on a fake device, against counts made by hand."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from wan21.attention import choose_attention
from wan21.dit.block import Block
from wan21.dit.context import Context
from wan21.dit.layers import Slicing
from wan21.dit.operations import Operations
from wan21.kernels import vae_ops
from wan21.models import MODELS, DitConfig
from wan21.options import AttentionKernel
from wan_sweep.allocator import Settings
from wan_sweep.cards import Card, card_named
from wan_sweep.estimate import calibrate
from wan_sweep.estimate.dry_run import Simulation
from wan_sweep.estimate.kernel_table import row_for, rows
from wan_sweep.estimate.kernels import heard_convolutions, signature
from wan_sweep.estimate.memory import Take
from wan_sweep.units import MIB

BF16, FP32 = torch.bfloat16, torch.float32
HEADS, LENGTH, WIDTH = 4, 96, 64
CUDNN_BYTES = 8 + 8 + 256
"""Of cuDNN's attention besides the result: a seed, an offset, and what it works in (an H200, 2026-12-01)."""


@pytest.fixture(params=["H100-80GB", "RTX4090-24GB"])
def card(request: pytest.FixtureRequest) -> Card:
    return card_named(request.param)


@pytest.fixture
def simulation(card: Card) -> Iterator[Simulation]:
    simulation = Simulation(card, Settings())
    with simulation.running():
        simulation.runtime.warm_up()
        yield simulation


def peak_and_rest(simulation: Simulation, call: Callable[[], object]) -> tuple[int, int]:
    """Requested bytes at the highest point inside the call, and those of its result, over what stood before."""
    runtime = simulation.runtime
    runtime.reset_memory_peaks()
    before = runtime.memory().requested_bytes
    result = call()
    memory = runtime.memory()
    assert result is not None
    return memory.requested_peak_bytes - before, memory.requested_bytes - before


def tensor(simulation: Simulation, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=simulation.device)


def test_warm_up_leaves_the_workspaces_of_cublas_and_nothing_else(simulation: Simulation, card: Card) -> None:
    cublas = 32 * MIB if card.name == "H100-80GB" else 8_519_680
    assert simulation.runtime.memory().requested_bytes == cublas + MIB  # and that of cuBLASLt


def test_cublas_takes_a_workspace_for_each_stream_once(simulation: Simulation, card: Card) -> None:
    a = tensor(simulation, 64, 64)
    stream = simulation.runtime.side_stream()
    with stream.context():
        first = peak_and_rest(simulation, lambda: a @ a)
        with_bias = peak_and_rest(simulation, lambda: functional.linear(a, a, a[0]))
        second = peak_and_rest(simulation, lambda: functional.linear(a, a, a[0]))
    assert first == (a.nbytes + card.cublas_workspace_bytes,) * 2
    assert with_bias == (a.nbytes + MIB,) * 2
    assert second == (a.nbytes, a.nbytes)


@pytest.mark.parametrize(("width", "dtype"), [(64, BF16), (128, torch.float16), (384, BF16), (128, FP32), (384, FP32)])
def test_attention_takes_its_result_and_what_the_kernel_of_the_card_keeps(
    simulation: Simulation, card: Card, width: int, dtype: torch.dtype
) -> None:
    q, k, v = (tensor(simulation, 1, LENGTH, HEADS, width, dtype=dtype).transpose(1, 2) for _ in range(3))
    peak, rest = peak_and_rest(simulation, lambda: functional.scaled_dot_product_attention(q, k, v))
    rows = HEADS * LENGTH
    if dtype == FP32:
        beside = 0  # memory-efficient, and sums in the result itself
    elif width > 256:
        beside = 4 * rows * width  # memory-efficient: sums in float32 do not fit into registers
    else:
        beside = CUDNN_BYTES if card.name == "H100-80GB" else 4 * rows  # flash: one log-sum-exp a row
    assert rest == rows * width * dtype.itemsize
    assert peak == rest + beside


@pytest.mark.parametrize(
    ("kernel", "beside"),
    [("cudnn", CUDNN_BYTES), ("flash", 4 * HEADS * LENGTH), ("fa3", 4 * HEADS * LENGTH)],
)
def test_a_kernel_that_is_asked_for_is_the_one_that_is_counted(
    simulation: Simulation, kernel: AttentionKernel, beside: int
) -> None:
    q, k, v = (tensor(simulation, 1, LENGTH, HEADS, WIDTH) for _ in range(3))
    peak, rest = peak_and_rest(simulation, lambda: choose_attention(kernel)(q, k, v))
    assert rest == q.nbytes
    assert peak == rest + beside


def test_flash_attention_3_takes_what_was_measured_and_is_a_guess_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h100 = card_named("H100-80GB")
    row = replace(row_for(h100)[0], fa3_bytes_per_row=12)
    monkeypatch.setattr("wan_sweep.estimate.kernel_table.rows", lambda: (row,))
    simulation = Simulation(h100, Settings())
    taken: list[Take] = []
    simulation.memory.listeners.append(lambda event: taken.append(event) if isinstance(event, Take) else None)
    with simulation.running():
        q = tensor(simulation, 1, LENGTH, HEADS, WIDTH)
        choose_attention("fa3")(q, q, q)
    assert [(one.holding.num_bytes, one.holding.basis) for one in taken][1:] == [
        (q.nbytes, "exact"),
        (12 * HEADS * LENGTH, "table"),
    ]


def test_heads_of_attention_can_be_joined_without_a_copy(simulation: Simulation) -> None:
    q = tensor(simulation, 1, LENGTH, HEADS, WIDTH).transpose(1, 2)
    out = functional.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape
    assert peak_and_rest(simulation, lambda: out.transpose(1, 2).flatten(2)) == (0, 0)


def test_the_rms_norm_is_one_kernel_with_a_float32_a_row(simulation: Simulation) -> None:
    x = tensor(simulation, 1, LENGTH, WIDTH, dtype=FP32)
    peak, rest = peak_and_rest(simulation, lambda: functional.rms_norm(x, (WIDTH,), eps=1e-6))
    assert (peak, rest) == (x.nbytes + 4 * LENGTH, x.nbytes)


def test_the_layer_norm_copies_rows_that_do_not_lie_together(simulation: Simulation) -> None:
    whole = tensor(simulation, 2, LENGTH, WIDTH, dtype=FP32)
    rows = whole[:, : LENGTH // 2]
    num_bytes, statistics = rows.numel() * 4, 2 * 4 * LENGTH
    peak, rest = peak_and_rest(simulation, lambda: functional.layer_norm(rows, (WIDTH,)))
    assert (peak, rest) == (2 * num_bytes + statistics, num_bytes)
    peak, _ = peak_and_rest(simulation, lambda: functional.layer_norm(whole, (WIDTH,)))
    assert peak == whole.nbytes + 2 * statistics


def test_linear_adds_its_bias_in_place_whatever_the_input_looks_like(simulation: Simulation) -> None:
    weight, bias = tensor(simulation, WIDTH, WIDTH), tensor(simulation, WIDTH)
    together = tensor(simulation, 2, LENGTH, WIDTH)
    apart = tensor(simulation, 2, 2 * LENGTH, WIDTH)[:, :LENGTH]
    product = together.nbytes
    assert peak_and_rest(simulation, lambda: functional.linear(together, weight)) == (product, product)
    assert peak_and_rest(simulation, lambda: functional.linear(together, weight, bias)) == (product, product)
    # A product for each video, and the bias is added into it.
    assert peak_and_rest(simulation, lambda: functional.linear(apart, weight, bias)) == (product, product)


def test_products_of_two_formats_take_the_wider_one_and_no_cast_copy(simulation: Simulation) -> None:
    half, single = tensor(simulation, LENGTH, WIDTH), tensor(simulation, LENGTH, WIDTH, dtype=FP32)
    assert peak_and_rest(simulation, lambda: half * single) == (single.nbytes, single.nbytes)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_convolution_in_channels_last_order_copies_its_weight_alone(
    simulation: Simulation, dtype: torch.dtype
) -> None:
    x = tensor(simulation, 1, 8, 6, 18, 34, dtype=dtype).to(memory_format=torch.channels_last_3d)
    weight, bias = tensor(simulation, 16, 8, 3, 3, 3, dtype=dtype), tensor(simulation, 16, dtype=dtype)
    peak, rest = peak_and_rest(simulation, lambda: functional.conv3d(x, weight, bias))
    assert rest == 16 * 4 * 16 * 32 * dtype.itemsize
    assert peak == rest + weight.nbytes


@pytest.mark.parametrize(("num_taps", "num_copies"), [(3, 0), (1, 1)])
def test_our_decoders_convolution_copies_those_taps_of_a_weight_that_do_not_lie_together(
    simulation: Simulation, num_taps: int, num_copies: int
) -> None:
    all_taps = tensor(simulation, 96, 96, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    weight, bias = all_taps[:, :, -num_taps:], tensor(simulation, 96)
    window = [tensor(simulation, 1, 96, 8, 8).to(memory_format=torch.channels_last) for _ in range(num_taps)]
    out = tensor(simulation, 1, 96, 1, 8, 8)

    def call() -> torch.Tensor:
        vae_ops.conv(window, weight, bias, None, out, [], 0, 0, adds=False, upsamples=False)
        return out

    assert peak_and_rest(simulation, call) == (96 * 96 * 9 * 2 * num_copies, 0)


def test_a_convolution_in_contiguous_order_copies_input_weight_and_result(simulation: Simulation) -> None:
    x, weight = tensor(simulation, 1, 8, 6, 18, 34), tensor(simulation, 16, 8, 3, 3, 3)
    peak, rest = peak_and_rest(simulation, lambda: functional.conv3d(x, weight))
    assert peak == 2 * rest + x.nbytes + weight.nbytes


def test_a_convolution_copies_an_input_with_gaps(simulation: Simulation) -> None:
    whole = tensor(simulation, 1, 8, 6, 18, 34).to(memory_format=torch.channels_last_3d)
    x, weight = whole[..., 1:], tensor(simulation, 16, 8, 1, 1, 1)
    peak, rest = peak_and_rest(simulation, lambda: functional.conv3d(x, weight))
    assert peak == rest + 8 * 6 * 18 * 33 * 2


# Measured on an H200 (torch 2.11, cuDNN 9.19, 2026-12-01). Inputs with gaps are crops of a tile.
@pytest.mark.parametrize(
    ("dtype", "num_frames", "size", "row_elements", "measured"),
    [
        (FP32, 1, (480, 832), 832 * 96, 153_374_992),
        (BF16, 1, (480, 832), 832 * 96, 10_384),
        (FP32, 6, (480, 832), 832 * 96, 920_187_664),
        (BF16, 6, (480, 832), 832 * 96, 25_616_080),
        (BF16, 6, (241, 321), 321 * 96, 5_008_144),
        (BF16, 1, (241, 321), 322 * 96, 14_863_696),
        (FP32, 1, (361, 257), 258 * 96, 71_273_488),
    ],
)
def test_the_decoders_last_convolution_takes_what_was_measured(
    simulation: Simulation, dtype: torch.dtype, num_frames: int, size: tuple[int, int], row_elements: int, measured: int
) -> None:
    height, width = size
    frame = height * row_elements
    lying = (96, num_frames, height, width), (1, frame, row_elements, 96)
    x = torch.empty_strided((1, *lying[0]), (num_frames * frame, *lying[1]), dtype=dtype, device=simulation.device)
    weight = tensor(simulation, 3, 96, 3, 3, 3, dtype=dtype)[:, :, -min(3, num_frames) :]
    peak, rest = peak_and_rest(simulation, lambda: functional.conv3d(x, weight, padding=(0, 1, 1)))
    assert peak - rest == measured


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("num_axes", [2, 3])
def test_convolutions_have_the_shape_and_layout_of_real_ones(
    simulation: Simulation, num_axes: int, padding: int, stride: int
) -> None:
    convolve = functional.conv2d if num_axes == 2 else functional.conv3d
    last = torch.channels_last if num_axes == 2 else torch.channels_last_3d
    shape = (2, 4, *(7, 10, 12)[:num_axes])
    fake = convolve(
        tensor(simulation, *shape).to(memory_format=last),
        tensor(simulation, 8, 4, *[3] * num_axes),
        stride=stride,
        padding=padding,
    )
    on_host = convolve(
        torch.empty(shape, dtype=FP32).to(memory_format=last),
        torch.empty(8, 4, *[3] * num_axes, dtype=FP32),
        stride=stride,
        padding=padding,
    )
    assert fake.shape == on_host.shape
    assert fake.is_contiguous(memory_format=last)


DIT: DitConfig = MODELS["tiny"].dit


@pytest.mark.parametrize("num_tokens", [1024, 8192])
def test_a_transformer_block_peaks_where_a_count_by_hand_says(simulation: Simulation, num_tokens: int) -> None:
    dim, rows = DIT.dim, num_tokens // 8  # so many tokens at a time
    with torch.device(simulation.device):
        block = Block(DIT, BF16, Operations())
    residual = tensor(simulation, 1, num_tokens, dim, dtype=FP32)
    time = tensor(simulation, 1, 6, dim, dtype=FP32)
    context = Context(tensor(simulation, 1, 128, dim))
    turns = tensor(simulation, num_tokens, 1, DIT.head_dim // 2, dtype=torch.complex64)
    room = tensor(simulation, 2, 1, num_tokens, DIT.num_heads, DIT.head_dim)
    peak, rest = peak_and_rest(
        simulation, lambda: block(residual, time, context, turns, Slicing(most_rows=rows), BF16, room)
    )
    modulation = 7 * dim * 4  # six, and one plus a scale
    queries = num_tokens * dim * 2
    # The last rows: normed input, value, projection and norm of the query in bfloat16, key and turned query in float32.
    projecting = rows * dim * (4 * 2 + 2 * 4)
    # Or attention itself, whose queries are as long as its result; flash takes a float32 for each row and head as well.
    is_flash = simulation.card.name != "H100-80GB"
    attending = queries + (num_tokens * DIT.num_heads * 4 if is_flash else CUDNN_BYTES)
    assert peak == modulation + queries + max(projecting, attending)
    assert rest == 0


def test_a_convolution_that_was_measured_takes_what_the_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = card_named("H100-80GB")
    row, _ = row_for(h100)
    shape, weight_shape = (1, 8, 6, 18, 34), (16, 8, 3, 3, 3)
    x, weight = (torch.empty(shape, device="meta"), torch.empty(weight_shape, device="meta"))
    key = signature([x, weight, None, [1, 1, 1], [0, 0, 0]])
    replace(row, convolutions={key: 12_345}).save(tmp_path)
    (saved,) = rows(tmp_path)
    assert saved.convolutions == {key: 12_345}
    monkeypatch.setattr("wan_sweep.estimate.kernel_table.rows", lambda: (saved,))
    simulation = Simulation(h100, Settings())
    with simulation.running(), heard_convolutions() as heard:
        fake_x, fake_weight = tensor(simulation, *shape, dtype=FP32), tensor(simulation, *weight_shape, dtype=FP32)
        peak, rest = peak_and_rest(simulation, lambda: functional.conv3d(fake_x, fake_weight))
    assert peak == rest + 12_345
    assert heard[key]["input"] == list(shape)
    assert heard[key]["weight_strides"] == list(weight.stride())


def test_the_shipped_tables_are_read_and_there_is_one_of_the_default_card() -> None:
    assert row_for(card_named("H100-80GB"))[1]
    assert not row_for(card_named("RTX4060-8GB"))[1]
    assert all(row.context_bytes > 2**29 for row in rows())


@pytest.mark.parametrize(
    ("channels", "dtype", "few"),
    [(3, "float32", True), (3, "bfloat16", True), (4, "float32", False), (96, "bfloat16", False)],
)
def test_tiles_are_measured_where_channels_do_not_divide_by_what_is_read_at_once(
    channels: int, dtype: str, *, few: bool
) -> None:
    assert calibrate.has_few_channels(channels, dtype) == few


def test_calibrating_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert calibrate.main([]) == 2
    assert "there is no GPU to calibrate on" in capsys.readouterr().err
