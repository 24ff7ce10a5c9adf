"""The VAE's convolution as one Triton kernel: an implicit matrix product, with what stands around it in its two ends.

A program computes a tile of tile_h x tile_w positions in several frames at once, for all output channels if they fit
its registers. It reads each tile of an input frame once for all output frames that need it: with four output frames
half as much passes from the L2 cache as with one, and it is this that bounds a convolution of 96 channels. A number of
channels that is no power of two is the sum of two that are (96 = 64 + 32), each with sums of its own.

Nothing is joined or padded: earlier frames are tensors of their own, positions outside the frame read as zero, and of
a tile of the picture only what is needed is computed.

Written for NVIDIA GPUs with tensor cores; it runs in Triton's interpreter, too. Only `wan21.kernels.vae_ops` imports
this module, and only where it launches.

Letters: B videos; C, C' input and output channels; H, W of the frames.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan21.kernels.vae_blocks import Blocks


@triton.jit
def _rounded(values, TO_TF32: tl.constexpr):
    """The same values with TF32's ten bits of mantissa, to the nearest: tensor cores would cut the rest off."""
    if TO_TF32:
        bits = (values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def _with_product(sums, index: tl.constexpr, values, weights, PRECISION: tl.constexpr):
    """The sums with a product added to one of them."""
    found = ()
    for i in tl.static_range(len(sums)):
        if i == index:
            found = found + (tl.dot(values, weights, sums[i], input_precision=PRECISION),)
        else:
            found = found + (sums[i],)
    return found


@triton.jit
def _zeros(count: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros((rows, cols), tl.float32),)
    return sums


@triton.jit
def _finished(sums, bias, out, channels, mask, ADDS: tl.constexpr, KEEPS: tl.constexpr, C_OUT: tl.constexpr):
    """The sums with bias and with what `out` holds, which they replace."""
    values = sums + tl.load(bias + channels, mask=channels < C_OUT, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        values += tl.load(out + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    if KEEPS:
        tl.store(out + channels[None, :], values.to(out.dtype.element_ty), mask=mask)
    return values


@triton.jit
def _normed(values, scale, gamma, channels, TO_TF32: tl.constexpr, C_OUT: tl.constexpr):
    factors = tl.load(gamma + channels, mask=channels < C_OUT, other=0.0).to(tl.float32)
    values = values * scale[:, None] * factors[None, :]
    return _rounded(values * tl.sigmoid(values), TO_TF32)


@triton.jit
def _places(y, x, tap, c, height, width, C_IN: tl.constexpr, BLOCK_K: tl.constexpr, UPSAMPLES: tl.constexpr):
    """Where in a frame [H, W, C] a tap's channels lie for the positions (y, x), and which of them are there."""
    y = y + tap // 3 - 1
    x = x + tap % 3 - 1
    inside = (y >= 0) & (x >= 0)
    if UPSAMPLES:
        inside = inside & (y < 2 * height) & (x < 2 * width)
        y = y // 2
        x = x // 2
    else:
        inside = inside & (y < height) & (x < width)
    mask = inside[:, None]
    if C_IN % BLOCK_K:
        mask = mask & (c < C_IN)[None, :]
    return (y * width + x)[:, None] * C_IN + c[None, :], mask


@triton.jit
def _weights(row, c, n, K: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, IS_PADDED: tl.constexpr):
    """A tap's weights [channels in, channels out]."""
    if IS_PADDED:
        return tl.load(row + n[None, :] * K, mask=(c < C_IN)[:, None] & (n < C_OUT)[None, :], other=0.0)
    return tl.load(row + n[None, :] * K)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "top", "left", "missing", "out_positions"])
def conv_kernel(
    frames, weight, bias, gamma, outs, normed,
    height, width, out_height, out_width, top, left, missing, out_positions,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, FRAMES: tl.constexpr, TAPS: tl.constexpr, TILE_H: tl.constexpr,
    TILE_W: tl.constexpr, BLOCK_K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, UPSAMPLES: tl.constexpr,
    SHARES: tl.constexpr, ADDS: tl.constexpr, KEEPS: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr,
    TO_TF32: tl.constexpr,
):  # fmt: skip
    """See `conv`."""
    NUM_N: tl.constexpr = (C_OUT + N1 + N2 - 1) // (N1 + N2)
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    K: tl.constexpr = TAPS * 9 * C_IN
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    tile = program // NUM_N
    first = (program % NUM_N) * (N1 + N2)
    tiles_w = tl.cdiv(out_width, TILE_W)
    positions = tl.arange(0, TILE_H * TILE_W)
    y = (tile // tiles_w) * TILE_H + positions // TILE_W
    x = (tile % tiles_w) * TILE_W + positions % TILE_W
    n1 = first + tl.arange(0, N1)
    sums1 = _zeros(FRAMES, TILE_H * TILE_W, N1)
    if N2 > 0:
        n2 = first + N1 + tl.arange(0, N2)
        sums2 = _zeros(FRAMES, TILE_H * TILE_W, N2)
    IS_PADDED: tl.constexpr = C_IN % BLOCK_K != 0 or C_OUT % (N1 + N2) != 0
    ks = tl.arange(0, BLOCK_K)
    batch_start = batch * height * width * C_IN
    # Weights lie as [C', taps in time, 3, 3, C].
    if SHARES:
        for step in range(9 * CHUNKS):
            tap = step // CHUNKS
            c = (step % CHUNKS) * BLOCK_K + ks
            offsets, mask = _places(y + top, x + left, tap, c, height, width, C_IN, BLOCK_K, UPSAMPLES)
            weights1 = ()
            weights2 = ()
            for dt in tl.static_range(TAPS):
                row = weight + (dt * 9 + tap) * C_IN + c[:, None]
                weights1 = weights1 + (_weights(row, c, n1, K, C_IN, C_OUT, IS_PADDED),)
                if N2 > 0:
                    weights2 = weights2 + (_weights(row, c, n2, K, C_IN, C_OUT, IS_PADDED),)
            for i in tl.static_range(FRAMES + TAPS - 1):
                values = tl.load(frames[i] + batch_start + offsets, mask=mask & (i >= missing), other=0.0)
                for dt in tl.static_range(TAPS):
                    if i >= dt and i - dt < FRAMES:
                        sums1 = _with_product(sums1, i - dt, values, weights1[dt], PRECISION)
                        if N2 > 0:
                            sums2 = _with_product(sums2, i - dt, values, weights2[dt], PRECISION)
    else:
        for step in range(TAPS * 9 * CHUNKS):
            dt = step % TAPS
            tap = step // TAPS // CHUNKS
            c = (step // TAPS % CHUNKS) * BLOCK_K + ks
            offsets, mask = _places(y + top, x + left, tap, c, height, width, C_IN, BLOCK_K, UPSAMPLES)
            row = weight + (dt * 9 + tap) * C_IN + c[:, None]
            weights1 = _weights(row, c, n1, K, C_IN, C_OUT, IS_PADDED)
            if N2 > 0:
                weights2 = _weights(row, c, n2, K, C_IN, C_OUT, IS_PADDED)
            for j in tl.static_range(FRAMES):
                frame = frames[j]
                for i in tl.static_range(1, TAPS):
                    frame = tl.where(dt == i, frames[j + i], frame)
                values = tl.load(frame + batch_start + offsets, mask=mask & (j + dt >= missing), other=0.0)
                sums1 = _with_product(sums1, j, values, weights1, PRECISION)
                if N2 > 0:
                    sums2 = _with_product(sums2, j, values, weights2, PRECISION)
    is_out = ((y < out_height) & (x < out_width))[:, None]
    mask1 = is_out & (n1 < C_OUT)[None, :]
    offsets = (y * out_width + x)[:, None] * C_OUT
    for j in tl.static_range(FRAMES):
        out = outs[j] + batch * out_positions * C_OUT + offsets
        values1 = _finished(sums1[j], bias, out, n1, mask1, ADDS, KEEPS, C_OUT)
        if N2 > 0:
            values2 = _finished(sums2[j], bias, out, n2, is_out, ADDS, KEEPS, C_OUT)
        if NORMS:
            squares = tl.sum(values1 * values1, 1)
            if N2 > 0:
                squares += tl.sum(values2 * values2, 1)
            scale = tl.sqrt(C_OUT * 1.0) / tl.maximum(tl.sqrt(squares), 1e-12)
            out = normed[j] + batch * out_height * out_width * C_OUT + offsets
            values1 = _normed(values1, scale, gamma, n1, TO_TF32, C_OUT)
            tl.store(out + n1[None, :], values1.to(out.dtype.element_ty), mask=mask1)
            if N2 > 0:
                values2 = _normed(values2, scale, gamma, n2, TO_TF32, C_OUT)
                tl.store(out + n2[None, :], values2.to(out.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["num_positions"])
def norm_silu_kernel(
    frame, gamma, out, num_positions,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, TO_TF32: tl.constexpr,
):  # fmt: skip
    """See `norm_silu`."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_C)
    offsets = positions[:, None] * C + channels[None, :]
    mask = (positions < num_positions)[:, None] & (channels < C)[None, :]
    values = tl.load(frame + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.sqrt(C * 1.0) / tl.maximum(tl.sqrt(tl.sum(values * values, 1)), 1e-12)
    values = _normed(values, scale, gamma, channels, TO_TF32, C)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def packed(weight: Tensor) -> Tensor:
    """A convolution's weight [C', C, ...] as the kernel reads it, [C', ..., C], rounded if TF32 is what computes.

    Memory: one copy of the weight.
    """
    lying = weight.movedim(1, -1).contiguous()
    if is_tf32(weight):
        lying.view(torch.int32).add_(0x1000).bitwise_and_(-0x2000)
    return lying


def is_tf32(x: Tensor) -> bool:
    """Whether products of x are computed in TF32, as torch's own convolutions would."""
    return x.dtype == torch.float32 and bool(torch.backends.cudnn.allow_tf32)  # type: ignore[attr-defined]


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
    blocks: Blocks,
) -> None:
    """What `wan21.kernels.vae_ops.conv` says, with the kernel; `weight` as `packed` returns it."""
    num_frames = len(normed) if out is None else out.shape[2]
    batch, c_in, height, width = window[0].shape
    c_out, taps = weight.shape[0], weight.shape[1] if weight.ndim == 5 else 1
    out_height, out_width = (normed[0] if out is None else out).shape[-2:]
    num_missing = num_frames + taps - 1 - len(window)
    to_tf32 = is_tf32(weight)
    # A tensor that is not there is stood for by one that is; the kernel does not touch it.
    some = window[0]
    shown = (*(some,) * num_missing, *window)
    n1, n2 = blocks.channels
    num_programs = (
        triton.cdiv(out_height, blocks.tile_h) * triton.cdiv(out_width, blocks.tile_w) * triton.cdiv(c_out, n1 + n2)
    )
    for start in range(0, num_frames, blocks.frames):
        stop = start + blocks.frames
        conv_kernel[num_programs, batch](
            shown[start : stop + taps - 1],
            weight,
            bias,
            some if gamma is None else gamma,
            tuple(some if out is None else out[:, :, i] for i in range(start, stop)),
            tuple(normed[start:stop]) if normed else (some,) * blocks.frames,
            height,
            width,
            out_height,
            out_width,
            top,
            left,
            num_missing - start,
            0 if out is None else out.stride(0) // c_out,
            C_IN=c_in,
            C_OUT=c_out,
            FRAMES=blocks.frames,
            TAPS=taps,
            TILE_H=blocks.tile_h,
            TILE_W=blocks.tile_w,
            BLOCK_K=blocks.k,
            N1=n1,
            N2=n2,
            UPSAMPLES=upsamples,
            SHARES=blocks.shares,
            ADDS=adds,
            KEEPS=out is not None,
            NORMS=bool(normed),
            PRECISION="tf32" if to_tf32 else "ieee",
            TO_TF32=to_tf32,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )


def norm_silu(frame: Tensor, gamma: Tensor, out: Tensor) -> None:
    """What `wan21.kernels.vae_ops.norm_silu` says for one frame [B, C, H, W], with the kernel."""
    dim = frame.shape[1]
    num_positions = frame.numel() // dim
    block_c = triton.next_power_of_2(dim)
    block = max(1, 4096 // block_c)
    norm_silu_kernel[(triton.cdiv(num_positions, block),)](
        frame, gamma, out, num_positions, C=dim, BLOCK_C=block_c, BLOCK=block, TO_TF32=is_tf32(frame), num_warps=4
    )
