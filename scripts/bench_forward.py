"""Times the transformer alone: both passes of guidance at full size, a line for each set of kernels.

Why: forwards within a whole run (scripts/run_record.sh) say how fast a preset is; this says what a single change
brings, and which kernels the time goes to. Weights and inputs are random.

    python scripts/bench_forward.py                                    # t2v-1.3B at 832*480, on a GPU
    python scripts/bench_forward.py --model t2v-14B --size '1280*720' --repeats 2
    python scripts/bench_forward.py --only fused_fa3_pieces fused_fa3_streamed --rows 5632 9856
    python scripts/bench_forward.py --model tiny --device cpu --only torch                # to try it

A forward is half of what the two passes take: the median of the repeats, timed by the host around work that has ended.
The columns behind it are the GPU's seconds a forward in each kind of kernel, from one more pair under torch's profiler;
idle is what is left of that pair's time. Copies of streamed weights run beside kernels, and count by themselves.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wan21.assets import open_assets
from wan21.components import Components
from wan21.dit.model import Dit, ForwardPlan
from wan21.dit.opening import Opening
from wan21.events import SILENT
from wan21.guidance import guided
from wan21.memory.slicing import choose_queries, choose_rows
from wan21.models import ModelSpec, model_spec
from wan21.options import Options
from wan21.parallel.world import ALONE
from wan21.request import Request, make_request
from wan21.runtime import Runtime, make_runtime
from wan_sweep.report.cells import Column
from wan_sweep.report.markdown import table

ALL_ROWS = 2**20
BF16 = Options(precision="bf16", rows_at_once=ALL_ROWS)
PIECES = replace(BF16, kernels="fused", attention_kernel="fa3", attention_slices="auto", rows_at_once=None)
WAYS: Mapping[str, Options] = {
    "torch": BF16,
    "fused": replace(BF16, kernels="fused"),
    "fused_shared": replace(BF16, kernels="fused", share_first_attention=True),
    "fused_fa3": replace(BF16, kernels="fused", attention_kernel="fa3"),
    "fused_fa3_shared": replace(BF16, kernels="fused", attention_kernel="fa3", share_first_attention=True),
    "fused_chunks": replace(BF16, kernels="fused", rows_at_once=None),
    "fused_fa3_pieces": PIECES,
    "fused_fa3_streamed": replace(PIECES, load_strategy="part"),
    "fp8": replace(BF16, kernels="fused", attention_kernel="fa3_fp8", linear_format="fp8", share_first_attention=True),
}
KINDS = (
    ("copies", re.compile(r"^memcpy", re.IGNORECASE)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)),
    ("prompt", re.compile(r"^_attend")),
    ("products", re.compile(r"gemm|nvjet|cutlass|xmma|matmul", re.IGNORECASE)),
    ("between", re.compile(r"^_(modulate|rms_heads|add_gated|quantize)")),
)
PROMPT_TOKENS = (40, 126)
"""Of the prompt, and of the negative one: about as many as the examples and the official negative prompt have."""


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), "other")


def step(spec: ModelSpec, options: Options, request: Request, runtime: Runtime) -> Callable[[], torch.Tensor]:
    """Both passes of a step, ready to be run: a model, latents, and contexts that stay the same."""
    assets = open_assets(spec, options, runtime)
    dit = Components(spec, options, assets.weights, runtime, SILENT, ALONE).dit()
    model: Dit = dit.module
    config, shape, device = spec.dit, request.shape, runtime.device
    generator = runtime.generator(0)
    prompts = [
        torch.randn(length, config.text_dim, generator=generator, device=device).to(model.dtype)
        for length in PROMPT_TOKENS
    ]
    latents = torch.randn(1, config.in_dim, *shape.latent, generator=generator, device=device)
    with dit.with_parked():
        conditioned, unconditioned = (model.embed_text([prompt]) for prompt in prompts)
        when = model.embed_time(700, device)
    turns = model.rotations(shape.grid, device)
    sizes = (turns.shape[0], config, model.dtype.itemsize)
    plan = ForwardPlan(
        most_queries=choose_queries(options.attention_slices, *sizes),
        most_rows=choose_rows(options.rows_at_once, *sizes),
    )

    def run() -> torch.Tensor:
        opening = Opening() if options.share_first_attention else None
        return guided(
            lambda context: model(latents, when, context, turns=turns, plan=plan, opening=opening),
            conditioned,
            unconditioned,
            5.0,
        )

    return run


def timed(run: Callable[[], object], runtime: Runtime, repeats: int) -> list[float]:
    """Seconds of each repeat."""
    times = []
    for _ in range(repeats):
        runtime.synchronize()
        started = time.perf_counter()
        run()
        runtime.synchronize()
        times.append(time.perf_counter() - started)
    return times


def by_kind(run: Callable[[], object], runtime: Runtime) -> dict[str, float]:
    """The GPU's seconds a forward in each kind of kernel, and those in which it had nothing to do."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        (total,) = timed(run, runtime, 1)
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.events() or ():
        if event.device_type == DeviceType.CUDA:
            spent[kind_of(event.name)] += event.device_time / 2e6  # of two forwards, in microseconds
    return {**spent, "idle": total / 2 - sum(spent.values()) + spent["copies"]}


def main() -> None:
    """Runs the ways that are asked for, and prints a line for each as it ends, and then all of them."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="t2v-1.3B", help="task and architecture")
    flags.add_argument("--size", help="WIDTH*HEIGHT; default: the model's")
    flags.add_argument("--frame_num", type=int, help="frames; default: the model's")
    flags.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where")
    flags.add_argument("--repeats", type=int, default=3, help="pairs of forwards that are timed")
    flags.add_argument("--only", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="which ways")
    flags.add_argument("--rows", nargs="+", type=int, help="rows at once, of ways that leave it open; each is tried")
    chosen = flags.parse_args()
    spec, runtime = model_spec(chosen.model), make_runtime(chosen.device)
    request = make_request(spec, seed=0, size=chosen.size, frame_num=chosen.frame_num)
    runtime.warm_up()
    kinds = ("attention", "prompt", "products", "between", "other", "copies", "idle")
    ways: dict[str, Options] = {}
    for name in chosen.only:
        is_open = WAYS[name].rows_at_once is None
        for rows_at_once in (chosen.rows or [None]) if is_open else [WAYS[name].rows_at_once]:
            label = f"{name}, {rows_at_once} rows" if is_open and rows_at_once else name
            ways[label] = replace(WAYS[name], rows_at_once=rows_at_once)
    rows = []
    with torch.no_grad():
        for name, options in ways.items():
            run = step(spec, options, request, runtime)
            timed(run, runtime, 1)  # compiles, and fills the allocator
            times = [one / 2 for one in timed(run, runtime, chosen.repeats)]
            spent = by_kind(run, runtime) if chosen.device == "cuda" else {}
            row = [name, f"{median(times):.4f}", f"{min(times):.4f}", f"{max(times):.4f}"]
            rows.append([*row, *(f"{spent.get(kind, 0.0):.4f}" for kind in kinds)])
            print(" ".join(rows[-1]), flush=True)
            del run
            runtime.empty_cache()
    facts = runtime.facts()
    print(f"\n{chosen.model}, {request.size}, {request.frame_num} frames, bf16; torch {torch.__version__}, {facts}\n")
    titles = ("way", "forward s", "least", "most", *(f"{kind} s" for kind in kinds))
    cells = zip(*rows, strict=True)
    print(table([Column(title=(title,), cells=column) for title, column in zip(titles, cells, strict=True)]))


if __name__ == "__main__":
    main()
