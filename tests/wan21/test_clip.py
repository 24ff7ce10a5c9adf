"""CLIP's image tower against transformers', and what it is given of a picture."""

from collections.abc import Iterator

import pytest
import torch

from wan21.clip.model import ImageEncoder
from wan21.clip.preprocess import MEAN, STD, preprocess
from wan21.models import ClipConfig
from wan21.weights.load import materialize
from wan21.weights.random import RandomSource

SMALL = ClipConfig(dim=160, ffn_dim=320, num_heads=2, num_layers=6, image_size=56, text_dim=32)
RELATIVE_L2 = 1e-6  # float32 on both sides: the same sums, the attention's in another order
BICUBIC = 1e-4  # torch has positions in float32: 6e-6 of 90 pixels, between neighbours that differ by up to 5
HALF_RELATIVE_L2 = 2e-3  # float16 rounds to 2^-11, five blocks in a row

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoder(dtype: torch.dtype = torch.float32) -> ImageEncoder:
    with torch.device("meta"):
        module = ImageEncoder(SMALL, dtype=dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    materialize(module, RandomSource("clip", shapes, 3, torch.Generator().manual_seed), torch.device("cpu"))
    return module


def pixels(num_pictures: int = 2) -> torch.Tensor:
    return torch.randn(num_pictures, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        if name == "head":
            continue
        for ours, theirs in (
            ("cls_embedding", "embeddings.class_embedding"),
            ("pos_embedding", "embeddings.position_embedding.weight"),
            ("patch_embedding", "embeddings.patch_embedding"),
            ("pre_norm", "pre_layrnorm"),
            ("post_norm", "post_layernorm"),
            ("transformer", "encoder.layers"),
            (".norm", ".layer_norm"),
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
        ):
            name = name.replace(ours, theirs)  # noqa: PLW2901 # step by step
        if "to_qkv" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.to_qkv", f"self_attn.{part}_proj")] = third
        else:
            renamed[name] = value.flatten() if name.endswith("class_embedding") else value
    renamed["embeddings.position_embedding.weight"] = renamed["embeddings.position_embedding.weight"][0]
    return renamed


def test_tokens_equal_transformers_in_float32() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    ours = encoder()
    reference = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=SMALL.dim,
            intermediate_size=SMALL.ffn_dim,
            num_hidden_layers=SMALL.num_layers,
            num_attention_heads=SMALL.num_heads,
            image_size=SMALL.image_size,
            patch_size=SMALL.patch_size,
            hidden_act="gelu",
        )
    ).eval()
    names = reference.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    state = {f"{prefix}{name}": value for name, value in to_transformers(ours.state_dict()).items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing)
    expected = reference(pixels(), output_hidden_states=True).hidden_states[-2]
    actual = ours(pixels())
    assert tuple(actual.shape) == (2, SMALL.num_tokens, SMALL.dim)
    assert relative_l2(actual, expected) < RELATIVE_L2


def test_what_is_never_read_can_be_dropped() -> None:
    whole, dropped = encoder(), encoder()
    dropped.drop_unread()
    assert torch.equal(dropped(pixels()), whole(pixels()))
    gone = set(whole.state_dict()) - set(dropped.state_dict())
    assert {name.split(".")[0] for name in gone} == {"transformer", "post_norm", "head"}
    assert all(name.startswith("transformer.5.") for name in gone if name.startswith("transformer"))


def test_half_precision_stays_near_float32() -> None:
    half = encoder(torch.float16)(pixels())
    assert half.dtype == torch.float16
    assert relative_l2(half, encoder()(pixels())) < HALF_RELATIVE_L2


def cubic(distance: float) -> float:
    """The kernel of bicubic interpolation with a = -0.75, which is torch's."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def stretched(length: int, size: int) -> torch.Tensor:
    """The matrix [size, length] of bicubic interpolation without antialiasing, edges repeated, in float64."""
    matrix = torch.zeros(size, length, dtype=torch.float64)
    for row in range(size):
        centre = (row + 0.5) * length / size - 0.5
        first = int(centre // 1) - 1
        for column in range(first, first + 4):
            matrix[row, min(max(column, 0), length - 1)] += cubic(centre - column)
    return matrix


def test_a_picture_is_squeezed_bicubically_without_smoothing_or_crop_and_normalised() -> None:
    picture = torch.rand(3, 40, 90, generator=torch.Generator().manual_seed(2)) * 2 - 1
    rows, columns = stretched(40, 56), stretched(90, 56)
    square = rows @ picture.double() @ columns.T
    expected = torch.stack(
        [((square[c] * 0.5 + 0.5) - MEAN[c]) / STD[c] for c in range(3)],
    )
    assert preprocess(picture, 56).double() == pytest.approx(expected, abs=BICUBIC)
