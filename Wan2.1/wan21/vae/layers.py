"""The layers of the VAE, all of them causal in time and written for tensors in channels-last order.

Channels last means [B, C, T, H, W] laid out as B, T, H, W, C. Convolutions are faster that way and need no hidden
workspace (for 96 channels at 832 x 480 it would be 1.4 GiB), each frame is one piece of memory, and going over to
single frames [B * T, C, H, W] and to attention's [B * T, H * W, C] are views. Other layouts compute the same.

Without gradients a tensor that nobody else needs is overwritten; with gradients nothing is.

Letters: B videos; C channels; T, H, W frames, height and width of the layer at hand.

Reference: Wan2.1 (arXiv 2503.20314), the section on the spatio-temporal VAE.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wan21.vae.past import Past
from wan21.vae.tiles import Interval, Window, Windows

KERNEL = 3


class CausalConv3d(nn.Conv3d):
    """A convolution with zeros around each frame and nothing in front of the first: `Past.extend` puts that there.

    A sequence shorter than the kernel stands for one with zero frames in front. They would add nothing, so the part of
    the kernel that meets them is left out: a first frame, or an image, costs a third of the work and no padding.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kernel: tuple[int, int, int] = (KERNEL, KERNEL, KERNEL), *, dtype: torch.dtype
    ) -> None:
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_dim, out_dim, kernel, padding=padding, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves [B, C, T + 2, H, W] (or a single, shorter window) to [B, C', T, H, W]."""
        num_missing = max(0, self.weight.shape[2] - x.shape[2])
        return functional.conv3d(x, self.weight[:, :, num_missing:], self.bias, padding=self.padding)


class RmsNorm(nn.Module):
    """Scales each position's channel vector to length sqrt(C), then each channel by `gamma`.

    Args:
        dim: C.
        num_axes: axes behind the channels, 3 for videos and 2 for frames.
        dtype: of the parameter.
    """

    def __init__(self, dim: int, *, num_axes: int = 3, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * num_axes, dtype=dtype))

    def forward(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """Normalises [B, C, ...], into x itself if that is allowed and no gradients are kept.

        Memory: one copy of x, or none; the lengths are [B, 1, ...].
        """
        scale = self.gamma * math.sqrt(x.shape[1])
        # 1e-12 is zero in float16, where a zero vector would become NaN.
        smallest = max(1e-12, torch.finfo(x.dtype).tiny)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=smallest)
        if torch.is_grad_enabled():
            return x / length * scale
        x = x.div_(length) if overwrite else x / length
        return x.mul_(scale)


def norm_silu_conv(
    pairs: Sequence[tuple[nn.Module, nn.Module]], x: Tensor, past: Past, *, overwrite: bool = False
) -> Tensor:
    """Applies norm, SiLU and causal convolution for each pair (norm, convolution) in turn.

    Args:
        pairs: the layers.
        x: [B, C, T, H, W].
        past: of this pass.
        overwrite: the caller has no more use for the values of x.

    Returns:
        [B, C', T, H, W].

    Memory: beside x, at a convolution, its input [B, C, T + 2, H, W] and its output.
    """
    for norm, conv in pairs:
        x = norm(x, overwrite=overwrite)
        x = functional.silu(x, inplace=not torch.is_grad_enabled())
        # A line of its own: the shorter tensor is free before the convolution starts.
        x = past.extend(conv, x)
        x = past.crop(conv, conv(x))
        overwrite = True
    return x


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input, which is projected if the widths differ.

    The numbers in `residual` are the checkpoint's.
    """

    def __init__(self, in_dim: int, out_dim: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RmsNorm(in_dim, dtype=dtype),
                "2": CausalConv3d(in_dim, out_dim, dtype=dtype),
                "3": RmsNorm(out_dim, dtype=dtype),
                "6": CausalConv3d(out_dim, out_dim, dtype=dtype),
            }
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1, dtype=dtype) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Maps [B, C, T, H, W] to [B, C', T, H, W].

        Memory: at the peak, in either convolution, 3T + 2 frames of activations (x, padded input, output).
        """
        layers = self.residual
        residual = norm_silu_conv(((layers["0"], layers["2"]), (layers["3"], layers["6"])), x, past)
        # In place is safe with gradients, too: no backward needs the value of a convolution's output.
        return residual.add_(past.crop(self, self.shortcut(x)))

    def windows(self, kept: Interval, into: Windows) -> Interval:
        """The rows of the input on which the rows `kept` of the result depend; notes what each convolution computes."""
        between = kept.grown()
        needed = between.grown()
        into[self.residual["2"]] = Window(computed=needed, kept=between)
        into[self.residual["6"]] = Window(computed=between, kept=kept)
        into[self] = Window(computed=needed, kept=kept)
        return needed


