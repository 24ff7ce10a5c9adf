"""Operators for the VAE's decoder: a convolution with all that stands around it, and norm and SiLU alone.

On CUDA they are the Triton kernels of `wan21.kernels.gpu.vae`; on a CPU plain torch, which says what they compute.

All tensors of frames are [B, C, H, W] with channels last, dense; `out` is [B, C', T, H', W'], channels last, dense.
They keep no gradients. Where convolutions compute in TF32, what norm and SiLU give is rounded to it, to the nearest,
since nothing but convolutions reads it; weights are cut off unless `to_tf32` has rounded them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from wan21.kernels.vae_blocks import blocks_for

_LIBRARY = torch.library.Library("wan21", "FRAGMENT")  # the operators live as long as it does


def norm_silu(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Writes SiLU of the root-mean-square norm over channels of a frame into `out`, of the same shape."""
    torch.ops.wan21.vae_norm_silu(frame, gamma, out)


def conv(
    window: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    out: Tensor | None,
    normed: list[Tensor],
    top: int,
    left: int,
    *,
    adds: bool,
    upsamples: bool,
) -> None:
    """A convolution of 3 x 3 positions and some frames, with zeros around each frame, and what follows it.

    Args:
        window: the input's frames with those before them in front. Frames that are missing in front are zeros.
        weight: [C', C, taps, 3, 3], or [C', C, 3, 3] for one tap; best with channels last.
        bias: [C'].
        gamma: [C', ...], of the norm; None if `normed` is empty.
        out: where the result goes; None if only `normed` is wanted.
        normed: where SiLU of the result's norm goes, frame by frame; empty if it is not wanted.
        top: first row of the result, counted in rows of the input.
        left: first column.
        adds: the result is added to what `out` holds.
        upsamples: each position of the input stands for 2 x 2; `top` and `left` count these.

    Memory: nothing, or one copy of the weight if its channels are not last.
    """
    torch.ops.wan21.vae_conv(window, weight, bias, gamma, out, normed, top, left, adds, upsamples)


def is_tf32(x: Tensor) -> bool:
    """Whether products of x are computed in TF32, as torch's own convolutions would."""
    return x.is_cuda and x.dtype == torch.float32 and bool(torch.backends.cudnn.allow_tf32)


def to_tf32(x: Tensor) -> Tensor:
    """Float32 values rounded to TF32's ten bits of mantissa, to the nearest; a copy."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _norm_silu_reference(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    scale = gamma.view(1, -1, 1, 1) * math.sqrt(frame.shape[1])
    smallest = max(1e-12, torch.finfo(frame.dtype).tiny)
    length = torch.linalg.vector_norm(frame, dim=1, keepdim=True).clamp(min=smallest)
    out.copy_(functional.silu(frame / length * scale))


def _conv_reference(
    window: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    out: Tensor | None,
    normed: list[Tensor],
    top: int,
    left: int,
    adds: bool,  # noqa: FBT001  # an operator's arguments come in a row
    upsamples: bool,  # noqa: FBT001
) -> None:
    num_frames = len(normed) if out is None else out.shape[2]
    frames = torch.stack(window, dim=2)
    if upsamples:
        frames = frames.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    num_missing = num_frames + weight.shape[2] - 1 - len(window)
    frames = functional.pad(frames, (1, 1, 1, 1, num_missing, 0))
    height, width = (normed[0] if out is None else out).shape[-2:]
    result = functional.conv3d(frames, weight, bias)[..., top : top + height, left : left + width]
    if out is not None:
        result = out.add_(result) if adds else out.copy_(result)
    if gamma is not None:
        for i, frame in enumerate(normed):
            _norm_silu_reference(result[:, :, i], gamma, frame)


def _norm_silu_on_cuda(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    from wan21.kernels.gpu import vae

    vae.norm_silu(frame, gamma, out, rounds=is_tf32(frame))


def _conv_on_cuda(
    window: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    out: Tensor | None,
    normed: list[Tensor],
    top: int,
    left: int,
    adds: bool,  # noqa: FBT001
    upsamples: bool,  # noqa: FBT001
) -> None:
    from wan21.kernels.gpu import vae

    c_out, c_in = weight.shape[:2]
    num_frames = len(normed) if out is None else out.shape[2]
    blocks = blocks_for(c_in, c_out, num_frames, weight.element_size(), vae.shared_bytes(weight.device))
    flags = {"adds": adds, "upsamples": upsamples, "in_tf32": is_tf32(weight)}
    vae.conv(window, weight, bias, gamma, out, normed, top, left, **flags, blocks=blocks)


def _nothing(*_: object) -> None:
    """The shape of no result."""


_LIBRARY.define("vae_norm_silu(Tensor frame, Tensor gamma, Tensor(a!) out) -> ()")
_LIBRARY.define(
    "vae_conv(Tensor[] window, Tensor weight, Tensor bias, Tensor? gamma, Tensor(a!)? out, Tensor(b!)[] normed, "
    "int top, int left, bool adds, bool upsamples) -> ()"
)
for _name, _reference, _cuda in (
    ("vae_norm_silu", _norm_silu_reference, _norm_silu_on_cuda),
    ("vae_conv", _conv_reference, _conv_on_cuda),
):
    _LIBRARY.impl(_name, _reference, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"wan21::{_name}", _nothing, lib=_LIBRARY)

CONV = torch.ops.wan21.vae_conv.default
"""What `conv` calls, for those who listen to operations."""
