"""Where the time of a forward goes in each split: kernels, messages, and what of the messages is not hidden.

Why: a split that is slower than its share of the work loses time in messages that nothing hides, in kernels that are
too small to fill a GPU, in copies, or because the host cannot start kernels fast enough. This tells which.

How: torchrun --standalone --nproc-per-node=2 scripts/profile_splits.py      (t2v-1.3B: under a minute on two H100)
     torchrun --standalone --nproc-per-node=2 scripts/profile_splits.py --model t2v-14B --size '1280*720'
     torchrun --standalone --nproc-per-node=2 scripts/profile_splits.py --rows 131072 1024 --splits ulysses2
     python scripts/profile_splits.py --attention --model t2v-14B --size '1280*720' (a ring's kernels alone)
All ranks run each split that has as many ranks as there are processes, and the first runs one GPU by itself. Weights
are random. Of each split: the median of some forwards, timed with nothing else on (of cfg2 half a step, exchange
included); then one forward under torch's profiler on the first rank. The last line is JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from wan21.layout import SINGLE, Layout
from wan21.models import MODELS, model_spec
from wan21.options import Options
from wan21.request import make_request
from wan_sweep.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import torch

    from wan21.dit.context import Context
    from wan21.runtime import Runtime

SPLITS = {
    "single": SINGLE,
    **{f"ulysses{size}": Layout(ulysses=size) for size in (2, 4, 8)},
    **{f"ring{size}": Layout(ring=size) for size in (2, 4, 8)},
    "cfg2": Layout(cfg=2),
    "hybrid4": Layout(ulysses=2, ring=2),
    "hybrid8": Layout(ulysses=4, ring=2),
    "cfg_ulysses4": Layout(cfg=2, ulysses=2),
    "cfg_ulysses8": Layout(cfg=2, ulysses=4),
    **{f"fsdp{size}": Layout(ulysses=size, dit_fsdp=True) for size in (2, 4, 8)},
}
"""As the presets of conf/parallel, for the transformer alone."""

KINDS = {  # by what a kernel's name contains, the first that fits
    "messages": ("nccl",),
    "prompt": ("_attend",),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "xmma"),
    "ours": ("_modulate", "_rms_heads", "_add_gated", "_join"),
    "copies": ("memcpy", "copy", "cat"),
}
PROMPT_TOKENS = 100
"""About as many as the official prompts have."""

GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}

Interval = tuple[float, float]


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "rest")


def joined(intervals: Sequence[Interval]) -> list[Interval]:
    """The same time without overlaps."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Sequence[Interval]) -> float:
    """How long they are together, each moment once."""
    return sum(end - start for start, end in joined(intervals))


def account(events: Sequence[dict[str, Any]], top: int) -> dict[str, Any]:
    """Where the time of a trace's GPU went; seconds.

    Args:
        events: of a Chrome trace.
        top: how many kernels to name.
    """
    work = [
        (one["name"], one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6) for one in events if one.get("cat") in GPU_WORK
    ]
    spans = {kind: [(start, end) for name, start, end in work if kind_of(name) == kind] for kind in (*KINDS, "rest")}
    everything = [(start, end) for _, start, end in work]
    others = [one for kind, each in spans.items() if kind != "messages" for one in each]
    by_name: dict[str, list[float]] = {}
    for name, start, end in work:
        by_name.setdefault(name, []).append(end - start)
    ranked = sorted(by_name.items(), key=lambda one: -sum(one[1]))[:top]
    busy = joined(everything)
    return {
        "span_s": busy[-1][1] - busy[0][0] if busy else 0.0,
        "idle_s": sum(later[0] - earlier[1] for earlier, later in pairwise(busy)),
        "num_kernels": len(work),
        **{f"{kind}_s": length(each) for kind, each in spans.items()},
        "exposed_messages_s": length(everything) - length(others),
        "top": [{"name": name, "calls": len(each), "seconds": sum(each)} for name, each in ranked],
    }