# Reshaping happens with the channels behind. An axis of length 1 that is made in front of the channels gets a stride in
# which convolutions cannot see that channels come last; what they return, and all that follows, is laid out otherwise
# then: slower, and with hidden copies of each convolution's input and result.


def frames_of(x: Tensor) -> Tensor:
    """The frames [B * T, C, H, W] of [B, C, T, H, W]: a view, if channels come last."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def video_of(frames: Tensor, num_videos: int) -> Tensor:
    """The videos [B, C, T, H, W] with the frames [B * T, C, H, W]: a view."""
    return frames.permute(0, 2, 3, 1).unflatten(0, (num_videos, -1)).permute(0, 4, 1, 2, 3)


class AttentionBlock(nn.Module):
    """Attention with one head among the positions of each frame, added to the input."""

    def __init__(self, dim: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(dim, num_axes=2, dtype=dtype)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to the same shape.

        Memory: beside x, queries, keys, values and result, 4 times the size of x.
        """
        batch, _, _, height, _ = x.shape
        qkv = self.to_qkv(self.norm(frames_of(x)))
        qkv = qkv.flatten(2).transpose(1, 2).unsqueeze(1)  # [B * T, 1, H * W, 3 * C]
        q, k, v = qkv.chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(q, k, v)
        del qkv, q, k, v
        frames = attended.squeeze(1).unflatten(1, (height, -1)).permute(0, 3, 1, 2)  # [B * T, C, H, W]
        del attended
        return video_of(self.proj(frames), batch).add_(x)


class Downsample(nn.Module):
    """Halves height and width and, where asked, the number of frames after the first.

    Args:
        dim: C.
        in_time: whether frames are halved, too.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, *, in_time: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, KERNEL, stride=2, dtype=dtype))
        self.time_conv = nn.Conv3d(dim, dim, (KERNEL, 1, 1), stride=(2, 1, 1), dtype=dtype) if in_time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Maps [B, C, T, H, W] to [B, C, T', H / 2, W / 2], where T' is T / 2 in time, but 1 for the first frame.

        Memory: beside x, a padded copy of it.
        """
        x = video_of(self.resample(frames_of(x)), x.shape[0])
        if self.time_conv is None:
            return x
        x = past.extend(self.time_conv, x, num_frames=1)
        return x if past.is_first else self.time_conv(x)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, where asked, doubles the number of frames after the first.

    Args:
        dim: C.
        in_time: whether frames are doubled, too.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, *, in_time: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            # It only copies values, so it is exact in any number format.
            nn.Upsample(scale_factor=2, mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, KERNEL, padding=1, dtype=dtype),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (KERNEL, 1, 1), dtype=dtype) if in_time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Maps [B, C, T, H, W] to [B, C / 2, T', 2H, 2W], where T' is 2T in time, but 1 for the first frame.

        The first frame is no part of the later ones' past: the second sees zeros.

        Memory: the enlarged input [B, C, T', 2H, 2W] and the output.
        """
        x = self.in_time(x, past)
        return past.crop(self, video_of(self.resample(frames_of(x)), x.shape[0]))

    def in_time(self, x: Tensor, past: Past) -> Tensor:
        """The first half of `forward`: [B, C, T', H, W], or x itself where frames are not doubled."""
        if self.time_conv is None or past.is_first:
            return x
        x = past.extend(self.time_conv, x)
        return _interleave(self.time_conv(x))

    def windows(self, kept: Interval, into: Windows) -> Interval:
        """The rows of the input on which the rows `kept` of the result depend; notes what the convolution computes."""
        needed = kept.grown().halved()
        into[self] = Window(computed=needed.doubled(), kept=kept)
        return needed


def _interleave(x: Tensor) -> Tensor:
    """Makes two consecutive frames of the two halves of each frame's channels: [B, 2C, T, H, W] to [B, C, 2T, H, W]."""
    halves = x.permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
    halves = halves.permute(0, 1, 4, 2, 3, 5).contiguous()  # copies; [B, T, 2, H, W, C]
    return halves.flatten(1, 2).permute(0, 4, 1, 2, 3)
