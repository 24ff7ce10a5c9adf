"""Checkpoint folders in the official layout, for tests and demonstrations."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from wan21.errors import UsageError
from wan21.models import ClipConfig, ModelSpec
from wan21.weights import inspect
from wan21.weights.components import Source, Weights
from wan21.weights.detect import kind_of
from wan21.weights.load import total_bytes


def write_folder(
    folder: str | Path,
    spec: ModelSpec,
    weights: Weights,
    *,
    num_shards: int = 1,
    dit_dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Writes all files of a checkpoint with these weights: the T5 in bfloat16, CLIP and the VAE in float32.

    Returns:
        The files, in the order written.

    Raises:
        UsageError: the folder holds something already, or there are more shards than tensors.

    Memory: one component at a time, on the host.
    """
    from wan21.text.tokenizer import Tokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UsageError(f"folder={folder} is not empty, and files left in it could pass for new ones; choose another")
    files = [write_config(folder, spec)]
    with weights.dit() as source:
        files += write_dit(folder, draw(source, dit_dtype), num_shards)
    for name, opened, dtype in (
        (inspect.T5_FILE, weights.t5(), torch.bfloat16),
        (inspect.VAE_FILE, weights.vae(), torch.float32),
    ):
        with opened as source:
            torch.save(draw(source, dtype), folder / name)
        files.append(folder / name)
    if spec.clip is not None:
        with weights.clip() as source:
            files.append(write_clip(folder, draw(source, torch.float32), spec.clip))
    tokenizer_folder = folder / inspect.TOKENIZER_FOLDER
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.built_in().save(tokenizer_folder)
    files += sorted(path for path in tokenizer_folder.iterdir() if path.is_file())
    return files


def draw(source: Source, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a source in one dtype, on the host."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in source.shapes().items()}
    for name, tensor in tensors.items():
        source.write(name, tensor)
    return tensors


def write_clip(folder: Path, tower: dict[str, torch.Tensor], clip: ClipConfig) -> Path:
    """The image tower, and beside it what the released file has as well: a scale and a text tower, here a small one."""
    text = {
        "log_scale": torch.zeros(()),
        "textual.token_embedding.weight": torch.zeros(1, clip.text_dim),
        "textual.head.0.weight": torch.zeros(clip.text_dim, clip.text_dim),
    }
    path = folder / inspect.CLIP_FILE
    torch.save({f"{inspect.CLIP_PREFIX}{name}": tensor for name, tensor in tower.items()} | text, path)
    return path


def write_config(folder: Path, spec: ModelSpec) -> Path:
    """The DiT's config.json, with the keys that the released ones have."""
    dit = spec.dit
    path = folder / inspect.CONFIG_FILE
    content: dict[str, object] = {
        "_class_name": "WanModel" if dit.vace is None else "VaceWanModel",
        "_diffusers_version": "0.30.0",
        "dim": dit.dim,
        "eps": dit.eps,
        "ffn_dim": dit.ffn_dim,
        "freq_dim": dit.freq_dim,
        "in_dim": dit.in_dim,
        "model_type": kind_of(spec.task),
        "num_heads": dit.num_heads,
        "num_layers": dit.num_layers,
        "out_dim": dit.out_dim,
        "text_len": dit.text_len,
    }
    if dit.vace is not None:
        content |= {"vace_in_dim": dit.vace.in_dim, "vace_layers": list(dit.vace.layers)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def write_dit(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> list[Path]:
    """One safetensors file, or several of about equal size and their index."""
    if not 1 <= num_shards <= len(tensors):
        raise UsageError(f"num_shards={num_shards} is outside 1 to {len(tensors)}, the number of tensors")
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, folder / inspect.DIT_FILE, metadata)
        return [folder / inspect.DIT_FILE]
    total = total_bytes(tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    num_bytes = 0
    for name, tensor in tensors.items():
        shards[num_bytes * num_shards // total][name] = tensor
        num_bytes += total_bytes([tensor])
    stem, _, suffix = inspect.DIT_FILE.rpartition(".")
    names = [f"{stem}-{number:05}-of-{num_shards:05}.{suffix}" for number in range(1, num_shards + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = folder / inspect.DIT_INDEX_FILE
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [*(folder / name for name in names), index]