class Bench:
    """A transformer with random weights in one split, and its forward."""

    def __init__(self, flags: argparse.Namespace, layout: Layout, rows: int | None, runtime: "Runtime") -> None:
        import torch

        from wan21.assets import open_assets
        from wan21.components import DTYPES, Components
        from wan21.dit.model import ForwardPlan
        from wan21.events import SILENT
        from wan21.guidance import guided_together
        from wan21.memory.slicing import choose_rows
        from wan21.parallel.tokens import shared_tokens
        from wan21.parallel.world import ALONE, connect

        spec = model_spec(flags.model)
        kernels = "fused" if runtime.device.type == "cuda" else "torch"
        options = Options(precision="bf16", kernels=kernels, rows_at_once=rows, layout=layout)
        world = ALONE if layout.world_size == 1 else connect(layout, runtime)
        components = Components(spec, options, open_assets(spec, options, runtime).weights, runtime, SILENT, world)
        dit, config = components.dit(), spec.dit
        shape = make_request(spec, seed=0, size=flags.size, frame_num=flags.frame_num).shape
        tokens = shared_tokens(shape.num_tokens, world, options.attention_kernel, is_fused=kernels == "fused")
        turns = tokens.own(dit.module.rotations(shape.grid, runtime.device), 0)
        most_rows = choose_rows(rows, turns.shape[0], config, DTYPES["bf16"].itemsize)
        plan = ForwardPlan(most_rows=most_rows, tokens=tokens)
        latents = torch.randn((1, config.out_dim, *shape.latent), generator=runtime.generator(0), device=runtime.device)
        context = dit.module.embed_text(
            [torch.ones(min(PROMPT_TOKENS, config.text_len), config.text_dim, device=runtime.device)]
        )
        self.time = dit.module.embed_time(500.0, runtime.device)

        def velocity(context: "Context") -> "torch.Tensor":
            velocity: torch.Tensor = dit.module(latents, self.time, context, turns=turns, plan=plan)
            return velocity

        self.forward: Callable[[], torch.Tensor] = lambda: velocity(context)
        if layout.cfg > 1:
            self.forward = lambda: guided_together(velocity, context, 5.0, world.cfg)
        self.seconds_to_forward = 1 / layout.cfg


