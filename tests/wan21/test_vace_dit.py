"""VACE's transformer against diffusers', its order of work against upstream's, and its promises on memory."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.wan21.test_dit import PARITY_RELATIVE_L2, SAME_ROUNDING, SMALL, realistic_, relative_l2, to_diffusers
from wan21.dit.layers import chunk_rows
from wan21.dit.model import Dit, ForwardPlan
from wan21.dit.operations import Operations
from wan21.dit.residual import Windowed
from wan21.dit.vace import Control, VaceBlock
from wan21.errors import UsageError
from wan21.memory.hosted import HostedResidual
from wan21.memory.streaming import StreamPlan, stream
from wan21.models import DitConfig, VaceConfig
from wan21.parts import all_in_parts
from wan21.runtime import CpuRuntime

VACE = replace(SMALL, num_layers=4, vace=VaceConfig(layers=(0, 2)))
HALF_RELATIVE_L2 = 5e-3  # as in test_dit.py
SHAPE = (3, 8, 12)
NUM_TOKENS = 3 * 4 * 6

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def steered(dtype: torch.dtype = torch.float32, config: DitConfig = VACE) -> Dit:
    model = Dit(config, dtype=dtype)
    realistic_(model)
    return model


def inputs(batch: int = 1) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, *SHAPE, generator=generator)
    prompts = [torch.randn(17 + i, SMALL.text_dim, generator=generator) for i in range(batch)]
    return latents, prompts, torch.randn(1, 96, *SHAPE, generator=generator)


def velocity(
    model: Dit,
    *,
    batch: int = 1,
    scale: float = 1.0,
    plan: ForwardPlan | None = None,
    residuals: tuple[Windowed | None, Windowed | None] = (None, None),
) -> torch.Tensor:
    latents, prompts, context = inputs(batch)
    control = Control(context=context, scale=scale, residual=residuals[1])
    return model(
        latents,
        700,
        model.embed_text(prompts),
        plan=plan or ForwardPlan(),
        residual=residuals[0],
        control=control,
    )


def all_hints_first(model: Dit, scale: float) -> torch.Tensor:
    """The order of upstream: every hint is there before the first main block runs."""
    (latents, prompts, context), plan = inputs(), ForwardPlan()
    grid = (SHAPE[0], SHAPE[1] // 2, SHAPE[2] // 2)
    time, turns = model.embed_time(700, latents.device), model.rotations(grid, latents.device)
    shared = (time.modulations, model.embed_text(prompts), turns, plan)
    x = model._patchify(latents, grid, plan, None)
    control = model._begin_control(Control(context=context), x, grid, plan)
    heads = (x.shape[0], x.shape[1], model.config.num_heads, model.config.head_dim)
    room, hints = plan.tokens.room(2, heads, latents.new_empty(0, dtype=model.dtype)), []
    for block in model.vace_blocks:
        nothing = torch.zeros_like(x)
        hint, control = block((nothing, control), *shared, scale, room)
        hints.append(hint)
    for index, block in enumerate(model.blocks):
        x = block(x, *shared, model.dtype if index == 0 else torch.float32, room)
        if index in model.config.vace.layers:
            x.add_(hints[model.config.vace.layers.index(index)])
    patches = model.head(x, time.embedding, chunk_rows(x.shape, plan.most_rows)).to(model.dtype)
    return model._unpatchify(patches, grid)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_velocity_equals_diffusers_in_float32(scale: float) -> None:
    from diffusers import WanVACETransformer3DModel

    model = steered()
    reference = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=256,
        ffn_dim=512,
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=96,
    ).eval()
    names = {"before_proj": "proj_in", "after_proj": "proj_out"}

    def theirs(name: str) -> str:
        for ours, other in names.items():
            name = name.replace(ours, other)
        return to_diffusers(name)

    reference.load_state_dict({theirs(name): value for name, value in model.state_dict().items()}, strict=True)
    latents, prompts, context = inputs()
    padded = torch.zeros(1, 512, 64)
    padded[0, : len(prompts[0])] = prompts[0]
    expected = reference(
        latents,
        torch.tensor([700]),
        padded,
        control_hidden_states=context,
        control_hidden_states_scale=torch.full((2,), scale),
        return_dict=False,
    )[0]
    assert relative_l2(velocity(model, scale=scale), expected) < PARITY_RELATIVE_L2
    assert relative_l2(velocity(model, scale=0.0), expected) > 0.01  # hints matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_blocks_in_step_give_the_bits_of_all_hints_first(dtype: torch.dtype, scale: float) -> None:
    model = steered(dtype)
    assert torch.equal(velocity(model, scale=scale), all_hints_first(model, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    half = steered(dtype)
    full = steered()
    full.load_state_dict(half.state_dict())
    assert relative_l2(velocity(half), velocity(full)) < HALF_RELATIVE_L2


def test_the_control_stream_begins_in_the_compute_dtype() -> None:
    # Upstream adds two bfloat16 tensors there.
    block = steered(torch.bfloat16).vace_blocks[0]
    tokens, own = torch.randn(1, 5, SMALL.dim).bfloat16(), torch.randn(1, 5, SMALL.dim).bfloat16().float()
    begun = block.begin(tokens, own)
    assert begun.dtype == torch.bfloat16
    assert torch.equal(begun, block.before_proj(tokens) + own.bfloat16())


@pytest.mark.parametrize(("queries", "rows"), [(24, 4096), (36, 7)])
def test_slices_and_rows_give_the_same_velocity(queries: int, rows: int) -> None:
    model, plan = steered(), ForwardPlan(most_queries=queries, most_rows=rows)
    assert relative_l2(velocity(model, plan=plan), velocity(model)) < SAME_ROUNDING


def test_videos_of_a_batch_share_the_control_and_do_not_see_each_other() -> None:
    model = steered()
    latents, prompts, context = inputs(2)
    together = velocity(model, batch=2)
    for i in range(2):
        text = model.embed_text(prompts[i : i + 1])
        alone = model(latents[i : i + 1], 700, text, control=Control(context=context))
        assert relative_l2(together[i : i + 1], alone) < SAME_ROUNDING


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_both_streams_may_wait_on_the_host_without_another_bit(share: float) -> None:
    model = steered(torch.bfloat16)
    shape = (1, NUM_TOKENS, SMALL.dim)
    plan = ForwardPlan(most_queries=64, most_rows=64)
    expected = velocity(model, plan=plan)
    runtime = CpuRuntime()
    residuals = HostedResidual(shape, 64, share, runtime), HostedResidual(shape, 64, share, runtime)
    for _ in range(2):
        assert torch.equal(velocity(model, plan=plan, residuals=residuals), expected)


@pytest.mark.parametrize("unit", ["block", "part"])
@pytest.mark.parametrize("resident_share", [0.0, 0.5])
def test_streamed_in_the_order_of_the_run_no_bit_changes(unit: str, resident_share: float) -> None:
    expected_model = steered(torch.bfloat16)
    state = expected_model.state_dict()
    model = steered(torch.bfloat16)
    named = model.sequence()
    names, blocks = list(named), all_in_parts(named.values())
    everything = StreamPlan(blocks, unit, 2**40).device_bytes  # type: ignore[arg-type]
    plan = StreamPlan(blocks, unit, int(resident_share * everything))  # type: ignore[arg-type]

    def write(index: int, leaf: str, to: torch.Tensor, first: int) -> None:
        to.copy_(state[f"{names[index]}.{leaf}"].view(-1)[first : first + to.numel()])

    stream(blocks, plan, write, CpuRuntime())
    for _ in range(2):
        assert torch.equal(velocity(model), velocity(expected_model))


def test_each_block_of_vace_runs_right_behind_the_one_it_steers() -> None:
    model = steered()
    assert list(model.sequence()) == ["blocks.0", "vace_blocks.0", "blocks.1", "blocks.2", "vace_blocks.1", "blocks.3"]
    seen: list[nn.Module] = []
    for block in model.sequence().values():
        block.register_forward_hook(lambda module, *_: seen.append(module))
    velocity(model)
    assert seen == list(model.sequence().values())


class _Counted:
    """The most that stood beside what stood before, in whole streams."""

    def __init__(self, config: DitConfig) -> None:
        self.stream_bytes = 4 * 512 * config.dim
        self.runtime = CpuRuntime()
        model = steered(torch.bfloat16, config)
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 16, 2, 32, 32, generator=generator)
        context = model.embed_text([torch.randn(17, SMALL.text_dim, generator=generator)])
        control = None if config.vace is None else Control(context=torch.zeros(1, 96, 2, 32, 32))
        with self.runtime.counting():
            before = self.runtime.memory().allocated_bytes
            self.runtime.reset_memory_peaks()
            model(latents, 700, context, plan=ForwardPlan(most_queries=64), control=control)
            self.streams = (self.runtime.memory().allocated_peak_bytes - before) / self.stream_bytes


def test_steering_takes_one_stream_however_many_hints_there_are() -> None:
    plain = _Counted(replace(VACE, vace=None)).streams
    few = _Counted(VACE).streams
    many = _Counted(replace(VACE, vace=VaceConfig(layers=(0, 1, 2, 3)))).streams
    assert many == few
    assert 0.9 < few - plain < 1.1


def test_gradients_reach_every_weight_and_equal_those_with_checkpointing() -> None:
    gradients = []
    for recompute in (False, True):
        model = steered()
        with torch.enable_grad():
            loss = velocity(model, scale=0.6, plan=ForwardPlan(gradient_checkpointing=recompute)).square().mean()
        loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert relative_l2(gradients[1], gradients[0]) < SAME_ROUNDING


def test_a_control_is_needed_by_vace_and_by_nothing_else() -> None:
    latents, prompts, context = inputs()
    for model, control in ((steered(), None), (steered(config=SMALL), Control(context=context))):
        with pytest.raises(ValueError, match="control is what VACE's models need and no others take"):
            model(latents, 700, model.embed_text(prompts), control=control)
    with pytest.raises(ValueError, match="before_proj is missing"):
        VaceBlock(VACE, torch.float32, Operations(), is_first=False).begin(latents, latents)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((), "do not ascend from 0"), ((1, 2), "do not ascend"), ((0, 2, 2), "do not ascend"), ((0, 4), "num_layers=4")],
)
def test_layers_that_cannot_be_are_refused(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(VACE, vace=VaceConfig(layers=layers))
