"""What kernels take for themselves, and a process beside them, where only a measurement can say it.

A row holds for one GPU with one set of libraries; `python -m wan_sweep.estimate.calibrate` makes one, as a file in
tables/. For any other GPU the nearest row is taken over, and then every figure from it is a guess.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_sweep.cards import DEFAULT_CARD, Card
from wan_sweep.environment import version_numbers
from wan_sweep.store import read_json, write_json

TABLES = Path(__file__).resolve().parent / "tables"


@dataclass(frozen=True, kw_only=True)
class KernelTable:
    """One row.

    Attributes:
        card, torch, cuda, cudnn: where it was measured.
        context_bytes: the most that a process holds outside torch's allocator: context, kernels, library buffers.
        cublaslt_workspace_bytes: what stays from the first linear layer with a bias on, for each stream.
        fa3_bytes_per_row: what FlashAttention-3 takes besides its result for each query and head; None: not measured.
        nccl_bytes_per_communicator: what a process holds outside torch's allocator for each group of several processes
            that it exchanges messages in; None: nobody has measured it, and it is not counted.
        convolutions: what a convolution takes besides its result, by `kernels.signature`; others follow a rule.
    """

    card: str
    torch: str
    cuda: str
    cudnn: str
    context_bytes: int
    cublaslt_workspace_bytes: int
    fa3_bytes_per_row: int | None = None
    nccl_bytes_per_communicator: int | None = None
    convolutions: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """The row in words."""
        return f"{self.card} with torch {self.torch}, CUDA {self.cuda}, cuDNN {self.cudnn}"

    def to_json(self) -> dict[str, Any]:
        """As it is written to a file."""
        return {**self.__dict__, "convolutions": dict(self.convolutions)}

    def save(self, folder: Path = TABLES) -> Path:
        """Writes its file, which it returns.

        Raises:
            OSError: it cannot be written.
        """
        name = f"{self.card.lower()}_torch{self.torch}_cuda{self.cuda}_cudnn{self.cudnn}.json"
        write_json(folder / name, self.to_json())
        return folder / name


@functools.cache
def rows(folder: Path = TABLES) -> tuple[KernelTable, ...]:
    """All rows, those with the newest torch first.

    Raises:
        RecordError: a file is damaged.
    """
    found = [KernelTable(**read_json(path)) for path in sorted(folder.glob("*.json"))]
    return tuple(sorted(found, key=lambda row: version_numbers(row.torch), reverse=True))


def row_for(card: Card) -> tuple[KernelTable, bool]:
    """The row to use, and whether it was measured on this card."""
    measured = next((row for row in rows() if row.card == card.name), None)
    if measured is not None:
        return measured, True
    return next(row for row in rows() if row.card == DEFAULT_CARD), False
