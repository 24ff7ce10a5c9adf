"""Softmax attention, one function.

Letters: B videos, Lq queries, Lk keys, N heads, K head width.
"""

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own customary name


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v through torch's fused kernels (cuDNN on Hopper, flash elsewhere).

    Args:
        q: [B, Lq, N, K].
        k: [B, Lk, N, K], same dtype.
        v: [B, Lk, N, K], same dtype.

    Returns:
        [B, Lq, N * K].

    Memory: the result and one float32 per query and head.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)  # [B, Lq, N * K]; copies where the kernel left another layout
