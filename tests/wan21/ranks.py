"""Processes that play ranks: started once, then given one function after another to run in a world of some of them.

What the functions need to be in a process of its own lives here too, since a process finds them by their module's name.
"""

import gc
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

LONGEST = 120.0
"""Seconds until a rank counts as hanging."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(pipe: Connection) -> None:
    import torch

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    while True:
        task = pipe.recv()
        if task is None:
            return
        environment, function, arguments = task
        os.environ.update(environment)
        gc.collect()  # what an earlier function left in cycles must not be freed while this one counts bytes
        gc.freeze()  # what stays is not looked through again
        try:
            pipe.send((function(*arguments), None))
        except BaseException:  # noqa: BLE001 # whatever it is, the test shall show it
            pipe.send((None, traceback.format_exc()))


class Ranks:
    """Some processes, forked off one that imports torch for all; with GPUs, as CUDA stands no fork, fresh ones."""

    def __init__(self, count: int) -> None:
        import torch

        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp"])  # of no effect on fresh ones
        self._pipes = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank of a world of this size, which it has to connect to itself."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
        pipes = self._pipes[:size]
        for rank, pipe in enumerate(pipes):
            pipe.send(({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(LONGEST if not errors else 1.0):
                errors.append(f"rank {rank} hangs")
                continue
            try:
                result, error = pipe.recv()
            except EOFError:
                self._processes[rank].join()
                errors.append(f"rank {rank} died, exit code {self._processes[rank].exitcode}")
                continue
            results.append(result)
            if error:
                errors.append(f"rank {rank}: {error}")
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def run_afresh(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The same in processes that end with it, as the ranks of a job do."""
    ranks = Ranks(size)
    try:
        return ranks.run(size, function, *arguments)
    finally:
        ranks.close()


@dataclass(frozen=True)
class Forward:
    """One forward of a small transformer. `grid` is that of the tokens."""

    grid: tuple[int, int, int] = (2, 4, 6)
    batch_size: int = 1
    most_queries: int | None = None
    most_rows: int = 4096
    on_host: float = 0.0
    precision: str = "fp32"
    head_dim: int = 8
    fewest_rows: int = 8000  # of a window in which they travel
    is_fused: bool = False  # in a process by itself it never is
    num_heads: int = 12


def forward(layout: Any, case: Forward, device: str = "cpu") -> dict[str, Any]:
    """Runs it in a layout; gives the velocity, and the peak of the allocator beside weights and inputs."""
    return forwards(layout, (case,), device)[0]


def forwards(layout: Any, cases: tuple[Forward, ...], device: str = "cpu") -> list[dict[str, Any]]:
    """The same for several, in one world: to connect takes longer than they do."""
    from wan21.parallel.world import connect, local_device
    from wan21.runtime import make_runtime

    runtime = make_runtime(local_device(device))
    world = connect(layout, runtime)
    results = [_forward(world, runtime, case) for case in cases]
    world.close()
    return results


def _forward(world: Any, runtime: Any, case: Forward) -> dict[str, Any]:
    import torch

    from wan21.components import DTYPES
    from wan21.dit.model import Dit, ForwardPlan
    from wan21.dit.operations import FusedOperations, Operations
    from wan21.memory.hosted import HostedResidual
    from wan21.models import DitConfig
    from wan21.parallel import tokens as shared
    from wan21.weights.load import materialize, module_shapes
    from wan21.weights.random import RandomSource

    is_fused = case.is_fused and world.size > 1
    operations = FusedOperations() if is_fused else Operations()
    shared.FEWEST_ROWS = case.fewest_rows
    dim, heads = case.num_heads * case.head_dim, case.num_heads
    config = DitConfig(dim=dim, ffn_dim=128, num_heads=heads, num_layers=2, text_dim=32, text_len=8)
    with torch.device("meta"):
        model = Dit(config, dtype=DTYPES[case.precision], operations=operations)
    materialize(model, RandomSource("dit", module_shapes(model), 0, runtime.generator), runtime.device)
    t, h, w = case.grid
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(case.batch_size, 16, t, 2 * h, 2 * w, generator=generator).to(runtime.device)
    prompts = [torch.randn(5, 32, generator=generator).to(runtime.device) for _ in range(case.batch_size)]
    with torch.no_grad(), runtime.counting():
        context = model.embed_text(prompts)
        time = model.embed_time(500.0, runtime.device)
        tokens = shared.shared_tokens(t * h * w, world, is_fused=is_fused)
        turns = tokens.own(model.rotations(case.grid, runtime.device), 0)
        plan = ForwardPlan(most_queries=case.most_queries, most_rows=case.most_rows, tokens=tokens)
        residual = None
        if case.on_host:
            shape = (case.batch_size, turns.shape[0], config.dim)
            residual = HostedResidual(shape, case.most_rows, case.on_host, runtime)
        before = runtime.memory().allocated_bytes
        runtime.reset_memory_peaks()
        velocity = model(latents, time, context, turns=turns, plan=plan, residual=residual)
        peak = runtime.memory().allocated_peak_bytes - before
    return {"velocity": velocity.cpu().numpy(), "peak": peak}


