"""Weights from a seed."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from wan21.dit.model import Dit
from wan21.errors import CheckpointError
from wan21.models import MODELS, DitConfig
from wan21.text.umt5 import TextEncoder
from wan21.vae.vae import Vae
from wan21.weights import source as source_module
from wan21.weights.components import Source
from wan21.weights.load import materialize
from wan21.weights.random import RandomSource, RandomWeights, scale, tensor_seed

CPU = torch.device("cpu")
TINY = MODELS["tiny"]
SHAPES = {"a.weight": (50, 40), "a.bias": (50,), "norm.weight": (40,), "b.weight": (3, 2, 1, 2, 2)}
# Activations of order one: what trained weights give, and far from float16's limits.
STD_RANGE = (0.1, 10.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more threads, and tests run side by side."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def generator_for(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(
    names: Iterable[str], *, seed: int = 1, dtype: torch.dtype = torch.float32, component: str = "dit"
) -> dict[str, torch.Tensor]:
    source = RandomSource(component, SHAPES, seed, generator_for)
    tensors = {name: torch.empty(SHAPES[name], dtype=dtype) for name in names}
    for name, tensor in tensors.items():
        source.write(name, tensor)
    return tensors


def test_values_do_not_depend_on_order_or_on_what_else_is_drawn() -> None:
    forwards = drawn(SHAPES)
    backwards = drawn(reversed(SHAPES))
    alone = drawn(["b.weight"])
    assert all(torch.equal(forwards[name], backwards[name]) for name in SHAPES)
    assert torch.equal(forwards["b.weight"], alone["b.weight"])


def test_values_depend_on_seed_component_and_name() -> None:
    base = drawn(["a.weight"])["a.weight"]
    assert not torch.equal(base, drawn(["a.weight"], seed=2)["a.weight"])
    assert not torch.equal(base, drawn(["a.weight"], component="vae")["a.weight"])
    assert len({tensor_seed(0, "dit", f"blocks.{index}.weight") for index in range(2000)}) == 2000
    assert 0 <= tensor_seed(0, "dit", "a") < 2**63


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_destination_gets_the_rounded_values(dtype: torch.dtype) -> None:
    wide, narrow = drawn(SHAPES), drawn(SHAPES, dtype=dtype)
    assert all(torch.equal(wide[name].to(dtype), narrow[name]) for name in SHAPES)


def test_tensors_larger_than_the_staging_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "STAGING_BYTES", 8 * 600)
    sizes = []
    empty = torch.empty

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(args[0])
        return empty(*args, **kwargs)

    destination = torch.empty(SHAPES["a.weight"])
    source = RandomSource("dit", SHAPES, 1, generator_for)
    monkeypatch.setattr(torch, "empty", watch)
    source.write("a.weight", destination)
    assert sizes == [600, 600, 600, 200]
    assert destination.std() == pytest.approx(1 / math.sqrt(40), rel=0.1)
    parts = destination.view(-1).split(600)
    assert not torch.equal(parts[0], parts[1])


def test_a_destination_elsewhere_than_the_generator_gets_the_generators_values() -> None:
    """The meta device stands in for the other device: only that the write goes through can be seen here."""
    RandomSource("dit", SHAPES, 1, generator_for).write("a.weight", torch.empty(SHAPES["a.weight"], device="meta"))


def test_an_unknown_name_and_a_wrong_shape_are_refused() -> None:
    source = RandomSource("dit", SHAPES, 1, generator_for)
    with pytest.raises(CheckpointError, match=r"c\.weight is no weight of the dit"):
        source.write("c.weight", torch.empty(1))
    with pytest.raises(CheckpointError, match=r"a\.bias is stored as"):
        source.write("a.bias", torch.empty(1))


@pytest.mark.parametrize(
    ("component", "name", "shape", "expected"),
    [
        ("dit", "blocks.0.self_attn.q.weight", (64, 256), (0, 1 / 16)),
        ("dit", "patch_embedding.weight", (64, 16, 1, 2, 2), (0, 1 / 8)),
        ("dit", "blocks.0.self_attn.norm_q.weight", (64,), (1, 0.1)),
        ("dit", "blocks.0.norm3.bias", (64,), (0, 0.02)),
        ("dit", "blocks.0.modulation", (1, 6, 256), (0, 1 / 16)),
        ("dit", "head.modulation", (1, 2, 256), (0, 1 / 16)),
        ("t5", "token_embedding.weight", (8192, 256), (0, 1)),
        ("t5", "blocks.0.attn.q.weight", (64, 256), (0, 0.15 / 16)),
        ("t5", "blocks.0.attn.k.weight", (64, 256), (0, 1 / 16)),
        ("t5", "blocks.0.pos_embedding.embedding.weight", (32, 64), (0, 0.3)),
        ("t5", "norm.weight", (64,), (1, 0.1)),
        ("vae", "decoder.head.0.gamma", (16, 1, 1, 1), (1, 0.1)),
        ("vae", "decoder.head.2.weight", (3, 16, 3, 3, 3), (0, 0.5 / math.sqrt(16 * 27))),
    ],
)
def test_each_kind_of_tensor_has_its_scale(
    component: str, name: str, shape: tuple[int, ...], expected: tuple[float, float]
) -> None:
    assert pytest.approx(expected) == scale(component, name, shape)


@pytest.mark.parametrize("model", ["t2v-1.3B", "t2v-14B"])
def test_names_and_shapes_are_those_of_the_released_checkpoints(
    checkpoint_shapes: dict[str, dict[str, tuple[int, ...]]], model: str
) -> None:
    weights = RandomWeights(MODELS[model], 0, generator_for)
    assert checkpoint_shapes[model] == weights.dit().shapes()
    assert checkpoint_shapes["t5-encoder"] == weights.t5().shapes()
    assert checkpoint_shapes["vae"] == weights.vae().shapes()


def filled(cls: Any, config: Any, source: Source, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        module = cls(config, dtype=dtype)
    materialize(module, source, CPU)
    return module


def require_order_one(x: torch.Tensor) -> None:
    assert x.isfinite().all()
    assert STD_RANGE[0] < x.float().std() < STD_RANGE[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_tiny_models_activations_are_finite_and_of_order_one(dtype: torch.dtype) -> None:
    weights = RandomWeights(TINY, 0, generator_for)
    prompt = filled(TextEncoder, TINY.text, weights.t5(), dtype)(torch.arange(3, 43)[None])
    require_order_one(prompt)
    dit = filled(Dit, TINY.dit, weights.dit(), dtype)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator_for(0))
    for timestep in (999.0, 20.0):
        require_order_one(dit(latents, timestep, dit.embed_text([prompt[0]])))


@torch.inference_mode()
def test_a_tiny_vae_decodes_noise_without_saturating() -> None:
    vae = filled(Vae, TINY.vae, RandomWeights(TINY, 0, generator_for).vae(), torch.float32)
    video = vae.decode(torch.randn(1, 16, 2, 2, 2, generator=generator_for(0)))
    require_order_one(video)
    assert (video.abs() >= 1).float().mean() < 0.01
    require_order_one(vae.encode(video))


@torch.inference_mode()
def test_thirty_layers_stay_finite_in_float16() -> None:
    deep = replace(TINY, dit=DitConfig(dim=256, ffn_dim=640, num_heads=2, num_layers=30, text_dim=256, text_len=24))
    dit = filled(Dit, deep.dit, RandomWeights(deep, 0, generator_for).dit(), torch.float16)
    context = dit.embed_text([torch.randn(20, 256, generator=generator_for(1))])
    require_order_one(dit(torch.randn(1, 16, 1, 4, 4, generator=generator_for(0)), 500.0, context))
