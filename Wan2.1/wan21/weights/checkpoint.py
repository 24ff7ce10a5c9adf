"""Weights from the files of a checkpoint folder, read through mapped memory."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError  # only to recognise torch's refusal; nothing here unpickles
from typing import Any

import torch
from safetensors import safe_open

from wan21.errors import CheckpointError
from wan21.weights.components import PartOf, Source
from wan21.weights.inspect import CLIP_FILE, CLIP_PREFIX, FolderFacts
from wan21.weights.safetensors_header import StoredTensor
from wan21.weights.staging import copy_mapped


class CheckpointWeights:
    """The weights in a folder that `inspect_folder` has looked at."""

    def __init__(self, facts: FolderFacts) -> None:
        self._facts = facts

    def dit(self) -> "SafetensorsSource":
        """Weights of the diffusion transformer, from one safetensors file or several."""
        return SafetensorsSource(self._facts.dit_tensors)

    def t5(self) -> "PthSource":
        """Weights of the text encoder, from its .pth file."""
        return PthSource(self._facts.t5_file)

    def clip(self) -> PartOf:
        """Weights of CLIP's image tower, from a .pth file that holds its text tower as well.

        Raises:
            CheckpointError: the folder was inspected for a task that looks at no pictures.
        """
        if self._facts.clip_file is None:
            raise CheckpointError(f"{self._facts.folder} was not asked for {CLIP_FILE}; inspect it for an image task")
        return PartOf(PthSource(self._facts.clip_file), CLIP_PREFIX)

    def vae(self) -> "PthSource":
        """Weights of the VAE, from its .pth file."""
        return PthSource(self._facts.vae_file)


class SafetensorsSource(Source):
    """Tensors in safetensors files, one of which is open at a time; each tensor has its own stored dtype."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._open_path: Path | None = None
        self._open_file: Any = None
        self._stack = ExitStack()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        stored = self._tensors[name]
        if self._open_path != stored.file:
            self.close()
            self._open_file = self._stack.enter_context(safe_open(str(stored.file), framework="pt", device="cpu"))
            self._open_path = stored.file
        copy_mapped(self._open_file.get_tensor(name), destination, first)

    def close(self) -> None:
        self._open_path = self._open_file = None
        self._stack.close()


class PthSource(Source):
    """Tensors in a .pth file, which is a plain dict; torch's own guard against code in it is on.

    Raises:
        CheckpointError: torch cannot read the file, or it is no dict from names to tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path} cannot be read ({reason}); fetch this file again") from error
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise CheckpointError(f"{path} is no plain dict from names to tensors; save it as the model's state_dict()")
        self._tensors: dict[str, torch.Tensor] = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        copy_mapped(self._tensors[name].detach(), destination, first)

    def close(self) -> None:
        self._tensors = {}
