"""Times decoding in tiles of several shapes, frames on the host included: a line for each shape.

Why: tiles of equal work take different times, for small ones leave part of a GPU idle; `Budget.cost` says how much by
arithmetic, and this says what is true. Weights and latents are random.

    python scripts/bench_tiles.py                                            # 832*480 in bf16, on a GPU
    python scripts/bench_tiles.py --size '1280*720' --tiles 1x1 1x3 2x2 1x4 1x5
    python scripts/bench_tiles.py --model tiny --size 96*64 --frame_num 9 --device cpu --kernels torch --tiles 1x1 1x2

First is the first decoding in a shape, which looks for cuDNN's kernels and fills the allocator, as one in a job does.
Seconds are the median of the repeats, by the host, around work that has ended; busy is how long kernels and copies ran
in one more decoding under torch's profiler. Cost and work are those of `Budget` beside the first shape's, peaks those
of the allocator with the weights, and the last column counts pixels that differ from the first shape's.
"""

import argparse
import time
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wan21.assets import open_assets
from wan21.components import DTYPES, Components
from wan21.decoding import decode, departures
from wan21.events import SILENT
from wan21.models import model_spec
from wan21.options import Options
from wan21.parallel.world import ALONE
from wan21.request import make_request
from wan21.runtime import Runtime, make_runtime
from wan21.vae import Budget, DecodePlan, Vae
from wan21.vae.warm_up import warm_up
from wan_sweep.report.cells import Column
from wan_sweep.report.markdown import table
from wan_sweep.units import GIB

TITLES = (
    "tiles",
    "first",
    "seconds",
    "least",
    "most",
    "busy",
    "cost",
    "work",
    "allocated GiB",
    "reserved GiB",
    "other pixels",
)


def timed(vae: Vae, latents: torch.Tensor, plan: DecodePlan, runtime: Runtime) -> tuple[float, torch.Tensor]:
    """Seconds, and the video."""
    runtime.synchronize()
    started = time.perf_counter()
    with departures(vae, latents.shape, plan, ALONE, runtime) as leaving:
        video = decode(vae, latents, plan, ALONE, leaving, is_image=False)
    if video is None:
        raise RuntimeError("a process alone gets the video")
    return time.perf_counter() - started, video


def busy_seconds(vae: Vae, latents: torch.Tensor, plan: DecodePlan, runtime: Runtime) -> float:
    """How long the GPU was at work; one stream has it all, so nothing of it overlaps."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        timed(vae, latents, plan, runtime)
    events = recorded.events() or ()
    return sum(event.device_time for event in events if event.device_type == DeviceType.CUDA) / 1e6


def main() -> None:
    """Decodes in each shape of tiles."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="t2v-1.3B", help="task and architecture")
    flags.add_argument("--size", help="WIDTH*HEIGHT; default: the model's")
    flags.add_argument("--frame_num", type=int, help="frames; default: the model's")
    flags.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where")
    flags.add_argument("--kernels", default="fused", choices=("fused", "torch"), help="of the decoder")
    flags.add_argument("--precision", default="bf16", choices=tuple(DTYPES), help="of the VAE")
    flags.add_argument("--repeats", type=int, default=3, help="decodings that are timed")
    flags.add_argument("--tiles", nargs="+", default=["1x1", "1x3", "2x2", "1x4", "1x5", "2x3"], help="ROWSxCOLS")
    chosen = flags.parse_args()
    spec, runtime = model_spec(chosen.model), make_runtime(chosen.device)
    request = make_request(spec, seed=0, size=chosen.size, frame_num=chosen.frame_num)
    options = Options(vae_precision=chosen.precision, kernels=chosen.kernels)
    runtime.warm_up()
    if chosen.kernels == "fused":
        warm_up(spec.vae, DTYPES[chosen.precision], runtime)
    assets = open_assets(spec, options, runtime)
    vae: Vae = Components(spec, options, assets.weights, runtime, SILENT, ALONE).vae(encodes=False).module
    t, h, w = request.shape.latent
    latents = torch.randn(1, spec.vae.z_dim, t, h, w, generator=runtime.generator(1), device=runtime.device)
    budget = Budget(vae.decoder, (t, h, w), itemsize=DTYPES[chosen.precision].itemsize)
    rows, first = [], None
    with torch.no_grad():
        for tiles in chosen.tiles:
            num_rows, num_cols = map(int, tiles.split("x"))
            plan = DecodePlan(num_tile_rows=num_rows, num_tile_cols=num_cols)
            runtime.empty_cache()
            runtime.reset_memory_peaks()
            first_seconds, video = timed(vae, latents, plan, runtime)
            memory = runtime.memory()
            first = first or (plan, video)
            seconds = [timed(vae, latents, plan, runtime)[0] for _ in range(chosen.repeats)]
            busy = busy_seconds(vae, latents, plan, runtime) if chosen.device == "cuda" else 0.0
            ratios = (of(plan) / of(first[0]) for of in (budget.cost, budget.work))
            peaks = (memory.allocated_peak_bytes / GIB, memory.reserved_peak_bytes / GIB)
            numbers = (first_seconds, median(seconds), min(seconds), max(seconds), busy, *ratios, *peaks)
            rows.append([tiles, *(f"{number:.3f}" for number in numbers), str(int((video != first[1]).sum()))])
            print(" ".join(rows[-1]), flush=True)
    facts = f"torch {torch.__version__}, {runtime.facts()}"
    print(f"\n{request.size}, {request.frame_num} frames, {chosen.precision}, {chosen.kernels}; {facts}\n")
    cells = zip(*rows, strict=True)
    print(table([Column(title=(title,), cells=column) for title, column in zip(TITLES, cells, strict=True)]))


if __name__ == "__main__":
    main()
