"""Kind and sizes of a transformer, from the names and shapes of the released checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from wan21.errors import CheckpointError
from wan21.models import DIT_1_3B, DIT_14B, DIT_FLF2V_14B, DIT_I2V_14B, DIT_VACE_1_3B, DIT_VACE_14B, MODELS, DitConfig
from wan21.weights.detect import detect, require_match
from wan21.weights.safetensors_header import StoredTensor

Tensors = dict[str, StoredTensor]
Official = Callable[[str], Tensors]
FILE = Path("diffusion_pytorch_model.safetensors")


@pytest.fixture
def official(checkpoint_shapes: dict[str, dict[str, tuple[int, ...]]]) -> Official:
    """All tensors of a released checkpoint, by model."""

    def make(model: str) -> Tensors:
        shapes = checkpoint_shapes[model].items()
        return {name: StoredTensor(file=FILE, dtype="F32", shape=shape) for name, shape in shapes}

    return make


@pytest.fixture
def t2v(official: Official) -> Tensors:
    return official("t2v-1.3B")


@pytest.mark.parametrize(
    ("model", "kind", "expected", "num_tensors"),
    [
        ("t2v-1.3B", "t2v", DIT_1_3B, 825),
        ("t2v-14B", "t2v", DIT_14B, 1095),
        ("i2v-14B", "i2v", DIT_I2V_14B, 1303),
        ("flf2v-14B", "flf2v", DIT_FLF2V_14B, 1304),
        ("vace-1.3B", "vace", DIT_VACE_1_3B, 1264),
        ("vace-14B", "vace", DIT_VACE_14B, 1331),
    ],
)
def test_every_released_architecture_is_recognised(
    official: Official, model: str, kind: str, expected: DitConfig, num_tensors: int
) -> None:
    tensors = official(model)
    assert num_tensors == len(tensors)
    assert (kind, expected) == detect(tensors, {}, replace(MODELS["tiny"].dit, text_len=512))


def test_a_wrong_model_type_in_config_json_changes_nothing(official: Official) -> None:
    assert detect(official("vace-1.3B"), {"model_type": "t2v"}, DIT_1_3B)[0] == "vace"


def test_the_number_of_heads_comes_from_config_json_where_it_divides(t2v: Tensors) -> None:
    assert detect(t2v, {"num_heads": 24}, DIT_14B)[1].num_heads == 24
    assert detect(t2v, {"num_heads": 7}, DIT_14B)[1].num_heads == 12
    assert detect(t2v, {"num_heads": "12"}, DIT_14B)[1].num_heads == 12


def test_an_unknown_number_of_heads_is_told(t2v: Tensors) -> None:
    tensors = {n: replace(t, shape=tuple(40 if s == 1536 else s for s in t.shape)) for n, t in t2v.items()}
    with pytest.raises(CheckpointError, match=r"width 40.*give num_heads in config\.json"):
        detect(tensors, {}, DIT_1_3B)


@pytest.mark.parametrize("config", [{"eps": None}, {"text_len": "512"}])
def test_a_config_json_with_words_for_numbers_is_refused(t2v: Tensors, config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"in config\.json is no number"):
        detect(t2v, config, DIT_1_3B)


@pytest.mark.parametrize("name", ["patch_embedding.weight", "blocks.0.ffn.0.weight", "head.head.weight"])
def test_a_missing_tensor_that_tells_a_size_is_named(t2v: Tensors, name: str) -> None:
    del t2v[name]
    with pytest.raises(CheckpointError, match=f"tensor {name} is in none"):
        detect(t2v, {}, DIT_1_3B)


def test_a_tensor_of_another_rank_is_named(t2v: Tensors) -> None:
    t2v["patch_embedding.weight"] = StoredTensor(file=FILE, dtype="F32", shape=(1536, 64))
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight in .* has shape \[1536, 64\]"):
        detect(t2v, {}, DIT_1_3B)


def test_a_missing_block_is_named(t2v: Tensors) -> None:
    tensors = {name: tensor for name, tensor in t2v.items() if not name.startswith("blocks.7.")}
    with pytest.raises(CheckpointError, match="blocks 7 of 30"):
        detect(tensors, {}, DIT_1_3B)


def test_the_right_folder_is_accepted() -> None:
    require_match(Path("w"), "t2v", DIT_14B, MODELS["t2i-14B"])


def test_a_mismatch_says_what_is_there_what_is_needed_and_what_fits() -> None:
    with pytest.raises(CheckpointError) as caught:
        require_match(Path("w"), "t2v", DIT_14B, MODELS["t2v-1.3B"])
    assert str(caught.value) == (
        "ckpt_dir=w holds t2v with dim 5120, 40 blocks, ffn_dim 13824, 40 heads; "
        "model=t2v-1.3B needs t2v with dim 1536, 30 blocks, ffn_dim 8960, 12 heads; "
        "choose model=t2v-14B or model=t2i-14B, or another ckpt_dir"
    )


@pytest.mark.parametrize(
    ("kind", "found"), [("i2v", replace(DIT_14B, in_dim=36)), ("vace", DIT_14B), ("t2v", replace(DIT_14B, eps=1e-5))]
)
def test_another_kind_or_number_is_refused(kind: str, found: DitConfig) -> None:
    with pytest.raises(CheckpointError, match=f"holds {kind} with dim 5120.*needs t2v with dim 5120.*another ckpt_dir"):
        require_match(Path("w"), kind, found, MODELS["t2v-14B"])


@pytest.mark.parametrize("layers", [[0, 1], [0.0] * 15, "0, 2", None])
def test_places_of_vace_blocks_that_cannot_be_are_refused(official: Official, layers: object) -> None:
    with pytest.raises(CheckpointError, match=r"vace_layers=.* names no place for each of the 15 vace_blocks"):
        detect(official("vace-1.3B"), {"vace_layers": layers}, DIT_1_3B)


def test_places_of_vace_blocks_come_from_config_json(official: Official) -> None:
    layers = list(range(15))
    found = detect(official("vace-1.3B"), {"vace_layers": layers}, DIT_1_3B)[1]
    assert found.vace is not None
    assert list(found.vace.layers) == layers
    with pytest.raises(
        CheckpointError, match=r"vace of 96 channels beside the blocks 0, 1, 2, .*model=vace-1.3B needs"
    ):
        require_match(Path("folder"), "vace", found, MODELS["vace-1.3B"])


def test_a_missing_vace_block_is_named(official: Official) -> None:
    tensors = official("vace-1.3B")
    some = {name: tensor for name, tensor in tensors.items() if not name.startswith("vace_blocks.3.")}
    with pytest.raises(CheckpointError, match=r"vace_blocks 3 of 15 have no tensors"):
        detect(some, {}, DIT_1_3B)
    none = {name: tensor for name, tensor in tensors.items() if not name.startswith("vace_blocks.")}
    with pytest.raises(CheckpointError, match=r"no tensor of vace_blocks is in"):
        detect(none, {}, DIT_1_3B)


def test_a_folder_of_vace_is_no_folder_of_text_to_video(official: Official) -> None:
    kind, found = detect(official("vace-14B"), {}, DIT_14B)
    with pytest.raises(CheckpointError, match=r"needs t2v with .*vace none; choose model=vace-14B"):
        require_match(Path("folder"), kind, found, MODELS["t2v-14B"])
