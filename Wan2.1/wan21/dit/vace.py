"""What VACE adds to the transformer: a second stream of tokens, made of the sources, that steers the first one.

The control stream begins as the sources' tokens plus those of the noisy latents, and runs through blocks of its own.
Beside each of these stands a main block; what a projection makes of the control stream, the hint, is added to the
residual behind that main block. The control stream never looks at the main one after its beginning. So instead of
working out all hints first, as upstream does, a block of VACE runs right behind its main block, and its hint is added
token by token as it is formed: the values are the same, and one stream is all there is to keep.

Letters: B videos, C channels, t, h, w of the latents, L tokens, S prompt tokens, D model width, N heads, K head width.

Reference: VACE (arXiv 2503.07598).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from wan21.dit.block import Block
from wan21.dit.context import Context
from wan21.dit.layers import Slicing, chunk_rows
from wan21.dit.operations import Operations
from wan21.dit.residual import Residual, Windowed, pairs
from wan21.models import DitConfig

Streams = tuple[Residual, Residual]
"""The main residual and the control stream, [B, L, D] in float32 each."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What steers a forward.

    context: what was made of the sources, [B or 1, 96, t, h, w].
    scale: what hints are multiplied by.
    residual: where the control stream [B, L, D] shall be kept; None: in a tensor on the device.
    """

    context: torch.Tensor
    scale: float = 1.0
    residual: Windowed | None = None


class VaceBlock(Block):
    """A block of the control stream, and the projection of its result to a hint.

    Args:
        config: sizes.
        dtype: of linear layers and attention.
        operations: how what lies between the products is carried out.
        is_first: whether the control stream begins here: it has a projection more, and its values are in the compute
            dtype until something was added to them.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {**Block.PARTS, "hint": ("after_proj",)}
    # Used before the first main block, so out of turn.
    ALWAYS: ClassVar[tuple[str, ...]] = (*Block.ALWAYS, "before_proj")

    def __init__(self, config: DitConfig, dtype: torch.dtype, operations: Operations, *, is_first: bool) -> None:
        super().__init__(config, dtype, operations)
        self.before_proj = nn.Linear(config.dim, config.dim, dtype=dtype) if is_first else None
        self.after_proj = nn.Linear(config.dim, config.dim, dtype=dtype)
        self._norm_dtype = dtype if is_first else torch.float32

    def begin(self, tokens: torch.Tensor, latent_tokens: torch.Tensor) -> torch.Tensor:
        """The first values of the control stream.

        Args:
            tokens: of the sources, [B or 1, rows, D] in the compute dtype.
            latent_tokens: the main residual before its first block, [B, rows, D], float32.

        Returns:
            [B, rows, D] in the compute dtype, to which upstream rounds them.

        Raises:
            ValueError: the stream does not begin at this block.
        """
        if self.before_proj is None:
            raise ValueError("before_proj is missing: the control stream begins at the first block of VACE only")
        return self.operations.linear(self.before_proj, tokens) + latent_tokens.to(self.dtype)

    def forward(  # type: ignore[override]  # it takes and returns both streams
        self,
        streams: Streams,
        time: torch.Tensor,
        context: Context,
        turns: torch.Tensor,
        slicing: Slicing,
        scale: float,
        room: torch.Tensor | None,
    ) -> Streams:
        """Both streams after this block: the control stream has passed it, and its hint is in the main one.

        Args:
            streams: written to unless gradients are kept.
            time: [B or 1, 6, D], float32; the projected timestep.
            context: what cross attention reads.
            turns: rotary positions, [L, 1, K/2], complex64.
            slicing: into what the work is cut.
            scale: what the hint is multiplied by.
            room: for keys and values, [2, B, L, N, K] in the compute dtype; None where gradients are kept.

        Returns:
            The very streams that were given, unless gradients are kept.

        Memory: that of a block; the hint is there for a chunk of rows only.
        """
        residual, control = streams
        control = super().forward(control, time, context, turns, slicing, self._norm_dtype, room)
        size = chunk_rows(residual.shape, slicing.most_rows)
        with self.part("hint"):
            for (_, window), (_, source) in pairs(residual, control, size, reads=True):
                hint = self.operations.linear(self.after_proj, source.to(self.dtype))
                hint = hint * scale if torch.is_grad_enabled() else hint.mul_(scale)
                residual = self.operations.add(residual, window, hint)
                del hint  # or it would stand beside the next one
        return (residual, control) if torch.is_grad_enabled() else streams
