"""One transformer block.

Letters: B videos, L tokens, S prompt tokens, D model width, K head width.
"""

import torch
from torch import nn

from wan21.config import DitConfig
from wan21.dit.layers import (
    CrossAttention,
    FeedForward,
    Modulation,
    SelfAttention,
    add_branch,
    chunk_rows,
    modulated,
    row_slices,
)


class Block(nn.Module):
    """Self attention, cross attention and feed-forward, each added to the residual.

    Reference: Wan2.1 (arXiv 2503.20314), section 4.2.
    """

    def __init__(self, config: DitConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.eps
        self.dtype = dtype
        self.self_attn = SelfAttention(config, dtype)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps, dtype=torch.float32)
        self.cross_attn = CrossAttention(config, dtype)
        self.ffn = FeedForward(config, dtype)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, dtype=torch.float32))

    def forward(
        self,
        residual: torch.Tensor,
        time: torch.Tensor,
        context: torch.Tensor,
        turns: torch.Tensor,
        query_slices: int,
        norm_dtype: torch.dtype,
    ) -> torch.Tensor:
        """The residual after this block.

        Args:
            residual: [B, L, D], float32; written to unless gradients are kept.
            time: [B or 1, 6, D], float32; the projected timestep.
            context: [B, S, D] in the compute dtype.
            turns: rotary positions, [L, 1, K/2], complex64.
            query_slices: into how many slices self attention cuts its queries.
            norm_dtype: what the first norm's output is rounded to.

        Returns:
            [B, L, D], float32.
        """
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = (self.modulation + time).split(1, dim=1)
        modulation = Modulation(shift_sa, scale_sa, gate_sa)
        residual = self.self_attn(residual, modulation, turns, query_slices, norm_dtype)
        residual = self.cross_attn(residual, self.norm3, context)
        modulation = Modulation(shift_ffn, scale_ffn, gate_ffn)
        for rows in row_slices(slice(0, residual.shape[1]), chunk_rows(residual)):
            branch = self.ffn(modulated(residual[:, rows], modulation, self.eps, self.dtype))
            residual = add_branch(residual, rows, branch, modulation.gate)
            del branch
        return residual