def generate(layout: Any, asked: dict[str, Any], chosen: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """From prompt to video with the tiny model, or the one that is asked for; sizes beside its own are allowed."""
    from contextlib import contextmanager

    from wan21.assets import open_assets
    from wan21.models import model_spec
    from wan21.options import Options
    from wan21.parallel.world import connect, local_device
    from wan21.pipeline import VideoPipeline
    from wan21.request import make_request
    from wan21.runtime import make_runtime

    asked = dict(asked)
    spec = model_spec(asked.pop("model", "tiny"))
    spec = replace(spec, sizes=(*spec.sizes, "80*48"))
    options = Options(**({"precision": "fp32"} | chosen), layout=layout)
    request = make_request(spec, **({"seed": 7, "size": "80*48", "frame_num": 5, "num_steps": 2} | asked))
    runtime = make_runtime(local_device(device))
    runtime.warm_up()
    loaded: dict[str, int] = {}
    expected: dict[str, int] = {}
    pinned: list[int] = []

    class Listener:
        wants_blocks = False

        @contextmanager
        def span(self, span: Any) -> Any:
            before = runtime.memory().requested_bytes
            yield
            memory = runtime.memory()
            pinned.append(runtime.host_buffer_bytes())
            if span.kind == "component":
                loaded[span.name] = memory.requested_bytes - before
                expected[span.name] = span.expected_bytes

    world = connect(layout, runtime)
    with runtime.counting():
        pipeline = VideoPipeline(spec, options, open_assets(spec, options, runtime), runtime, Listener(), world)
        generation = pipeline.generate(request)
    world.close()
    return {
        "latents": generation.latents.numpy(),
        "videos": [video.numpy() for video in generation.videos],
        "loaded": loaded,
        "expected": expected,
        "host_bytes": max(pinned),
    }


def extend_for_all(layout: Any, variables: dict[str, str]) -> tuple[str, dict[str, str] | None]:
    """The prompt that this rank of a job comes to, and what its record would tell."""
    from wan21.events import SILENT
    from wan21.parallel.world import connect
    from wan21.runtime import CpuRuntime
    from wan_sweep.build import build_request
    from wan_sweep.extension import extend
    from wan_sweep.schema import Job

    os.environ.update(variables)
    job = Job(model="tiny", device="cpu", prompt="a kite", use_prompt_extend=True, prompt_extend_method="dashscope")
    runtime = CpuRuntime()
    world = connect(layout, runtime)
    try:
        request, told = extend(job, build_request(job), runtime, SILENT, world)
    finally:
        world.close()
    return request.prompt, told


def relative_distance(actual: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]") -> float:
    """Norm of the difference over that of what is expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def decode_tiles(layout: Any, num_rows: int, num_cols: int) -> Any:
    """Decodes a small video in so many tiles; gives the frames, if this rank has them."""
    import torch

    from wan21.decoding import decode, departures
    from wan21.models import model_spec
    from wan21.parallel.world import connect
    from wan21.runtime import CpuRuntime
    from wan21.vae import DecodePlan, Vae
    from wan21.weights.load import materialize
    from wan21.weights.random import RandomWeights

    runtime = CpuRuntime()
    world = connect(layout, runtime)
    spec = model_spec("tiny")
    with torch.device("meta"):
        vae = Vae(spec.vae)
    with RandomWeights(spec, 0, runtime.generator).vae() as source:
        materialize(vae, source, runtime.device)
    latents = torch.randn(1, 16, 2, 6, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plan = DecodePlan(num_tile_rows=num_rows, num_tile_cols=num_cols)
        with departures(vae, latents.shape, plan, world, runtime) as leaving:
            video = decode(vae, latents, plan, world, leaving, is_image=False)
    world.close()
    return None if video is None else video.numpy()


def command_line(_: Any, arguments: list[str], variables: dict[str, str] | None = None) -> int:
    """Runs the command line of wan21 as one of several ranks, with these environment variables."""
    from wan21.generate import main

    os.environ.update(variables or {})
    return main(arguments)


def agree_on_text(layout: Any, texts: list[str]) -> str:
    """What ranks come to of which each brings a text of its own."""
    from wan21.parallel.exchange import agreed_text
    from wan21.parallel.world import connect
    from wan21.runtime import CpuRuntime

    runtime = CpuRuntime()
    world = connect(layout, runtime)
    try:
        return agreed_text(world.everyone, texts[world.rank], runtime.device)
    finally:
        world.close()
