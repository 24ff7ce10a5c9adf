"""Times the VAE's decoder on a GPU: each convolution by cuDNN and by our kernel, then whole videos both ways.

Why: the table in `wan21.kernels.vae_blocks` and what the documentation says of the decoder come from here. For each
shape all candidate block shapes are compiled in processes of their own, timed in this one, and compared with cuDNN's
result; nothing is started after the time budget. Weights and inputs are random.

    python scripts/bench_vae.py                  # videos first, then candidates until the time is over
    python scripts/bench_vae.py --seconds 0      # no candidates: only what the table holds
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from wan21.kernels.vae_blocks import Blocks, blocks_for, candidates, fits_one_program
from wan21.kernels.vae_ops import is_tf32, to_tf32
from wan21.models import WAN_VAE
from wan21.runtime import Runtime, make_runtime
from wan21.vae import WHOLE, Budget, DecodePlan, Vae
from wan21.vae.warm_up import warm_up
from wan21.weights.load import materialize, module_shapes
from wan21.weights.random import RandomSource
from wan_sweep.units import format_gib, format_seconds

REPEATS = 5
NUM_PROCESSES = 12
COMPILED_BEFORE_SECONDS = 45
MOST_ROWS = 10
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A convolution of the decoder at 832 x 480: `frames` output frames, `count` times for each latent frame."""

    c_in: int
    c_out: int
    frames: int
    height: int
    width: int
    count: int
    upsamples: bool = False

    @property
    def taps(self) -> int:
        """Frames that an output frame depends on."""
        return 1 if self.upsamples else 3

    @property
    def flop(self) -> int:
        """Of one call."""
        return 2 * self.taps * 9 * self.c_in * self.c_out * self.frames * self.height * self.width

    def __str__(self) -> str:
        arrow = "^" if self.upsamples else ">"
        return f"{self.c_in}{arrow}{self.c_out} x {self.frames} x {self.height} x {self.width}"


SHAPES = (
    Shape(96, 96, 4, 480, 832, 6),
    Shape(192, 192, 4, 240, 416, 6),
    Shape(384, 384, 2, 120, 208, 5),
    Shape(192, 96, 4, 480, 832, 1, upsamples=True),
    Shape(384, 192, 4, 240, 416, 1, upsamples=True),
    Shape(192, 384, 2, 120, 208, 1),
    Shape(96, 3, 4, 480, 832, 1),
)


def random(*size: int, dtype: torch.dtype) -> Tensor:
    """Normal values on the GPU, channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    values = torch.randn(size, device="cuda", dtype=dtype)
    return values.contiguous(memory_format=formats[len(size)]) if len(size) in formats else values


@dataclass(frozen=True)
class Tensors:
    """What a convolution needs, for any height and width; the weight with channels last, as the decoder has it."""

    window: list[Tensor]
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    out: Tensor
    normed: list[Tensor]

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, height: int, width: int) -> "Tensors":
        """Random ones."""
        lower = 2 if shape.upsamples else 1
        size = (1, shape.c_in, height // lower, width // lower)
        window = [random(*size, dtype=dtype) for _ in range(shape.frames + shape.taps - 1)]
        kernel = (3, 3) if shape.upsamples else (3, 3, 3)
        weight = random(shape.c_out, shape.c_in, *kernel, dtype=dtype) / (9 * shape.taps * shape.c_in) ** 0.5
        weight = to_tf32(weight) if is_tf32(weight) else weight
        return cls(
            window,
            weight,
            random(shape.c_out, dtype=dtype),
            1 + 0.1 * random(shape.c_out, dtype=dtype),
            torch.zeros_like(random(1, shape.c_out, shape.frames, height, width, dtype=dtype)),
            [random(1, shape.c_out, height, width, dtype=dtype) for _ in range(shape.frames)],
        )

    def ours(self, shape: Shape, blocks: Blocks, *, norms: bool) -> None:
        """Our kernel, as the decoder calls it: with the residual's addition and, if asked, the norm behind it."""
        from wan21.kernels.gpu.vae import conv

        is_block = shape.c_in == shape.c_out
        gamma, normed = (self.gamma, self.normed) if norms else (None, [])
        kinds = {"adds": is_block, "upsamples": shape.upsamples, "blocks": blocks, "in_tf32": is_tf32(self.weight)}
        conv(self.window, self.weight, self.bias, gamma, self.out, normed, 0, 0, **kinds)

    def joined(self, shape: Shape) -> Tensor:
        """What cuDNN's convolution reads."""
        if not shape.upsamples:
            return torch.stack(self.window, dim=2).contiguous(memory_format=torch.channels_last_3d)
        frames = torch.cat(self.window)
        return functional.interpolate(frames, scale_factor=2, mode="nearest-exact")

    def cudnn(self, shape: Shape, x: Tensor) -> Tensor:
        """The plain convolution of what `joined` returns."""
        if shape.upsamples:
            return functional.conv2d(x, self.weight, self.bias, padding=1)
        return functional.conv3d(x, self.weight, self.bias, padding=(0, 1, 1))


