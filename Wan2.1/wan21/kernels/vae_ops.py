"""The operations that our kernels do for the VAE, as torch operators: a profiler names them, fake tensors pass through.

On CUDA they are the Triton kernels of `wan21.kernels.gpu.vae`; on a CPU plain torch, which says what they compute.
Triton is imported at the first launch: PyTorch's builds without CUDA bring none.

All tensors of frames are [B, C, H, W] with channels last, dense; `out` is [B, C', T, H', W'], channels last, dense.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from wan21.kernels.vae_blocks import blocks_for


@torch.library.custom_op("wan21::vae_norm_silu", mutates_args=("out",), device_types="cpu")
def norm_silu(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Writes SiLU of the root-mean-square norm over channels of a frame into `out`, of the same shape.

    Where convolutions compute in TF32, the result is rounded to it: nothing else reads it.
    """
    out.copy_(_norm_silu(frame, gamma))


@norm_silu.register_kernel("cuda")
def _(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    from wan21.kernels.gpu import vae as gpu_vae

    gpu_vae.norm_silu(frame, gamma, out)


@norm_silu.register_fake
def _(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    pass


@torch.library.custom_op("wan21::vae_conv", mutates_args=("out", "normed"), device_types="cpu")
def conv(
    window: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    out: Tensor | None,
    normed: list[Tensor],
    top: int,
    left: int,
    adds: bool,  # noqa: FBT001  # an operator's arguments have no keywords-only part in torch 2.6
    upsamples: bool,  # noqa: FBT001
) -> None:
    """A convolution of 3 x 3 positions and some frames, with zeros around each frame, and what follows it.

    Args:
        window: the input's frames with those before them in front. Frames that are missing in front are zeros.
        weight: [C', C, taps, 3, 3], or [C', C, 3, 3] for one tap.
        bias: [C'].
        gamma: [C', ...], of the norm; None if `normed` is empty.
        out: where the result goes; None if only `normed` is wanted.
        normed: where SiLU of the result's norm goes, frame by frame; empty if it is not wanted.
        top: first row of the result, counted in rows of the input.
        left: first column.
        adds: the result is added to what `out` holds.
        upsamples: each position of the input stands for 2 x 2; `top` and `left` count these.

    Memory: one copy of the weight; nothing else.
    """
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
    for i, frame in enumerate(normed):
        if gamma is not None:
            frame.copy_(_norm_silu(result[:, :, i], gamma))


@conv.register_kernel("cuda")
def _(
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
    from wan21.kernels.gpu import vae as gpu_vae

    num_frames = len(normed) if out is None else out.shape[2]
    c_out, c_in = weight.shape[:2]
    shared_bytes = gpu_vae.shared_bytes(weight.device)
    blocks = blocks_for(c_in, c_out, num_frames, weight.element_size(), shared_bytes=shared_bytes)
    gpu_vae.conv(
        window,
        gpu_vae.packed(weight),
        bias,
        gamma,
        out,
        normed,
        top,
        left,
        adds=adds,
        upsamples=upsamples,
        blocks=blocks,
    )


@conv.register_fake
def _(*_: object) -> None:
    pass


def _norm_silu(frame: Tensor, gamma: Tensor) -> Tensor:
    scale = gamma.view(1, -1, 1, 1) * math.sqrt(frame.shape[1])
    smallest = max(1e-12, torch.finfo(frame.dtype).tiny)
    length = torch.linalg.vector_norm(frame, dim=1, keepdim=True).clamp(min=smallest)
    return functional.silu(frame / length * scale)
