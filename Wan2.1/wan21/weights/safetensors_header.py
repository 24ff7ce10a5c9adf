"""What a safetensors file holds, read from its header without torch.

The format: eight bytes with the header's length, the header as JSON (name -> dtype, shape, offsets), then the data.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan21.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 2**20
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_AGAIN = "fetch this file again"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as it lies in a file; the dtype is the format's own word, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Header:
    """All tensors of one file, and the header's bytes, which tell one file's layout from another's."""

    tensors: dict[str, StoredTensor]
    raw: bytes


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's length.

    Raises:
        CheckpointError: the file is cut short, has bytes too many, or does not describe its own data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: its first 8 bytes give no header length")
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path} is cut short inside its header: {length - len(raw)} bytes are missing; {_AGAIN}")
    tensors, num_data_bytes = _parse(path, raw)
    missing = 8 + length + num_data_bytes - size
    if missing > 0:
        raise CheckpointError(f"{path} is cut short: of its {size + missing} bytes {missing} are missing; {_AGAIN}")
    if missing < 0:
        raise CheckpointError(f"{path} has {-missing} bytes that no tensor in its header uses; {_AGAIN}")
    return Header(tensors=tensors, raw=raw)


def _parse(path: Path, raw: bytes) -> tuple[dict[str, StoredTensor], int]:
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} has a header that is no JSON ({error}); {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object; {_AGAIN}")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        tensor, begin, end = _parse_entry(path, name, entry)
        tensors[name] = tensor
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path} has a header whose tensors overlap or leave gaps at byte {begin}; {_AGAIN}")
        position = end
    return tensors, position


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:  # noqa: ANN401 # any JSON
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_valid = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} describes tensor {name} incompletely: {entry}; {_AGAIN}") from error
    if dtype not in ELEMENT_BYTES:
        raise CheckpointError(
            f"{path} stores tensor {name} as {dtype}, which is no plain weight; "
            f"use a checkpoint in {', '.join(ELEMENT_BYTES)}"
        )
    tensor = StoredTensor(file=path, dtype=dtype, shape=tuple(shape))
    if not is_valid or end - begin != tensor.num_bytes:
        raise CheckpointError(
            f"{path} gives tensor {name} the bytes {begin} to {end}, which do not fit shape {shape}; {_AGAIN}"
        )
    return tensor, begin, end
