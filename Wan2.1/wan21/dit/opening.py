"""What the passes of guidance have in common.

Until the first cross attention nothing has seen the prompt. So both passes of a step have the same residual behind the
first block's self attention, and one of them can take over what the other worked out: of N blocks' self attentions
2 N - 1 remain in a step.

Letters: B videos, L tokens, D model width.
"""

import torch

from wan21.attention import Attention


class Opening:
    """The residual behind the first block's self attention, from one forward to the next.

    Give the same one to two forwards with the same latents and timestep, and to no other.

    Memory: from the first forward's first block to the second forward, one [B, L, D] in float32.
    """

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None
        self._is_taken = False

    @property
    def is_taken(self) -> bool:
        """Whether a forward began with what was kept."""
        return self._is_taken

    def attention(self, attention: Attention) -> Attention:
        """The kernel of the first block's self attention, where it is worked out here."""
        return attention

    def keep(self, residual: torch.Tensor) -> None:
        """Keeps a copy of the residual [B, L, D]."""
        self._kept = residual.clone()

    def take(self) -> torch.Tensor | None:
        """What was kept, [B, L, D], to be written to; None before that.

        Raises:
            ValueError: it was taken before.
        """
        if self._is_taken:
            raise ValueError("an opening serves two forwards, and this is the third; give each pair one of its own")
        kept, self._kept = self._kept, None
        self._is_taken = kept is not None
        return kept
