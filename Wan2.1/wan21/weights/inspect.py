"""What a checkpoint folder holds, and whether a task can run from it; without torch, so that planning stays light.

Headers and tables of contents are read, tensor data is not: seconds for the largest folder, before anything starts.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan21.errors import CheckpointError
from wan21.models import DitConfig, ModelSpec
from wan21.weights.detect import detect, require_match
from wan21.weights.pth import PthFacts, read_pth
from wan21.weights.safetensors_header import Header, StoredTensor, read_header

CONFIG_FILE = "config.json"
DIT_FILE = "diffusion_pytorch_model.safetensors"
DIT_INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
CLIP_PREFIX = "visual."
"""Of the image tower's tensors; the others are a text tower's, and are never read."""
VAE_FILE = "Wan2.1_VAE.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
TOKENIZER_FILE = "tokenizer.json"

SAMPLE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """A checkpoint folder that passed every check that needs no torch.

    Attributes:
        kind: which sort of DiT: t2v, i2v, flf2v or vace.
        dit: its sizes.
        dit_tensors: where each of its tensors lies, in which format and shape.
        stored_dtypes: formats in the files, by component.
        stored_bytes: bytes of tensor data in the files, by component.
        clip_file: of tasks that look at pictures; None for others.
        fingerprint: equal for folders of equal content. Not every byte is read: names, shapes, formats and sizes of
            all, checksums of the .pth files, the tokenizer, and a sample from each safetensors file are.
    """

    folder: Path
    kind: str
    dit: DitConfig
    dit_shards: tuple[Path, ...]
    dit_tensors: Mapping[str, StoredTensor] = field(repr=False)
    t5_file: Path
    clip_file: Path | None
    vae_file: Path
    tokenizer_folder: Path
    stored_dtypes: Mapping[str, tuple[str, ...]]
    stored_bytes: Mapping[str, int]
    fingerprint: str


def inspect_folder(folder: str | Path, spec: ModelSpec) -> FolderFacts:
    """The facts of a folder from which the task can run.

    Raises:
        CheckpointError: a file is missing, damaged or suspicious, or the folder holds another model.
    """
    folder = Path(folder)
    try:
        return _inspect(folder, spec)
    except OSError as error:
        raise CheckpointError(f"ckpt_dir={folder} cannot be read: {error}; check its owner and permissions") from error


def _inspect(folder: Path, spec: ModelSpec) -> FolderFacts:
    pth_names = {"t5": T5_FILE} | ({"clip": CLIP_FILE} if spec.clip else {}) | {"vae": VAE_FILE}
    shard_names = _require_files(folder, tuple(pth_names.values()))
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    headers = {name: read_header(folder / name) for name in shard_names}
    tensors = _join(folder, headers)
    kind, dit = detect(tensors, config, spec.dit)
    require_match(folder, kind, dit, spec)
    pths = {component: read_pth(folder / name) for component, name in pth_names.items()}
    return FolderFacts(
        folder=folder,
        kind=kind,
        dit=dit,
        dit_shards=tuple(folder / name for name in shard_names),
        dit_tensors=tensors,
        t5_file=folder / T5_FILE,
        clip_file=folder / CLIP_FILE if spec.clip else None,
        vae_file=folder / VAE_FILE,
        tokenizer_folder=folder / TOKENIZER_FOLDER,
        stored_dtypes={component: pth.dtypes for component, pth in pths.items()}
        | {"dit": tuple(sorted({tensor.dtype for tensor in tensors.values()}))},
        stored_bytes={component: pth.num_bytes for component, pth in pths.items()}
        | {"dit": sum(tensor.num_bytes for tensor in tensors.values())},
        fingerprint=_fingerprint(folder, f"{kind} {dit}", headers, tuple(pths.values())),
    )


def _require_files(folder: Path, pth_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the DiT's files, when they and all others are there."""
    if not folder.is_dir():
        raise CheckpointError(
            f"ckpt_dir={folder} is not a folder; give the folder of a downloaded checkpoint, or for random weights "
            "ckpt_dir=null in a sweep and --ckpt_dir random in generate.py"
        )
    shard_names: tuple[str, ...] = (DIT_FILE,)
    if (folder / DIT_INDEX_FILE).exists():
        shard_names = tuple(sorted(set(_weight_map(folder).values())))
    needed = (*shard_names, *pth_names, f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        by_index = f"; its shards are listed in {DIT_INDEX_FILE}" if len(shard_names) > 1 else ""
        if missing[0] == DIT_FILE and any(folder.glob("diffusion_pytorch_model-*.safetensors")):
            missing[0] = DIT_INDEX_FILE
        raise CheckpointError(
            f"ckpt_dir={folder} lacks {', '.join(missing)}{by_index}; fetch what is missing with the same names"
        )
    return shard_names


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    path = folder / DIT_INDEX_FILE
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensors to files; fetch this file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{path} puts tensor {name} into {shard!r}, which is no file name; fetch this file again"
            )
    return weight_map


def _join(folder: Path, headers: Mapping[str, Header]) -> dict[str, StoredTensor]:
    """All tensors of all shards, as the index assigns them."""
    if set(headers) == {DIT_FILE} and not (folder / DIT_INDEX_FILE).exists():
        return dict(headers[DIT_FILE].tensors)
    tensors = {}
    for name, shard in _weight_map(folder).items():
        if name not in headers[shard].tensors:
            raise CheckpointError(
                f"{folder / DIT_INDEX_FILE} puts tensor {name} into {shard}, which does not hold it; "
                "fetch the index and that file again, from one version"
            )
        tensors[name] = headers[shard].tensors[name]
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}; fetch this file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object; fetch this file again")
    return content


def _fingerprint(folder: Path, sizes: str, headers: Mapping[str, Header], pths: tuple[PthFacts, ...]) -> str:
    digest = hashlib.sha256(sizes.encode())

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    for name, header in sorted(headers.items()):
        add(header.raw)
        add(_sample(folder / name, 8 + len(header.raw)))
    for pth in pths:
        add(pth.layout)
    add((folder / TOKENIZER_FOLDER / TOKENIZER_FILE).read_bytes())
    return digest.hexdigest()


def _sample(path: Path, data_start: int) -> bytes:
    """Bytes from the middle of a file's tensor data, where two trainings of one architecture differ."""
    with path.open("rb") as file:
        file.seek((data_start + path.stat().st_size) // 2)
        return file.read(SAMPLE_BYTES)
