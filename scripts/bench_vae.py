"""Times the VAE's decoder on a GPU: each convolution by cuDNN and by our kernel, then whole videos both ways.

Why: the table in `wan21.kernels.vae_blocks` and what the documentation says of the decoder come from here. For each
shape all candidate block shapes are compiled in processes of their own, timed in this one, and compared with cuDNN's
result; nothing is started after the time budget. Weights and inputs are random.

    python scripts/bench_vae.py                # all of it, some 150 s
    python scripts/bench_vae.py --seconds 0    # no candidates: only what the table holds
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from wan21.config import WAN_VAE
from wan21.kernels.vae_blocks import Blocks, blocks_for, candidates, fits_one_program
from wan21.runtime import Runtime, make_runtime
from wan21.vae import WHOLE, Budget, DecodePlan, Vae
from wan21.weights.load import materialize, module_shapes
from wan21.weights.random import RandomSource
from wan_sweep.units import format_gib, format_seconds

REPEATS = 5
NUM_PROCESSES = 12
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
    """What a convolution needs, for any height and width; `packed` is the weight as our kernel reads it."""

    window: list[Tensor]
    weight: Tensor
    packed: Tensor
    bias: Tensor
    gamma: Tensor
    out: Tensor
    normed: list[Tensor]

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, height: int, width: int) -> "Tensors":
        """Random ones."""
        from wan21.kernels.vae_triton import packed

        lower = 2 if shape.upsamples else 1
        size = (1, shape.c_in, height // lower, width // lower)
        window = [random(*size, dtype=dtype) for _ in range(shape.frames + shape.taps - 1)]
        kernel = (3, 3) if shape.upsamples else (3, 3, 3)
        weight = random(shape.c_out, shape.c_in, *kernel, dtype=dtype) / (9 * shape.taps * shape.c_in) ** 0.5
        return cls(
            window,
            weight,
            packed(weight),
            random(shape.c_out, dtype=dtype),
            1 + 0.1 * random(shape.c_out, dtype=dtype),
            torch.zeros_like(random(1, shape.c_out, shape.frames, height, width, dtype=dtype)),
            [random(1, shape.c_out, height, width, dtype=dtype) for _ in range(shape.frames)],
        )

    def ours(self, shape: Shape, blocks: Blocks, *, norms: bool) -> None:
        """Our kernel, as the decoder calls it: with the residual's addition and, if asked, the norm behind it."""
        from wan21.kernels.vae_triton import conv

        is_block = shape.c_in == shape.c_out
        gamma, normed = (self.gamma, self.normed) if norms else (None, [])
        kinds = {"adds": is_block, "upsamples": shape.upsamples, "blocks": blocks}
        conv(self.window, self.packed, self.bias, gamma, self.out, normed, 0, 0, **kinds)

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
    """Compiles a kernel by running it on a picture of one tile, so that it is in Triton's cache; seconds."""
    started = time.perf_counter()
    Tensors.make(shape, dtype, 16, 16).ours(shape, blocks, norms=norms_of(shape, blocks))
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


def say(shape: object, what: str, seconds: float, flop: float, rest: str = "") -> None:
    """A row."""
    print(f"{shape!s:<24}{what:<44}{seconds * 1e3:>9.3f} ms{flop / seconds / 1e12:>8.0f} TFLOP/s  {rest}", flush=True)


def bench_convolutions(seconds: float) -> None:
    """The table of convolutions."""
    deadline = time.perf_counter() + seconds
    todo = defaultdict(list)
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        jobs: dict[Future[float], tuple[Shape, str, Blocks]] = {}
        plans = [(shape, name, list(tries(shape, name, seconds))) for shape in SHAPES for name in DTYPES]
        for rank in range(max(len(blocks) for *_, blocks in plans)):
            for shape, name, blocks in plans:
                if rank < len(blocks):
                    jobs[pool.submit(compile_one, shape, DTYPES[name], blocks[rank])] = (shape, name, blocks[rank])
        for job in as_completed(jobs):
            todo[jobs[job][:2]].append((jobs[job][2], job.exception(), None if job.exception() else job.result()))
            if seconds and time.perf_counter() > deadline:
                break
        pool.shutdown(wait=False, cancel_futures=True)
    compiled = [took for found in todo.values() for _, _, took in found if took is not None]
    print(f"{len(compiled)} kernels compiled, {format_seconds(median(compiled))} each\n")
    for (shape, name), found in sorted(todo.items(), key=lambda item: (SHAPES.index(item[0][0]), item[0][1])):
        print(f"--- {shape}, {name}, {shape.count} times for each latent frame")
        tensors = Tensors.make(shape, DTYPES[name], shape.height, shape.width)
        x = tensors.joined(shape)
        expected = tensors.cudnn(shape, x)
        say(shape, "cuDNN", seconds_of(lambda s=shape, t=tensors, x=x: t.cudnn(s, x)), shape.flop)
        rows = []
        for blocks, problem, took in found:
            label = f"f{blocks.frames} {blocks.tile_h}x{blocks.tile_w} k{blocks.k} n{blocks.channels[0]}"
            label += f"+{blocks.channels[1]} w{blocks.num_warps} s{blocks.num_stages}"
            if problem is not None:
                print(f"{label}: {str(problem).splitlines()[0][:110]}")
                continue
            error = error_of(tensors, shape, blocks, expected)
            plain = seconds_of(lambda s=shape, t=tensors, b=blocks: t.ours(s, b, norms=False))
            rest = f"largest difference {error:.1e}, compiled in {took:.1f} s"
            if norms_of(shape, blocks):
                normed = seconds_of(lambda s=shape, t=tensors, b=blocks: t.ours(s, b, norms=True))
                rest = f"with norm {normed * 1e3:.3f} ms, {rest}"
            rows.append((plain, label, rest))
        for plain, label, rest in sorted(rows):
            say("", label, plain, shape.flop, rest)
        del tensors, x, expected
    torch.cuda.empty_cache()


