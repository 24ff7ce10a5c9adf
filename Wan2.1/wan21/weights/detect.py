"""Which diffusion transformer a set of named shapes is.

Names decide the kind and shapes the sizes; config.json is asked only for what shapes cannot tell (copies of the
released folders exist with a wrong `model_type`).
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from wan21.errors import CheckpointError
from wan21.models import MODELS, DitConfig, ModelSpec, Task, VaceConfig
from wan21.weights.safetensors_header import StoredTensor

OFFICIAL_HEAD_DIM = 128
PATCH_VOLUME = 4  # a token is a patch of 1 x 2 x 2 latents

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_VACE_BLOCK = re.compile(r"vace_blocks\.(\d+)\.")
_VACE_WIDTH = "vace_patch_embedding.weight"
_IMAGE_WIDTH = "img_emb.proj.0.weight"
_IMAGE_POSITIONS = "img_emb.emb_pos"
_KINDS = (
    (_VACE_WIDTH, "vace"),
    (_IMAGE_POSITIONS, "flf2v"),
    (_IMAGE_WIDTH, "i2v"),
)
_WORDS = {"num_layers": "blocks", "num_heads": "heads"}


def detect(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], expected: DitConfig
) -> tuple[str, DitConfig]:
    """Kind (t2v, i2v, flf2v or vace) and sizes of a DiT.

    Args:
        tensors: all tensors by name.
        config: the content of config.json, or nothing.
        expected: where the number of heads comes from if config.json is silent and the width is the same.

    Raises:
        CheckpointError: a tensor that tells a size is missing or of another rank, a block is missing, or config.json
            has something else where a number belongs.
    """
    kind = next((kind for name, kind in _KINDS if name in tensors), "t2v")
    dim, in_dim = _shape(tensors, "patch_embedding.weight", 5)[:2]
    _, text_dim = _shape(tensors, "text_embedding.0.weight", 2)
    _, freq_dim = _shape(tensors, "time_embedding.0.weight", 2)
    ffn_dim, _ = _shape(tensors, "blocks.0.ffn.0.weight", 2)
    patch_dim, _ = _shape(tensors, "head.head.weight", 2)
    num_layers = _num_blocks(tensors, "blocks", _BLOCK)
    return kind, DitConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=_num_heads(dim, config, expected),
        num_layers=num_layers,
        in_dim=in_dim,
        out_dim=patch_dim // PATCH_VOLUME,
        freq_dim=freq_dim,
        text_dim=text_dim,
        text_len=int(_number(config, "text_len", expected.text_len)),
        eps=_number(config, "eps", expected.eps),
        image_dim=_shape(tensors, _IMAGE_WIDTH, 1)[0] if _IMAGE_WIDTH in tensors else 0,
        num_image_positions=_shape(tensors, _IMAGE_POSITIONS, 3)[1] if _IMAGE_POSITIONS in tensors else 0,
        vace=_vace(tensors, config, num_layers) if _VACE_WIDTH in tensors else None,
    )


def kind_of(task: Task) -> str:
    """The sort of DiT that a task needs: an image is a video of one frame."""
    return "t2v" if task == "t2i" else task


def require_match(folder: Path, kind: str, found: DitConfig, spec: ModelSpec) -> None:
    """Refuses a folder that holds another architecture than the one asked for.

    Raises:
        CheckpointError: says what the folder holds, what is needed, and which model would fit.
    """
    needed = kind_of(spec.task)
    if kind == needed and found == spec.dit:
        return
    names = [field.name for field in fields(DitConfig) if getattr(found, field.name) != getattr(spec.dit, field.name)]
    names = ["dim", "num_layers", *(name for name in names if name not in {"dim", "num_layers"})]
    fitting = [other.name for other in MODELS.values() if kind == kind_of(other.task) and other.dit == found]
    way_out = (
        f"choose model={' or model='.join(fitting)}, or another ckpt_dir" if fitting else "choose another ckpt_dir"
    )
    raise CheckpointError(
        f"ckpt_dir={folder} holds {kind} with {_describe(found, names)}; "
        f"model={spec.name} needs {needed} with {_describe(spec.dit, names)}; {way_out}"
    )


def _describe(config: DitConfig, names: list[str]) -> str:
    return ", ".join(
        f"{getattr(config, name)} {_WORDS[name]}" if name in _WORDS else f"{name} {_value(config, name)}"
        for name in names
    )


def _value(config: DitConfig, name: str) -> str:
    if name == "vace" and config.vace is not None:
        return f"of {config.vace.in_dim} channels beside the blocks {', '.join(map(str, config.vace.layers))}"
    return str(getattr(config, name)).lower()


def _shape(tensors: Mapping[str, StoredTensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(
            f"tensor {name} is in none of the diffusion_pytorch_model files; "
            "the folder must hold the weights under their official names"
        )
    tensor = tensors[name]
    if len(tensor.shape) != rank:
        raise CheckpointError(
            f"tensor {name} in {tensor.file} has shape {list(tensor.shape)} where {rank} dimensions belong; "
            "the folder must hold the weights in their official shapes"
        )
    return tensor.shape


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, (int, float)):
        raise CheckpointError(f"{name}={value!r} in config.json is no number; the released models have {default}")
    return value


def _vace(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], num_layers: int) -> VaceConfig:
    """Which blocks have one of VACE beside them: what config.json says, or else evenly spread, as the released ones."""
    num_blocks = _num_blocks(tensors, "vace_blocks", _VACE_BLOCK)
    layers = config.get("vace_layers", list(range(0, num_layers, max(1, num_layers // num_blocks)))[:num_blocks])
    if not isinstance(layers, list) or len(layers) != num_blocks or {*map(type, layers)} != {int}:
        raise CheckpointError(
            f"vace_layers={layers} in config.json names no place for each of the {num_blocks} vace_blocks; "
            "fetch this file again"
        )
    return VaceConfig(layers=tuple(layers), in_dim=_shape(tensors, _VACE_WIDTH, 5)[1])


def _num_blocks(tensors: Mapping[str, StoredTensor], name: str, pattern: re.Pattern[str]) -> int:
    found = {int(match[1]) for match in map(pattern.match, tensors) if match}
    if not found:
        raise CheckpointError(f"no tensor of {name} is in the diffusion_pytorch_model files; fetch the folder again")
    absent = sorted(set(range(max(found) + 1)) - found)
    if absent:
        raise CheckpointError(
            f"{name} {', '.join(map(str, absent))} of {max(found) + 1} have no tensors in the diffusion_pytorch_model "
            "files; fetch the folder again"
        )
    return len(found)


def _num_heads(dim: int, config: Mapping[str, Any], expected: DitConfig) -> int:
    given = config.get("num_heads")
    if isinstance(given, int) and given > 0 and dim % given == 0 and dim // given % 2 == 0:
        return given
    if dim == expected.dim:
        return expected.num_heads
    if dim % OFFICIAL_HEAD_DIM == 0:
        return dim // OFFICIAL_HEAD_DIM
    raise CheckpointError(
        f"tensor patch_embedding.weight has width {dim}, not a multiple of {OFFICIAL_HEAD_DIM}; "
        "give num_heads in config.json"
    )
