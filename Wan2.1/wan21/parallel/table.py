"""Tables for looking up whose rows lie on several processes."""

import torch
from torch import nn

from wan21.parallel.exchange import add_up
from wan21.parallel.world import Group


class SharedTable(nn.Module):
    """Takes the place of an embedding, and gives the same bits.

    Each process looks up what it has and takes zeros for the rest, and the sum is everybody's. A prompt has some
    hundred tokens, so this costs nothing beside gathering the table, which in the released text encoder is 2.1 GB.

    Args:
        table: on the meta device, as this will be until it is given this process's rows; they may lie on the host.
        group: the processes; all of them look up the same.
        device: where the sum is formed, and lies afterwards.
    """

    def __init__(self, table: nn.Embedding, group: Group, device: torch.device) -> None:
        super().__init__()
        self._group = group
        self._device = device
        size = -(-table.num_embeddings // group.size)
        self.first_row = min(group.rank * size, table.num_embeddings)
        self.num_rows = min(size, table.num_embeddings - self.first_row)
        self.weight = nn.Parameter(table.weight.new_empty(self.num_rows, table.embedding_dim), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 on the rows' device to [..., D]."""
        places = ids - self.first_row
        is_here = (places >= 0) & (places < self.num_rows)
        rows = self.weight[torch.where(is_here, places, 0)].masked_fill(~is_here.unsqueeze(-1), 0).to(self._device)
        add_up(self._group, rows)
        return rows


def share_table(module: nn.Module, name: str, group: Group, device: torch.device) -> None:
    """Puts a shared table in the place of the module's embedding of this name.

    Raises:
        TypeError: it is no embedding.
    """
    table = module.get_submodule(name)
    if not isinstance(table, nn.Embedding):
        raise TypeError(f"{name} is a {type(table).__name__}, and only an embedding is looked up row by row")
    setattr(module, name, SharedTable(table, group, device))


def own_rows(module: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """By name, each parameter as far as it is this process's, and the number of its first element in the whole."""
    found = {}
    for name, parameter in module.named_parameters():
        table = module.get_submodule(name.rpartition(".")[0])
        first = table.first_row * parameter.shape[1] if isinstance(table, SharedTable) else 0
        found[name] = (parameter.detach(), first)
    return found
