"""The decoder's convolutional layers with kernels of our own: the same layers, in fewer passes over fewer bytes.

What a convolution reads is kept as single frames [B, C, H, W], channels last. Those of earlier chunks are remembered as
they are, so nothing is joined, padded or copied. Norm and SiLU happen where the layer before writes its result, the
enlarging where a convolution reads, a residual's addition where it writes, in place.

Letters: B videos; C channels; T, H, W frames, height and width of the layer at hand.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from wan21.errors import UsageError
from wan21.kernels import vae_ops
from wan21.kernels.vae_blocks import fits_one_program
from wan21.vae.layers import ResidualBlock, RmsNorm, Upsample
from wan21.vae.past import Past


def run(layers: Sequence[nn.Module], given: list[Tensor], past: Past) -> Tensor:
    """What `layers` make of a tensor [B, C, T, H, W], one after the other.

    Args:
        layers: an `Upsample` first, then such and `ResidualBlock`, and at the end perhaps the decoder's head.
        given: the tensor, channels last, in a list that is emptied: it is let go of as soon as the first layer is done.
        past: of this pass.

    Raises:
        UsageError: gradients are kept, which the kernels know nothing of.

    Memory: beside the past, 12 frames in a residual block for T = 4: its input, which becomes its result, and the
    inputs of two convolutions.
    """
    if torch.is_grad_enabled():
        raise UsageError("kernels=fused computes no gradients; choose kernels=torch, or call it under torch.no_grad()")
    conv: nn.Conv2d | nn.Conv3d
    x = given.pop()
    normed: list[Tensor] = []  # what the norm before the next layer made of x
    for index, layer in enumerate(layers):
        norm = _first_norm(layers[index + 1]) if index + 1 < len(layers) else None
        # Each value is let go of as soon as the next one is there, which is why this is one function.
        if isinstance(layer, Upsample):
            x = layer.in_time(x, past)
            normed = frames_in(x)
            conv = cast("nn.Conv2d", layer.resample[1])
            kept = past.kept(layer, (2 * x.shape[3], 2 * x.shape[4]))
            x = _new_video(x, conv.out_channels, x.shape[2], kept)
            normed = _convolve(conv, normed, norm, x, kept, upsamples=True)
        elif isinstance(layer, ResidualBlock):
            first, second = (cast("nn.Conv3d", layer.residual[name]) for name in ("2", "6"))
            x = past.crop(layer, layer.shortcut(x)).contiguous(memory_format=torch.channels_last_3d)
            kept = past.kept(first, normed[0].shape[2:])
            normed = _convolve(first, normed, cast("RmsNorm", layer.residual["3"]), None, kept, past=past)
            kept = past.kept(second, normed[0].shape[2:])
            normed = _convolve(second, normed, norm, x, kept, past=past, adds=True)
        else:
            conv = cast("nn.Conv3d", cast("nn.ModuleDict", layer)["2"])
            kept = past.kept(conv, normed[0].shape[2:])
            x = _new_video(x, conv.out_channels, len(normed), kept)
            normed = _convolve(conv, normed, None, x, kept, past=past)
    return x


def lay_out(layers: Sequence[nn.Module]) -> None:
    """Puts weights of convolutions in the order in which kernels read them, rounded if TF32 is what computes.

    Memory: in passing, one weight.
    """
    for layer in layers:
        for conv in layer.modules():
            if isinstance(conv, nn.Conv2d | nn.Conv3d) and conv.kernel_size[-1] > 1:
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                weight = conv.weight.data.contiguous(memory_format=formats[conv.weight.ndim])
                conv.weight.data = vae_ops.to_tf32(weight) if vae_ops.is_tf32(weight) else weight


def _first_norm(layer: nn.Module) -> RmsNorm | None:
    """The norm with which a layer begins, if it does."""
    if isinstance(layer, Upsample):
        return None
    parts = layer.residual if isinstance(layer, ResidualBlock) else cast("nn.ModuleDict", layer)
    return cast("RmsNorm", parts["0"])


def _convolve(
    conv: nn.Conv3d | nn.Conv2d,
    frames: list[Tensor],
    norm: RmsNorm | None,
    out: Tensor | None,
    kept: tuple[slice, slice],
    *,
    past: Past | None = None,
    adds: bool = False,
    upsamples: bool = False,
) -> list[Tensor]:
    """Convolves frames into `out`, and returns what norm and SiLU make of the result, frame by frame.

    Args:
        conv: with taps in time it has a past.
        frames: of the chunk.
        norm: None if nothing is to be normalised.
        out: [B, C', T, H', W'], or None if the result itself is not wanted.
        kept: rows and columns of the result that are computed.
        past: of this pass.
        adds: the result is added to what is in `out`.
        upsamples: frames are read enlarged.
    """
    window = frames if past is None else past.window(conv, frames)
    # Zeros stand before a lone frame; the taps that would meet them are left out.
    weight = conv.weight[:, :, -1:] if past is not None and len(window) == 1 else conv.weight
    gamma = norm.gamma if norm is not None and fits_one_program(conv.out_channels) else None
    if out is None and gamma is None:
        out = _new_video(frames[0], conv.out_channels, len(frames), kept)
    normed = [] if gamma is None else [_new_frame(frames[0], conv.out_channels, kept) for _ in frames]
    top, left = kept[0].start, kept[1].start
    vae_ops.conv(
        window, weight, cast("Tensor", conv.bias), gamma, out, normed, top, left, adds=adds, upsamples=upsamples
    )
    if norm is None or out is None or gamma is not None:
        return normed
    for frame in frames_in(out):
        normed.append(torch.empty_like(frame))
        vae_ops.norm_silu(frame, norm.gamma, normed[-1])
    return normed


def frames_in(x: Tensor) -> list[Tensor]:
    """The frames [B, C, H, W] of x [B, C, T, H, W], channels last: views, if that is how they lie for one video."""
    return [frame.contiguous(memory_format=torch.channels_last) for frame in x.unbind(2)]


def _new_frame(like: Tensor, dim: int, kept: tuple[slice, slice]) -> Tensor:
    """Memory for a frame [B, dim, H, W] of the rows and columns `kept`."""
    size = (like.shape[0], dim, *(part.stop - part.start for part in kept))
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _new_video(like: Tensor, dim: int, num_frames: int, kept: tuple[slice, slice]) -> Tensor:
    """Memory for frames [B, dim, T, H, W] of the rows and columns `kept`."""
    size = (like.shape[0], dim, num_frames, *(part.stop - part.start for part in kept))
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)
