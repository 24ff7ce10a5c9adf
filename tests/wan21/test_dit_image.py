"""The transformer of tasks that look at pictures, against diffusers' and by its own promises."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from wan21.dit.model import Dit, ForwardPlan
from wan21.models import DIT_FLF2V_14B, DIT_I2V_14B, DitConfig
from wan21.weights.load import materialize, module_shapes
from wan21.weights.random import RandomSource

I2V = DitConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, in_dim=36, image_dim=80)
NUM_IMAGE_TOKENS = 257
FLF2V = replace(I2V, num_image_positions=2 * NUM_IMAGE_TOKENS)
RELATIVE_L2 = 1e-5  # float32 on both sides; the rest is diffusers' float32 time sinusoid
HALF_RELATIVE_L2 = 5e-3  # bfloat16 rounds to 2^-9, and errors of 3 blocks add up
SAME_ROUNDING = 2e-6  # the same sums over other tile shapes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def model(config: DitConfig, dtype: torch.dtype = torch.float32) -> Dit:
    with torch.device("meta"):
        module = Dit(config, dtype=dtype)
    source = RandomSource("dit", module_shapes(module), 0, torch.Generator().manual_seed)
    materialize(module, source, torch.device("cpu"))
    return module


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures_of(config: DitConfig) -> torch.Tensor:
    return draw(2 if config.num_image_positions else 1, NUM_IMAGE_TOKENS, config.image_dim, seed=2)


def velocity(module: Dit, timestep: float = 500, plan: ForwardPlan | None = None) -> torch.Tensor:
    context = module.embed_pictures(pictures_of(module.config), module.embed_text([draw(17, 64, seed=3)]))
    return module(draw(1, 36, 3, 8, 12), timestep, context, plan=plan or ForwardPlan())


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def to_diffusers(name: str) -> str:
    for ours, theirs in (
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("head.head", "proj_out"),
        ("head.modulation", "scale_shift_table"),
        (".modulation", ".scale_shift_table"),
        (".self_attn.", ".attn1."),
        (".cross_attn.", ".attn2."),
        (".norm_k_img.", ".norm_added_k."),
        (".k_img.", ".add_k_proj."),
        (".v_img.", ".add_v_proj."),
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


@pytest.mark.parametrize("config", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_velocity_equals_diffusers_in_float32(config: DitConfig) -> None:
    from diffusers import WanTransformer3DModel

    module = model(config)
    reference = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=36,
        out_channels=16,
        text_dim=64,
        freq_dim=256,
        ffn_dim=512,
        num_layers=3,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim,
        pos_embed_seq_len=config.num_image_positions or None,
    ).eval()
    reference.load_state_dict({to_diffusers(name): value for name, value in module.state_dict().items()}, strict=True)
    text = torch.zeros(1, 512, 64)
    text[0, :17] = draw(17, 64, seed=3)
    for timestep in (999, 500, 3):
        expected = reference(
            draw(1, 36, 3, 8, 12),
            torch.tensor([timestep]),
            text,
            encoder_hidden_states_image=pictures_of(config),
            return_dict=False,
        )[0]
        assert relative_l2(velocity(module, timestep), expected) < RELATIVE_L2


@pytest.mark.parametrize("config", [I2V, FLF2V], ids=["i2v", "flf2v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(config: DitConfig, dtype: torch.dtype) -> None:
    assert relative_l2(velocity(model(config, dtype)), velocity(model(config))) < HALF_RELATIVE_L2


def test_slices_and_few_rows_at_once_change_no_more_than_rounding() -> None:
    module = model(I2V)
    plan = ForwardPlan(most_queries=24, most_rows=16)
    assert relative_l2(velocity(module, plan=plan), velocity(module)) < SAME_ROUNDING


def test_the_picture_is_looked_at_and_its_positions_count() -> None:
    module = model(FLF2V)
    text, tokens = module.embed_text([draw(17, 64, seed=3)]), pictures_of(FLF2V)
    latents = draw(1, 36, 3, 8, 12)
    one, swapped = (module(latents, 500, module.embed_pictures(given, text)) for given in (tokens, tokens.flip(0)))
    assert relative_l2(swapped, one) > 1e-3


def test_norms_and_positions_of_pictures_stay_float32() -> None:
    with torch.device("meta"):
        module = Dit(FLF2V, dtype=torch.bfloat16)
    names = {
        name
        for name, parameter in module.named_parameters()
        if "img" in name and parameter.dtype == torch.float32 and "blocks" not in name
    }
    norms = {f"img_emb.proj.{index}.{leaf}" for index in (0, 4) for leaf in ("weight", "bias")}
    assert {"img_emb.emb_pos"} | norms == names
    cross: nn.Module = module.get_submodule("blocks.0.cross_attn")
    assert cross.norm_k_img.weight.dtype == torch.float32


@pytest.mark.parametrize(("model_name", "config"), [("i2v-14B", DIT_I2V_14B), ("flf2v-14B", DIT_FLF2V_14B)])
def test_names_and_shapes_are_those_of_the_released_checkpoints(
    checkpoint_shapes: dict[str, dict[str, tuple[int, ...]]], model_name: str, config: DitConfig
) -> None:
    with torch.device("meta"):
        assert checkpoint_shapes[model_name] == module_shapes(Dit(config, dtype=torch.bfloat16))