def seconds_of(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a call on the GPU, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return median(times)


def compile_one(shape: Shape, dtype: torch.dtype, blocks: Blocks) -> float:
    """Compiles kernels by running them on a picture of one tile, so that they are in Triton's cache; seconds."""
    started = time.perf_counter()
    tensors = Tensors.make(shape, dtype, 16, 16)
    for norms in {False, norms_of(shape, blocks)}:
        tensors.ours(shape, blocks, norms=norms)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def norms_of(shape: Shape, blocks: Blocks) -> bool:
    """Whether these blocks can normalise, and the decoder asks for it."""
    return fits_one_program(shape.c_out) and sum(blocks.channels) >= shape.c_out and shape.c_out > 3


def error_of(tensors: Tensors, shape: Shape, blocks: Blocks, expected: Tensor) -> float:
    """The largest difference to cuDNN's result, whose values have order 1."""
    tensors.out.zero_()
    tensors.ours(shape, blocks, norms=False)
    out = tensors.out.transpose(1, 2).flatten(0, 1) if shape.upsamples else tensors.out
    return (out.float() - expected.float()).abs().max().item()


def say(what: str, seconds: float, flop: float, rest: str = "") -> None:
    """A row."""
    print(f"    {what:<36}{seconds * 1e3:>9.3f} ms{flop / seconds / 1e12:>8.0f} TFLOP/s  {rest}", flush=True)


def bench_convolutions(deadline: float | None) -> None:
    """The table of convolutions: all candidates until the deadline, or without one what the table holds."""
    found = defaultdict(list)
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        jobs: dict[Future[float], tuple[Shape, str, Blocks]] = {}
        plans = [
            (shape, name, tries(shape, name, everything=deadline is not None)) for name in DTYPES for shape in SHAPES
        ]
        for row in zip_longest(*(blocks for *_, blocks in plans)):
            for (shape, name, _), blocks in zip(plans, row, strict=True):
                if blocks is not None:
                    jobs[pool.submit(compile_one, shape, DTYPES[name], blocks)] = (shape, name, blocks)
        for job in as_completed(jobs):
            shape, name, blocks = jobs[job]
            problem = job.exception()
            if problem is None:
                found[shape, name].append(blocks)
            else:
                print(f"{shape} {name} {words(blocks)}: {str(problem).splitlines()[0][:90]}")
            if deadline is not None and time.perf_counter() > deadline - COMPILED_BEFORE_SECONDS:
                break
        pool.shutdown(wait=False, cancel_futures=True)
    for (shape, name), compiled in sorted(found.items(), key=lambda item: (item[0][1], SHAPES.index(item[0][0]))):
        if deadline is None or time.perf_counter() < deadline:
            bench_shape(shape, name, compiled)
            torch.cuda.empty_cache()


def bench_shape(shape: Shape, name: str, compiled: list[Blocks]) -> None:
    """The convolution by cuDNN, and ours for each way to cut it, the fastest first."""
    print(f"--- {shape}, {name}, {shape.count} times for each latent frame")
    tensors = Tensors.make(shape, DTYPES[name], shape.height, shape.width)
    x = tensors.joined(shape)
    expected = tensors.cudnn(shape, x)
    say("cuDNN", seconds_of(lambda: tensors.cudnn(shape, x)), shape.flop)
    rows = []
    for blocks in compiled:
        error = error_of(tensors, shape, blocks, expected)
        plain = seconds_of(lambda blocks=blocks: tensors.ours(shape, blocks, norms=False))
        rest = f"largest difference {error:.1e}"
        if norms_of(shape, blocks):
            normed = seconds_of(lambda blocks=blocks: tensors.ours(shape, blocks, norms=True))
            rest = f"with norm {normed * 1e3:.3f} ms, {rest}"
        rows.append((plain, words(blocks), rest))
    for plain, label, rest in sorted(rows)[:MOST_ROWS]:
        say(label, plain, shape.flop, rest)


def words(blocks: Blocks) -> str:
    """A way to cut in short."""
    n1, n2 = blocks.channels
    way = "shared" if blocks.shares else "single"
    size = f"f{blocks.frames} {blocks.tile_h}x{blocks.tile_w} k{blocks.k} n{n1}+{n2}"
    return f"{size} {way} w{blocks.num_warps} s{blocks.num_stages}"


def tries(shape: Shape, name: str, *, everything: bool) -> list[Blocks]:
    """All candidates, or what the table holds."""
    size = (shape.c_in, shape.c_out, shape.frames, DTYPES[name].itemsize)
    return list(candidates(*size, shape.taps)) if everything else [blocks_for(*size)]


def make_vae(dtype: torch.dtype, runtime: Runtime) -> Vae:
    """With random weights, without the encoder."""
    with torch.device("meta"):
        vae = Vae(WAN_VAE, dtype=dtype)
    vae.drop_encoder()
    materialize(vae, RandomSource("vae", module_shapes(vae), 0, runtime.generator), runtime.device)
    return vae


def decode(vae: Vae, latents: Tensor, plan: DecodePlan, runtime: Runtime) -> tuple[float, str, Tensor]:
    """Seconds, peaks beside the weights in words, and the video's start on the host."""
    start: list[Tensor] = []
    for piece in vae.decode_pieces(latents[:, :, :3], plan):
        start.append(piece.pixels.cpu())
        del piece
    runtime.synchronize()
    runtime.empty_cache()
    runtime.reset_memory_peaks()
    before, started = runtime.memory(), time.perf_counter()
    for _ in vae.decode_pieces(latents, plan):
        pass
    runtime.synchronize()
    seconds, after = time.perf_counter() - started, runtime.memory()
    peaks = f"{format_gib(after.allocated_peak_bytes - before.allocated_bytes):>10}"
    peaks += f"{format_gib(after.reserved_peak_bytes - before.reserved_bytes):>10}"
    return seconds, peaks, torch.cat([pixels.flatten() for pixels in start])


def bench_decodes(runtime: Runtime) -> None:
    """Whole videos, both ways, with peaks and the largest difference to the plain way."""
    for name, dtype in DTYPES.items():
        started = time.perf_counter()
        warm_up(WAN_VAE, dtype, runtime)
        print(f"{name}: kernels compiled in {format_seconds(time.perf_counter() - started)}", flush=True)
    head = f"{'seconds':>9}{'allocated':>10}{'reserved':>10} GiB"
    print(f"\n{'81 frames':<36}{head}   difference to torch in the first 9: largest, mean")
    for name, dtype in DTYPES.items():
        vae = make_vae(dtype, runtime)
        for size, (t, h, w) in LATENTS.items():
            latents = torch.randn(1, WAN_VAE.z_dim, t, h, w, device="cuda", generator=runtime.generator(1))
            plans = {"whole": WHOLE}
            if size == "480p":
                budget = Budget(vae.decoder, (t, h, w), itemsize=dtype.itemsize)
                plans["tiles"] = budget.best_plan(2**28 * dtype.itemsize)
            for label, plan in plans.items():
                reference = None
                for kernels in ("torch", "fused"):
                    vae.decoder.kernels = kernels
                    seconds, peaks, start = decode(vae, latents, plan, runtime)
                    difference = 0 * start if reference is None else (start - reference).abs()
                    reference = start if reference is None else reference
                    row = f"{f'{size} {name} {label} {kernels}':<36}{format_seconds(seconds):>9}{peaks}"
                    print(f"{row}       {difference.max().item():.2e} {difference.mean().item():.2e}", flush=True)
        if dtype == torch.float32:
            print(exact_difference(vae, runtime))
            rounding()
        profile(vae, name, runtime)
        del vae
        runtime.empty_cache()


def rounding() -> None:
    """How cuDNN makes TF32 of float32, by which of these ways gives the same as it."""
    from wan21.kernels.gpu.vae import conv

    def half_to_even(x: Tensor) -> Tensor:
        bits = x.view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)

    shape = Shape(96, 96, 4, 48, 80, 1)
    window = [random(1, 96, 48, 80, dtype=torch.float32) for _ in range(6)]
    weight, bias = random(96, 96, 3, 3, 3, dtype=torch.float32) / 50, random(96, dtype=torch.float32)
    x = torch.stack(window, dim=2).contiguous(memory_format=torch.channels_last_3d)
    expected = functional.conv3d(x, weight, bias, padding=(0, 1, 1))
    out = torch.empty_like(expected, memory_format=torch.channels_last_3d)
    blocks = blocks_for(shape.c_in, shape.c_out, shape.frames, 4)
    for name, made in (("cut off", lambda x: x), ("half away from zero", to_tf32), ("half to even", half_to_even)):
        flags = {"adds": False, "upsamples": False, "in_tf32": True}
        conv([made(frame) for frame in window], made(weight), bias, None, out, [], 0, 0, **flags, blocks=blocks)
        difference = (out - expected).abs()
        print(f"TF32, {name}: {difference.max().item():.1e} at most, {difference.mean().item():.1e} mean from cuDNN")


