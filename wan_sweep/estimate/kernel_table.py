"""What kernels take for themselves, and a process beside them, where only a measurement can say it.

A row holds for one GPU with one set of libraries. For any other the nearest row is taken over, and then every figure
from it is a guess.
"""

from dataclasses import dataclass

from wan_sweep.cards import Card
from wan_sweep.units import MIB


@dataclass(frozen=True, kw_only=True)
class KernelTable:
    """One row.

    Attributes:
        card, torch, cuda, cudnn: where it was measured.
        context_bytes: the most that a process holds outside torch's allocator: context, kernels, library buffers.
        cublaslt_workspace_bytes: what stays from the first linear layer with a bias on, for each stream.
    """

    card: str
    torch: str
    cuda: str
    cudnn: str
    context_bytes: int
    cublaslt_workspace_bytes: int

    def describe(self) -> str:
        """The row in words."""
        return f"{self.card} with torch {self.torch}, CUDA {self.cuda}, cuDNN {self.cudnn}"


TABLE = (
    KernelTable(
        card="H100-80GB",
        torch="2.11.0",
        cuda="13.0",
        cudnn="9.19",
        context_bytes=688 * MIB,
        cublaslt_workspace_bytes=1 * MIB,
    ),
)


def row_for(card: Card) -> tuple[KernelTable, bool]:
    """The row to use, and whether it was measured on this card."""
    for row in TABLE:
        if row.card == card.name:
            return row, True
    return TABLE[0], False