def measure(flags: argparse.Namespace, name: str, rows: int | None, runtime: "Runtime") -> dict[str, Any]:
    """One split, on this rank."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    is_cuda = runtime.device.type == "cuda"
    with torch.no_grad():
        bench = Bench(flags, SPLITS[name], rows, runtime)
        bench.forward()
        seconds, launching = [], []
        runtime.reset_memory_peaks()
        for _ in range(flags.forwards):
            runtime.synchronize()
            began = time.perf_counter()
            bench.forward()
            launching.append(time.perf_counter() - began)
            runtime.synchronize()
            seconds.append(time.perf_counter() - began)
        found: dict[str, Any] = {"forward_s": bench.seconds_to_forward * median(seconds), "launch_s": median(launching)}
        if is_cuda:
            found["peak_bytes"] = runtime.memory().allocated_peak_bytes
        with tempfile.TemporaryDirectory() as folder:
            is_first = int(os.environ.get("RANK", "0")) == 0
            path = Path(flags.traces if flags.traces and is_first else folder, f"{name}_rows={rows}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            with profile(
                activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU],
                # A forward ahead, or one rank's messages would wait until the other's profiler has begun.
                schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            ) as profiler:
                for _ in range(2):
                    bench.forward()
                    runtime.synchronize()
                    profiler.step()
            if is_first:
                found |= account(json.loads(path.read_text())["traceEvents"], flags.top)
    return found


def show(name: str, found: dict[str, Any], alone_s: float | None) -> None:
    """Some lines for people."""
    gain = f", {alone_s / found['forward_s']:.2f}x" if alone_s else ""
    peak = f", peak {format_bytes(found['peak_bytes'])}" if "peak_bytes" in found else ""
    print(f"\n{name}: a forward {format_seconds(found['forward_s'])}{gain}{peak}")
    print(f"  host done after {format_seconds(found['launch_s'])}, {found['num_kernels']} kernels")
    parts = [f"{kind} {format_seconds(found[f'{kind}_s'])}" for kind in (*KINDS, "rest")]
    print(f"  profiled {format_seconds(found['span_s'])}: {', '.join(parts)}")
    print(f"  messages alone {format_seconds(found['exposed_messages_s'])}, nothing {format_seconds(found['idle_s'])}")
    for one in found["top"]:
        print(f"  {format_seconds(one['seconds']):>8} {one['calls']:>6} x {one['name'][:110]}")


def measure_splits(flags: argparse.Namespace) -> dict[str, Any]:
    """All splits of this number of processes, each on all of them, and one process by itself."""
    import gc

    import torch.distributed as dist

    from wan21.parallel.world import connect, local_device
    from wan21.runtime import make_runtime

    runtime = make_runtime(local_device(flags.device))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        connect(Layout(ring=size), runtime)  # makes torch's group, which all layouts then use
    runtime.warm_up()
    results: dict[str, Any] = {}
    alone_s = None
    names = flags.splits or list(SPLITS)
    for name in ["single", *(name for name in names if name != "single")]:
        layout = SPLITS[name]
        if layout.world_size not in {1, size} or (flags.splits and name not in flags.splits and size == 1):
            continue
        for rows in flags.rows if layout != SINGLE else flags.rows[:1]:
            words = name if rows is None else f"{name}, rows_at_once={rows}"
            if layout.world_size > 1 or rank == 0:
                results[words] = measure(flags, name, rows, runtime)
            if rank == 0:
                alone_s = alone_s or results[words]["forward_s"]
                show(words, results[words], alone_s)
            gc.collect()
            runtime.empty_cache()
            if size > 1:
                dist.barrier()
    if size > 1:
        dist.destroy_process_group()
    return results if rank == 0 else {}


def measure_attention(flags: argparse.Namespace) -> dict[str, Any]:
    """Rates of attention alone: of as many heads as pass at once, at the lengths of 1 to 8 ranks of a ring."""
    import torch

    from wan21.attention import attend, attend_with_lse
    from wan21.runtime import make_runtime

    runtime = make_runtime(flags.device)
    spec = model_spec(flags.model)
    config, shape = spec.dit, make_request(spec, seed=0, size=flags.size, frame_num=flags.frame_num).shape
    results: dict[str, Any] = {}
    for size in (1, 2, 4, 8):
        num_rows = -(-shape.num_tokens // size)
        all_heads = [torch.randn(1, num_rows, config.num_heads, config.head_dim, device=runtime.device) for _ in "qkv"]
        q, k, v = (one.bfloat16() for one in all_heads)
        for heads in sorted({config.num_heads, *range(1, config.num_heads // 3 + 1)}):
            parts = [one[:, :, :heads] for one in (q, k, v)]
            for name, kernel in (("plain", attend), ("with lse", attend_with_lse)):
                seconds = []
                for _ in range(4):
                    runtime.synchronize()
                    began = time.perf_counter()
                    kernel(*parts)
                    runtime.synchronize()
                    seconds.append(time.perf_counter() - began)
                rate = 4 * num_rows**2 * heads * config.head_dim / min(seconds) / 1e12
                results[f"{num_rows} rows, {heads} heads, {name}"] = rate
                print(f"{num_rows:>6} rows, {heads:>2} heads, {name:>8}: {rate:.0f} TFLOP/s", flush=True)
    return results


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="t2v-1.3B")
    parser.add_argument("--size", help="WIDTH*HEIGHT; default: the model's")
    parser.add_argument("--frame-num", type=int, help="default: the model's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--splits", nargs="+", choices=tuple(SPLITS), metavar="SPLIT", help="default: all that fit")
    parser.add_argument("--rows", nargs="+", type=int, default=[None], help="values of rows_at_once; default: chosen")
    parser.add_argument("--forwards", type=int, default=3, help="how many are timed; default: 3")
    parser.add_argument("--top", type=int, default=10, help="how many kernels are named; default: 10")
    parser.add_argument("--traces", metavar="FOLDER", help="where the first rank keeps its traces; default: nowhere")
    parser.add_argument("--attention", action="store_true", help="rates of attention alone, in one process")
    flags = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is chatty otherwise
    results = measure_attention(flags) if flags.attention else measure_splits(flags)
    if results:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