def exact_difference(vae: Vae, runtime: Runtime) -> str:
    """How far TF32 takes either way from float32 products."""
    _, h, w = LATENTS["480p"]
    latents = torch.randn(1, WAN_VAE.z_dim, 3, h, w, device="cuda", generator=runtime.generator(1))
    videos = {}
    for kernels in ("torch", "fused"):
        vae.decoder.kernels = kernels
        videos[kernels] = decode(vae, latents, WHOLE, runtime)[2]
    vae = make_vae(torch.float32, runtime)  # with weights that nobody has rounded
    torch.backends.cudnn.allow_tf32 = False
    exact = decode(vae, latents, WHOLE, runtime)[2]
    torch.backends.cudnn.allow_tf32 = True
    lines = []
    for kernels, video in videos.items():
        difference = (video - exact).abs()
        lines.append(f"  TF32 {kernels} against float32: {difference.max():.2e} at most, {difference.mean():.2e} mean")
    return "\n".join(lines)


def profile(vae: Vae, name: str, runtime: Runtime) -> None:
    """Where the time of either way goes: the kernels that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    _, h, w = LATENTS["480p"]
    latents = torch.randn(1, WAN_VAE.z_dim, 6, h, w, device="cuda", generator=runtime.generator(1))
    for kernels in ("torch", "fused"):
        vae.decoder.kernels = kernels
        with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in vae.decode_pieces(latents):
                pass
            runtime.synchronize()
        rows = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
        total = sum(row.device_time_total for row in rows)
        print(f"\n{name} {kernels}, 21 frames, 480p: {format_seconds(total / 1e6)} on the GPU")
        for row in rows[:14]:
            print(f"{row.device_time_total / 1e3:>9.2f} ms {row.count:>5} x  {row.key[:96]}", flush=True)


def main() -> None:
    """Entry point."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="time for everything; 0: no candidates")
    parser.add_argument("--no-decode", action="store_true", help="convolutions only")
    arguments = parser.parse_args()
    runtime = make_runtime("cuda")
    print(runtime.facts(), f"torch {torch.__version__}")
    with torch.no_grad():
        if not arguments.no_decode:
            bench_decodes(runtime)
        bench_convolutions(started + arguments.seconds if arguments.seconds else None)


if __name__ == "__main__":
    main()
