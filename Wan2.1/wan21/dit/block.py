"""One transformer block.

Letters: B videos, L tokens, S prompt tokens (and those of pictures), D model width, N heads, K head width.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import nn

from wan21.dit.context import Context
from wan21.dit.image import ImageCrossAttention
from wan21.dit.layers import CrossAttention, FeedForward, SelfAttention, Slicing, chunk_rows, lent
from wan21.dit.opening import Opening
from wan21.dit.operations import Modulation, Operations
from wan21.dit.residual import Residual, windows
from wan21.models import DitConfig
from wan21.parts import InParts


class Block(InParts):
    """Self attention, cross attention and feed-forward, each added to the residual.

    Each of them goes over the tokens in chunks of its own, so that the weights of one are needed at a time.

    Reference: Wan2.1 (arXiv 2503.20314), section 4.2.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "keys": ("self_attn.k", "self_attn.v", "self_attn.norm_k"),
        "queries": ("self_attn.q", "self_attn.o", "self_attn.norm_q"),
        "prompt": (
            *("cross_attn.k", "cross_attn.v", "cross_attn.norm_k"),
            *("cross_attn.k_img", "cross_attn.v_img", "cross_attn.norm_k_img"),
        ),
        "cross": ("norm3", "cross_attn.q", "cross_attn.o", "cross_attn.norm_q"),
        "up": ("ffn.0",),
        "down": ("ffn.2",),
    }
    # The prompt's keys and values take 0.2 ms with 14B, and "cross" takes 2 to come; "down" comes while "up" is used.
    BESIDE: ClassVar[frozenset[str]] = frozenset({"prompt", "down"})
    ALWAYS: ClassVar[tuple[str, ...]] = ("modulation",)

    def __init__(self, config: DitConfig, dtype: torch.dtype, operations: Operations) -> None:
        super().__init__()
        self.eps = config.eps
        self.dtype = dtype
        self.operations = operations
        self.self_attn = SelfAttention(config, dtype, operations)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps, dtype=torch.float32)
        self.cross_attn = (ImageCrossAttention if config.image_dim else CrossAttention)(config, dtype, operations)
        self.ffn_dim = config.ffn_dim
        self.ffn = FeedForward(config, dtype, operations)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, dtype=torch.float32))

    def forward(
        self,
        residual: Residual,
        time: torch.Tensor,
        context: Context,
        turns: torch.Tensor,
        slicing: Slicing,
        norm_dtype: torch.dtype,
        room: torch.Tensor | None,
        opening: Opening | None = None,
    ) -> Residual:
        """The residual after this block.

        Args:
            residual: [B, L, D], float32; written to unless gradients are kept.
            time: [B or 1, 6, D], float32; the projected timestep.
            context: what cross attention reads.
            turns: rotary positions, [L, 1, K/2], complex64.
            slicing: into what the work is cut.
            norm_dtype: what the first norm's output is rounded to.
            room: for keys and values, from the tokens' `room`, and for the feed-forward's hidden layer, which comes
                after their use; None where gradients are kept.
            opening: of the first block; takes the residual behind self attention, or has given it.

        Returns:
            [B, L, D], float32.
        """
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.modulation + time).split(1, dim=1)
        modulation = Modulation(shift, 1 + scale, gate)
        if opening is None or not opening.is_taken:
            attend = self.operations.attend if opening is None else opening.attention(self.operations.attend)
            residual = self.self_attn(residual, modulation, turns, slicing, norm_dtype, room, self.part, attend)
            if opening is not None and isinstance(residual, torch.Tensor):
                opening.keep(residual)
        size = chunk_rows(residual.shape, slicing.most_rows)
        residual = self.cross_attn(residual, self.norm3, context, size, self.part)
        modulation = Modulation(shift_ffn, 1 + scale_ffn, gate_ffn)
        with self.part("up"), ExitStack() as later:
            for number, (_, window) in enumerate(windows(residual, size, writes=True)):
                x = self.operations.modulated(window, modulation, self.eps, self.dtype)
                hidden = self.ffn.widened(x, lent(room, (*window.shape[:2], self.ffn_dim)))
                del x
                if number == 0:
                    later.enter_context(self.part("down"))
                branch = self.ffn.narrowed(hidden)
                residual = self.operations.add(residual, window, branch, modulation.gate)
                del hidden, branch
        return residual
