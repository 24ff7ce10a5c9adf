"""Softmax attention.

Letters: B videos, Lq queries, Lk keys, N heads, K head width.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own customary name
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan21.errors import UsageError
from wan21.kernels import fp8
from wan21.options import FA3_KERNELS, AttentionKernel

Attention: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From q [B, Lq, N, K], k and v [B, Lk, N, K] of one dtype to softmax(q k^T / sqrt(K)) v, [B, Lq, N * K]."""

ROWS_OF_A_TILE = 128
"""A kernel takes so many queries of a head at a time, as products take rows."""

TILES_AT_ONCE = 132
"""It works on so many of these at once, one on each multiprocessor: as on an H100. For other GPUs what is cut to fit is
as good as anything else."""

AttentionWithLse: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""The same as [B, Lq, N, K], and the log of the softmax's denominator, [B, Lq, N, 1], float32."""


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


def attend_with_fa3_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by FlashAttention-3, approximately: of numbers in e4m3 with a scale for each head; bfloat16 on Hopper.

    From keys and values their mean over the tokens is taken, which neighbouring tokens share, so that the few bits tell
    them apart. All scores of a query fall alike by that, which the softmax does not see; the mean of the values is
    added to the result, since the softmax's weights add up to one. Smoothed keys: arXiv 2410.02367.

    Memory: as `attend`, and queries, keys and values in half their bytes. They are quantised at each call, so keys and
    values once for each slice of queries.
    """
    from fa3_fwd_interface import flash_attn_func

    q, q_scale, _ = fp8.quantize_heads(q)
    k, k_scale, _ = fp8.quantize_heads(k, centred=True)
    v, v_scale, mean = fp8.quantize_heads(v, centred=True)
    out = flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    return out.add_(mean).flatten(2)


def attend_with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with what it takes to join it to attention over other keys: the log of the softmax's denominator.

    The kernel that torch would choose is called by its name, since its public function keeps this number to itself.

    Args:
        q: [B, Lq, N, K].
        k: [B, Lk, N, K], same dtype.
        v: [B, Lk, N, K], same dtype.

    Returns:
        [B, Lq, N, K] in the dtype of q, and log(sum(exp(q k^T / sqrt(K)))), [B, Lq, N, 1], float32.

    Raises:
        ValueError: torch has no fused kernel for these tensors.

    Memory: the result and one float32 per query and head.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    aten = torch.ops.aten
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v))  # noqa: SLF001
    if choice == SDPBackend.FLASH_ATTENTION and q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)  # noqa: SLF001
    elif choice == SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)  # noqa: SLF001
    elif choice == SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)  # noqa: SLF001
    elif choice == SDPBackend.EFFICIENT_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)  # noqa: SLF001
    else:
        raise ValueError(
            f"torch has no fused attention for {q.dtype} heads of width {q.shape[-1]} on {q.device.type}, and the "
            "plain one does not tell its denominator; choose another precision"
        )
    lse = lse.flatten(2)[..., : q.shape[2]]  # [B, N, Lq]; some kernels add a dimension, some round Lq up
    return out.transpose(1, 2), lse.transpose(1, 2).unsqueeze(-1)


def attend_with_cudnn_and_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by cuDNN's kernel only."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_with_lse(q, k, v)


def attend_with_flash_and_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch's own FlashAttention-2 only."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend_with_lse(q, k, v)


_KERNELS: dict[AttentionKernel, Attention] = {
    "sdpa": attend,
    "cudnn": attend_with_cudnn,
    "flash": attend_with_flash,
    "fa3": attend_with_fa3,
    "fa3_fp8": attend_with_fa3_fp8,
}

_KERNELS_WITH_LSE: dict[AttentionKernel, AttentionWithLse] = {
    "sdpa": attend_with_lse,
    "cudnn": attend_with_cudnn_and_lse,
    "flash": attend_with_flash_and_lse,
}


def choose_attention(name: AttentionKernel) -> Attention:
    """The kernel of that name; `wan21.options` says on which devices it can compute what.

    Raises:
        UsageError: its package is missing.
    """
    if name in FA3_KERNELS and find_spec("fa3_fwd_interface") is None:
        raise UsageError(
            f"attention_kernel={name} needs the package fa3-fwd, which is not installed: pip install fa3-fwd; "
            "or choose attention_kernel=sdpa"
        )
    return _KERNELS[name]


def choose_attention_with_lse(name: AttentionKernel) -> AttentionWithLse:
    """The kernel of that name, telling its denominator; `wan21.options.Options` says which of them do."""
    return _KERNELS_WITH_LSE[name]
