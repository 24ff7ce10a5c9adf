"""The VAE's convolution as one Triton kernel: an implicit matrix product, with what stands around it in its two ends.

A program computes a tile of tile_h x tile_w positions in a group of frames at once, for all output channels if they
fit its registers; all groups are one launch, for in a tile of the picture one of them has too few programs for all
multiprocessors. It reads each tile of an input frame once for all output frames that need it: with four output frames
half as much passes from the L2 cache as with one, and it is this that bounds a convolution of 96 channels. A number of
channels that is no power of two is the sum of two that are (96 = 64 + 32), each with sums of its own.

Nothing is joined or padded: earlier frames are tensors of their own, positions outside the frame read as zero, and of
a tile of the picture only what is needed is computed.

Written for NVIDIA GPUs with tensor cores; it runs in Triton's interpreter, too. Only `wan21.kernels.vae_ops` imports
this module, and only where it launches.

Letters: B videos; C, C' input and output channels; H, W of the frames.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton import language as tl

from wan21.kernels.vae_blocks import Blocks


@triton.jit
def _rounded(values, rounds: tl.constexpr):
    """The same values with TF32's ten bits of mantissa, to the nearest: tensor cores would cut the rest off."""
    if rounds:
        bits = (values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def _with_product(sums, index: tl.constexpr, values, weights, precision: tl.constexpr):
    """The sums with a product added to one of them."""
    found = ()
    for i in tl.static_range(len(sums)):
        if i == index:
            found = found + (tl.dot(values, weights, sums[i], input_precision=precision),)
        else:
            found = found + (sums[i],)
    return found


@triton.jit
def _of_group(tensors, group, count: tl.constexpr, step: tl.constexpr, num_groups: tl.constexpr):
    """Of tensors in a row the `count` ones from `group` x `step` on."""
    found = ()
    for i in tl.static_range(count):
        one = tensors[i]
        for g in tl.static_range(1, num_groups):
            one = tl.where(group == g, tensors[g * step + i], one)
        found = found + (one,)
    return found


@triton.jit
def _zeros(count: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros((rows, cols), tl.float32),)
    return sums


@triton.jit
def _finished(sums, bias, out, channels, mask, adds: tl.constexpr, keeps: tl.constexpr, c_out: tl.constexpr):
    """The sums with bias and with what `out` holds, which they replace."""
    values = sums + tl.load(bias + channels, mask=channels < c_out, other=0.0).to(tl.float32)[None, :]
    if adds:
        values += tl.load(out + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    if keeps:
        tl.store(out + channels[None, :], values.to(out.dtype.element_ty), mask=mask)
    return values


@triton.jit
def _normed(values, scale, gamma, channels, rounds: tl.constexpr, c_out: tl.constexpr):
    factors = tl.load(gamma + channels, mask=channels < c_out, other=0.0).to(tl.float32)
    values = values * scale[:, None] * factors[None, :]
    return _rounded(values * tl.sigmoid(values), rounds)


@triton.jit
def _places(y, x, tap, c, height, width, c_in: tl.constexpr, block_k: tl.constexpr, upsamples: tl.constexpr):
    """Where in a frame [H, W, C] a tap's channels lie for the positions (y, x), and which of them are there."""
    y = y + tap // 3 - 1
    x = x + tap % 3 - 1
    inside = (y >= 0) & (x >= 0)
    if upsamples:
        inside = inside & (y < 2 * height) & (x < 2 * width)
        y = y // 2
        x = x // 2
    else:
        inside = inside & (y < height) & (x < width)
    mask = inside[:, None]
    if c_in % block_k:
        mask = mask & (c < c_in)[None, :]
    return (y * width + x)[:, None] * c_in + c[None, :], mask


@triton.jit
def _weights(row, c, n, row_length: tl.constexpr, c_in: tl.constexpr, c_out: tl.constexpr, is_padded: tl.constexpr):
    """A tap's weights [channels in, channels out]."""
    if is_padded:
        return tl.load(row + n[None, :] * row_length, mask=(c < c_in)[:, None] & (n < c_out)[None, :], other=0.0)
    return tl.load(row + n[None, :] * row_length)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "top", "left", "missing"])
