"""The transformer against diffusers' (spec of the mapping in docs/parity.md), and its own promises."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from wan21.dit.model import Dit, ForwardPlan
from wan21.models import DIT_1_3B, DIT_14B, DitConfig

SMALL = DitConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64)
PARITY_RELATIVE_L2 = 1e-5  # float32 on both sides; the rest is diffusers' float32 time sinusoid
HALF_RELATIVE_L2 = 5e-3  # bfloat16 rounds to 2^-9, and errors of 3 blocks add up
SAME_ROUNDING = 2e-6  # the same sums over other tile shapes
GRID_LATENTS = (1, 16, 3, 8, 12)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def realistic_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of the scale that trained ones have; norms away from one, biases away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("modulation"):
            value = noise / parameter.shape[-1] ** 0.5
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.dim() > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)
    return module.eval()


def small(dtype: torch.dtype = torch.float32, config: DitConfig = SMALL) -> Dit:
    model = Dit(config, dtype=dtype)
    realistic_(model)
    return model


def inputs(batch: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, *GRID_LATENTS[1:], generator=generator)
    return latents, [torch.randn(17 + i, SMALL.text_dim, generator=generator) for i in range(batch)]


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def to_diffusers(name: str) -> str:
    for ours, theirs in (
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.head", "proj_out"),
        ("head.modulation", "scale_shift_table"),
        (".modulation", ".scale_shift_table"),
        (".self_attn.", ".attn1."),
        (".cross_attn.", ".attn2."),
        (".q.", ".to_q."),
        (".k.", ".to_k."),
        (".v.", ".to_v."),
        (".o.", ".to_out.0."),
        (".norm3.", ".norm2."),
        (".ffn.0.", ".ffn.net.0.proj."),
        (".ffn.2.", ".ffn.net.2."),
    ):
        name = name.replace(ours, theirs)
    return name


def test_velocity_equals_diffusers_in_float32() -> None:
    from diffusers import WanTransformer3DModel

    model = small()
    reference = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=256,
        ffn_dim=512,
        num_layers=3,
    ).eval()
    reference.load_state_dict({to_diffusers(name): value for name, value in model.state_dict().items()}, strict=True)
    latents, prompts = inputs()
    padded = torch.zeros(1, 512, 64)
    padded[0, : len(prompts[0])] = prompts[0]
    for timestep in (999, 500, 3):
        expected = reference(latents, torch.tensor([timestep]), padded, return_dict=False)[0]
        actual = model(latents, timestep, model.embed_text(prompts))
        assert relative_l2(actual, expected) < PARITY_RELATIVE_L2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    latents, prompts = inputs()
    full, half = small(), small(dtype)
    actual = half(latents, 700, half.embed_text(prompts))
    assert relative_l2(actual, full(latents, 700, full.embed_text(prompts))) < HALF_RELATIVE_L2


def test_velocity_is_rounded_to_the_compute_dtype_as_upstream_does() -> None:
    latents, prompts = inputs()
    model = small(torch.bfloat16)
    velocity = model(latents, 700, model.embed_text(prompts))
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, velocity.bfloat16().float())


def test_norms_modulation_time_and_head_stay_float32() -> None:
    with torch.device("meta"):
        model = Dit(DIT_1_3B, dtype=torch.bfloat16)
    float32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    expected = {
        name
        for name, _ in model.named_parameters()
        if "norm" in name or "modulation" in name or name.startswith(("time_", "head."))
    }
    assert float32 == expected


@pytest.mark.parametrize(("model_name", "config"), [("t2v-1.3B", DIT_1_3B), ("t2v-14B", DIT_14B)])
def test_names_and_shapes_are_those_of_the_checkpoint(
    model_name: str, config: DitConfig, checkpoint_shapes: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    with torch.device("meta"):
        model = Dit(config, dtype=torch.bfloat16)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == checkpoint_shapes[model_name]


@pytest.mark.parametrize("queries", [36, 15, 1])
def test_sliced_attention_gives_the_same_velocity(queries: int) -> None:
    latents, prompts = inputs()
    model = small()
    context = model.embed_text(prompts)
    actual = model(latents, 700, context, plan=ForwardPlan(most_queries=queries))
    assert relative_l2(actual, model(latents, 700, context)) < SAME_ROUNDING


def test_rows_smaller_than_the_video_give_the_same_velocity() -> None:
    latents, prompts = inputs()
    model = small()
    context = model.embed_text(prompts)
    expected = model(latents, 700, context)
    for queries in (None, 24):
        actual = model(latents, 700, context, plan=ForwardPlan(most_queries=queries, most_rows=7))
        assert relative_l2(actual, expected) < SAME_ROUNDING


def test_videos_of_a_batch_do_not_see_each_other() -> None:
    latents, prompts = inputs(batch=2)
    model = small()
    together = model(latents, 700, model.embed_text(prompts))
    for i in range(2):
        alone = model(latents[i : i + 1], 700, model.embed_text(prompts[i : i + 1]))
        assert relative_l2(together[i : i + 1], alone) < SAME_ROUNDING


def test_inputs_are_left_as_they_were() -> None:
    latents, prompts = inputs()
    model = small()
    context = model.embed_text(prompts)
    before = latents.clone(), context.text.clone()
    model(latents, 700, context)
    assert torch.equal(latents, before[0])
    assert torch.equal(context.text, before[1])


def test_gradients_flow_and_equal_those_with_checkpointing_which_keeps_fewer_bytes() -> None:
    latents, prompts = inputs()
    kept, gradients = [], []
    for recompute in (False, True):
        model = small()
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plan = ForwardPlan(gradient_checkpointing=recompute)
            loss = model(latents, 700, model.embed_text(prompts), plan=plan).square().mean()
        kept.append(sum(saved.values()))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].isfinite().all()
    assert gradients[0].norm() > 0
    assert relative_l2(gradients[1], gradients[0]) < SAME_ROUNDING
    assert kept[1] < kept[0] / 2


def test_time_sinusoid_equals_the_golden_numbers(golden: dict[str, object]) -> None:
    table = golden["time_sinusoid"]
    model = small()
    seen: list[torch.Tensor] = []
    model.time_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for timestep in table["t"]:  # type: ignore[index]
        model.embed_time(timestep, torch.device("cpu"))
    actual = torch.cat(seen)[:, table["indices"]]  # type: ignore[index]
    assert torch.allclose(actual, torch.tensor(table["values"]), rtol=0, atol=1e-7)  # type: ignore[index]