def tries(shape: Shape, name: str, seconds: float) -> Iterator[Blocks]:
    """All candidates, or if there is no time what the table holds."""
    size = (shape.c_in, shape.c_out, shape.frames, DTYPES[name].itemsize)
    if seconds:
        yield from candidates(*size)
    else:
        yield blocks_for(*size)


def make_vae(dtype: torch.dtype, runtime: Runtime) -> Vae:
    """With random weights, without the encoder."""
    with torch.device("meta"):
        vae = Vae(WAN_VAE, dtype=dtype)
    vae.drop_encoder()
    materialize(vae, RandomSource("vae", module_shapes(vae), 0, runtime.generator), runtime.device)
    return vae


def decode(vae: Vae, latents: Tensor, plan: DecodePlan, runtime: Runtime) -> tuple[float, str, Tensor]:
    """Seconds, peaks beside the weights in words, and the video on the host."""
    num_frames, height, width = (4 * latents.shape[2] - 3, 8 * latents.shape[3], 8 * latents.shape[4])
    video = torch.empty(1, 3, num_frames, height, width)
    for _ in vae.decode_pieces(latents[:, :, :3], plan):
        pass
    runtime.synchronize()
    runtime.empty_cache()
    runtime.reset_memory_peaks()
    before = runtime.memory()
    started = time.perf_counter()
    for _ in vae.decode_pieces(latents, plan):
        pass
    runtime.synchronize()
    seconds, after = time.perf_counter() - started, runtime.memory()
    peaks = f"{format_gib(after.allocated_peak_bytes - before.allocated_bytes):>8}"
    peaks += f"{format_gib(after.reserved_peak_bytes - before.reserved_bytes):>8}"
    for piece in vae.decode_pieces(latents, plan):
        video[:, :, piece.frames, piece.rows, piece.cols] = piece.pixels.cpu()
        del piece
    return seconds, peaks, video


def bench_decodes(runtime: Runtime) -> None:
    """Whole videos, both ways, with peaks and the largest difference to the plain way."""
    print(
        f"\n{'81 frames':<36}{'seconds':>9}{'GiB allocated':>15}{'reserved':>9}  largest and mean difference to torch"
    )
    for name, dtype in DTYPES.items():
        vae = make_vae(dtype, runtime)
        for size, (t, h, w) in LATENTS.items():
            latents = torch.randn(1, WAN_VAE.z_dim, t, h, w, device="cuda", generator=runtime.generator(1))
            budget = Budget(vae.decoder, (t, h, w), itemsize=dtype.itemsize)
            plans = {"whole": WHOLE}
            if size == "480p":
                plans |= {"single frames": DecodePlan(frames_at_once=1), "tiles": budget.best_plan(2**28 * dtype.itemsize)}
            reference = None
            for label, plan in plans.items():
                for kernels in ("torch", "triton"):
                    vae.decoder.kernels = kernels
                    seconds, peaks, video = decode(vae, latents, plan, runtime)
                    reference = video if reference is None else reference
                    difference = (video - reference).abs()
                    row = f"{f'{size} {name} {label} {kernels}':<36}{format_seconds(seconds):>9}       {peaks}"
                    print(f"{row}     {difference.max().item():.2e} {difference.mean().item():.2e}", flush=True)
            if size == "480p":
                precise = exact_difference(vae, latents[:, :, :5], runtime) if dtype == torch.float32 else ""
                print(precise, end="")
        profile(vae, name, runtime)
        del vae
        runtime.empty_cache()


def exact_difference(vae: Vae, latents: Tensor, runtime: Runtime) -> str:
    """How far TF32 takes either way from float32 products."""
    videos = {}
    for kernels in ("torch", "triton"):
        vae.decoder.kernels = kernels
        videos[kernels] = decode(vae, latents, WHOLE, runtime)[2]
    vae.decoder.kernels = "torch"
    torch.backends.cudnn.allow_tf32 = False
    exact = decode(vae, latents, WHOLE, runtime)[2]
    torch.backends.cudnn.allow_tf32 = True
    lines = []
    for kernels, video in videos.items():
        difference = (video - exact).abs()
        lines.append(f"  TF32 {kernels} against float32: {difference.max():.2e} at most, {difference.mean():.2e} mean")
    return "\n".join(lines) + "\n"


def profile(vae: Vae, name: str, runtime: Runtime) -> None:
    """Where the time of our way goes: the kernels that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    t, h, w = LATENTS["480p"]
    latents = torch.randn(1, WAN_VAE.z_dim, 6, h, w, device="cuda", generator=runtime.generator(1))
    for kernels in ("torch", "triton"):
        vae.decoder.kernels = kernels
        with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in vae.decode_pieces(latents):
                pass
            runtime.synchronize()
        rows = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
        total = sum(row.device_time_total for row in rows)
        print(f"\n{name} {kernels}, 21 frames, 480p: {format_seconds(total / 1e6)} on the GPU")
        for row in rows[:14]:
            print(f"{row.device_time_total / 1e3:>9.2f} ms {row.count:>5} x  {row.key[:96]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=70.0, help="for compiling candidates; 0: only the table's rows"
    )
    parser.add_argument("--no-decode", action="store_true", help="convolutions only")
    arguments = parser.parse_args()
    runtime = make_runtime("cuda")
    print(runtime.facts(), f"torch {torch.__version__}")
    with torch.no_grad():
        bench_convolutions(arguments.seconds)
        if not arguments.no_decode:
            bench_decodes(runtime)


if __name__ == "__main__":
    main()
