"""What both passes of guidance have in common where each is made by a process of its own.

Letters: B videos; Lq queries; N heads; K head width.
"""

import torch

from wan21.attention import Attention
from wan21.dit.opening import Opening
from wan21.parallel.exchange import gathered
from wan21.parallel.world import Group


class OpeningOfPair(Opening):
    """The first block's self attention, of which each member works out some heads and gets the others' from them.

    Heads do not depend on each other, so no bit changes. Each forward of the pair has to have one.

    Args:
        group: processes whose forwards differ in their context only. Heads have to divide by their number.

    Memory: two [B, Lq, N * K] beside what attention gives.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group

    def attention(self, attention: Attention) -> Attention:
        size, rank = self._group.size, self._group.rank

        def attend_to_some_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = attention(*(heads.chunk(size, dim=2)[rank] for heads in (q, k, v)))  # [B, Lq, N / size * K]
            everybodys = gathered(self._group, own)
            del own
            return torch.cat(everybodys.unbind(0), dim=-1)

        return attend_to_some_heads

    def keep(self, residual: torch.Tensor) -> None:
        """Nothing: the other forward is elsewhere."""

    def take(self) -> None:
        """None: there is nothing to begin with."""