def conv_kernel(
    frames, weight, bias, gamma, results, normed,
    height, width, out_height, out_width, top, left, missing,
    c_in: tl.constexpr, c_out: tl.constexpr, num_groups: tl.constexpr, num_frames: tl.constexpr,
    num_taps: tl.constexpr, tile_h: tl.constexpr, tile_w: tl.constexpr, block_k: tl.constexpr, wide: tl.constexpr,
    narrow: tl.constexpr, upsamples: tl.constexpr, shares: tl.constexpr, adds: tl.constexpr, keeps: tl.constexpr,
    norms: tl.constexpr, precision: tl.constexpr, rounds: tl.constexpr,
):  # fmt: skip
    """See `conv`."""
    num_parts: tl.constexpr = (c_out + wide + narrow - 1) // (wide + narrow)
    chunks: tl.constexpr = (c_in + block_k - 1) // block_k
    row_length: tl.constexpr = num_taps * 9 * c_in
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    frames = _of_group(frames, group, num_frames + num_taps - 1, num_frames, num_groups)
    normed = _of_group(normed, group, num_frames, num_frames, num_groups)
    missing = missing - group * num_frames
    tile = program // num_parts
    first = (program % num_parts) * (wide + narrow)
    tiles_w = tl.cdiv(out_width, tile_w)
    positions = tl.arange(0, tile_h * tile_w)
    y = (tile // tiles_w) * tile_h + positions // tile_w
    x = (tile % tiles_w) * tile_w + positions % tile_w
    n1 = first + tl.arange(0, wide)
    sums1 = _zeros(num_frames, tile_h * tile_w, wide)
    if narrow > 0:
        n2 = first + wide + tl.arange(0, narrow)
        sums2 = _zeros(num_frames, tile_h * tile_w, narrow)
    is_padded: tl.constexpr = c_in % block_k != 0 or c_out % (wide + narrow) != 0
    ks = tl.arange(0, block_k)
    batch_start = batch * height * width * c_in
    # Weights lie as [C', taps in time, 3, 3, C].
    if shares:
        for step in range(9 * chunks):
            tap = step // chunks
            c = (step % chunks) * block_k + ks
            offsets, mask = _places(y + top, x + left, tap, c, height, width, c_in, block_k, upsamples)
            weights1 = ()
            weights2 = ()
            for dt in tl.static_range(num_taps):
                row = weight + (dt * 9 + tap) * c_in + c[:, None]
                weights1 = weights1 + (_weights(row, c, n1, row_length, c_in, c_out, is_padded),)
                if narrow > 0:
                    weights2 = weights2 + (_weights(row, c, n2, row_length, c_in, c_out, is_padded),)
            for i in tl.static_range(num_frames + num_taps - 1):
                values = tl.load(frames[i] + batch_start + offsets, mask=mask & (i >= missing), other=0.0)
                values = _rounded(values, rounds and upsamples)
                for dt in tl.static_range(num_taps):
                    if i >= dt and i - dt < num_frames:
                        sums1 = _with_product(sums1, i - dt, values, weights1[dt], precision)
                        if narrow > 0:
                            sums2 = _with_product(sums2, i - dt, values, weights2[dt], precision)
    else:
        for step in range(num_taps * 9 * chunks):
            dt = step % num_taps
            tap = step // num_taps // chunks
            c = (step // num_taps % chunks) * block_k + ks
            offsets, mask = _places(y + top, x + left, tap, c, height, width, c_in, block_k, upsamples)
            row = weight + (dt * 9 + tap) * c_in + c[:, None]
            weights1 = _weights(row, c, n1, row_length, c_in, c_out, is_padded)
            if narrow > 0:
                weights2 = _weights(row, c, n2, row_length, c_in, c_out, is_padded)
            for j in tl.static_range(num_frames):
                frame = frames[j]
                for i in tl.static_range(1, num_taps):
                    frame = tl.where(dt == i, frames[j + i], frame)
                values = tl.load(frame + batch_start + offsets, mask=mask & (j + dt >= missing), other=0.0)
                values = _rounded(values, rounds and upsamples)
                sums1 = _with_product(sums1, j, values, weights1, precision)
                if narrow > 0:
                    sums2 = _with_product(sums2, j, values, weights2, precision)
    is_out = ((y < out_height) & (x < out_width))[:, None]
    mask1 = is_out & (n1 < c_out)[None, :]
    offsets = (y * out_width + x)[:, None] * c_out
    # Results lie as [B, T, H, W, C'], what is normalised as [B, H, W, C'] for each frame.
    frame_length = out_height.to(tl.int64) * out_width * c_out
    results += (batch * (num_groups * num_frames) + group * num_frames) * frame_length
    for j in tl.static_range(num_frames):
        out = results + j * frame_length + offsets
        values1 = _finished(sums1[j], bias, out, n1, mask1, adds, keeps, c_out)
        if narrow > 0:
            values2 = _finished(sums2[j], bias, out, n2, is_out, adds, keeps, c_out)
        if norms:
            squares = tl.sum(values1 * values1, 1)
            if narrow > 0:
                squares += tl.sum(values2 * values2, 1)
            scale = tl.sqrt(c_out * 1.0) / tl.maximum(tl.sqrt(squares), 1e-12)
            out = normed[j] + batch * frame_length + offsets
            values1 = _normed(values1, scale, gamma, n1, rounds, c_out)
            tl.store(out + n1[None, :], values1.to(out.dtype.element_ty), mask=mask1)
            if narrow > 0:
                values2 = _normed(values2, scale, gamma, n2, rounds, c_out)
                tl.store(out + n2[None, :], values2.to(out.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["num_positions"])
def norm_silu_kernel(
    frame, gamma, out, num_positions,
    dim: tl.constexpr, block_c: tl.constexpr, block: tl.constexpr, rounds: tl.constexpr,
):  # fmt: skip
    """See `norm_silu`."""
    positions = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    channels = tl.arange(0, block_c)
    offsets = positions[:, None] * dim + channels[None, :]
    mask = (positions < num_positions)[:, None] & (channels < dim)[None, :]
    values = tl.load(frame + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.sqrt(dim * 1.0) / tl.maximum(tl.sqrt(tl.sum(values * values, 1)), 1e-12)
    values = _normed(values, scale, gamma, channels, rounds, dim)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


@cache
def shared_bytes(device: torch.device) -> int:
    """What a program may have of a multiprocessor's shared memory."""
    utils = triton.runtime.driver.active.utils
    return int(utils.get_device_properties(device.index or 0)["max_shared_mem"])


def conv(
    window: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    out: Tensor | None,
    normed: Sequence[Tensor],
    top: int,
    left: int,
    *,
    adds: bool,
    upsamples: bool,
    in_tf32: bool,
    blocks: Blocks,
) -> None:
    """What `wan21.kernels.vae_ops.conv` says, with the kernel."""
    weight = weight.movedim(1, -1).contiguous()
    num_frames = len(normed) if out is None else out.shape[2]
    batch, c_in, height, width = window[0].shape
    c_out, taps = weight.shape[0], weight.shape[1] if weight.ndim == 5 else 1
    out_height, out_width = (normed[0] if out is None else out).shape[-2:]
    num_missing = num_frames + taps - 1 - len(window)
    # A tensor that is not there is stood for by one that is; the kernel does not touch it.
    some = window[0]
    shown = (*(some,) * num_missing, *window)
    n1, n2 = blocks.channels
    # Python's own division, for the host is timed here: `triton.cdiv` took a quarter of what a launch takes.
    num_programs = -(-out_height // blocks.tile_h) * -(-out_width // blocks.tile_w) * -(-c_out // (n1 + n2))
    conv_kernel[num_programs, batch, num_frames // blocks.frames](
        shown,
        weight,
        bias,
        some if gamma is None else gamma,
        some if out is None else out,
        tuple(normed) or (some,) * num_frames,
        height,
        width,
        out_height,
        out_width,
        top,
        left,
        num_missing,
        c_in=c_in,
        c_out=c_out,
        num_groups=num_frames // blocks.frames,
        num_frames=blocks.frames,
        num_taps=taps,
        tile_h=blocks.tile_h,
        tile_w=blocks.tile_w,
        block_k=blocks.k,
        wide=n1,
        narrow=n2,
        upsamples=upsamples,
        shares=blocks.shares,
        adds=adds,
        keeps=out is not None,
        norms=bool(normed),
        precision="tf32" if in_tf32 else "ieee",
        rounds=in_tf32,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def norm_silu(frame: Tensor, gamma: Tensor, out: Tensor, *, rounds: bool) -> None:
    """What `wan21.kernels.vae_ops.norm_silu` says for one frame [B, C, H, W], with the kernel."""
    dim = frame.shape[1]
    num_positions = frame.numel() // dim
    block_c = 1 << (dim - 1).bit_length()
    block = max(1, 4096 // block_c)
    norm_silu_kernel[(-(-num_positions // block),)](
        frame, gamma, out, num_positions, dim=dim, block_c=block_c, block=block, rounds=rounds, num_warps=4
    )
