"""Softmax attention.

Letters: B videos, Lq queries, Lk keys, N heads, K head width.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own customary name
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan21.config import AttentionKernel
from wan21.errors import UsageError

HOPPER = 9
"""Major compute capability."""

Attention: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From q [B, Lq, N, K], k and v [B, Lk, N, K] of one dtype to softmax(q k^T / sqrt(K)) v, [B, Lq, N * K]."""


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


def attend_with_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by cuDNN's kernel only."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend(q, k, v)


def attend_with_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by torch's own FlashAttention-2 only."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend(q, k, v)


def attend_with_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by FlashAttention-3 (arXiv 2407.08608) of the package fa3-fwd; bfloat16 on Hopper.

    Memory: as `attend`.
    """
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func(q, k, v).flatten(2)


_KERNELS: dict[AttentionKernel, Attention] = {
    "sdpa": attend,
    "cudnn": attend_with_cudnn,
    "flash": attend_with_flash,
    "fa3": attend_with_fa3,
}


def choose_attention(name: AttentionKernel, device: torch.device) -> Attention:
    """The kernel of that name; `wan21.config.check_device` says what it can compute.

    Raises:
        UsageError: its package is missing, or it was written for another kind of GPU.
    """
    if name == "fa3":
        if find_spec("fa3_fwd_interface") is None:
            raise UsageError(
                "attention_kernel=fa3 needs the package fa3-fwd, which is not installed: pip install fa3-fwd; "
                "or choose attention_kernel=sdpa"
            )
        if torch.cuda.get_device_capability(device)[0] != HOPPER:
            raise UsageError("attention_kernel=fa3 needs a Hopper GPU, which this is not; choose attention_kernel=sdpa")
    return _KERNELS[name]
