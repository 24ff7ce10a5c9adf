"""The command line of wan21: one generation, with the flags of the official generate.py and a few more."""

import argparse
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wan21.config import (
    LOAD_STRATEGIES,
    MODELS,
    PRECISIONS,
    SOLVERS,
    ModelSpec,
    Options,
    Request,
    idle_knobs,
    make_request,
    model_spec,
)
from wan21.errors import UsageError, WanError
from wan21.events import Span
from wan21.parallel.layout import Layout, check_layout

TRUE_WORDS = ("yes", "true", "t", "y", "1")
FALSE_WORDS = ("no", "false", "f", "n", "0")
NAME_LENGTH = 50


def truth(text: str) -> bool:
    """A truth value from its usual words, in any case."""
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither of {', '.join(TRUE_WORDS + FALSE_WORDS)}")
    return word in TRUE_WORDS


def slices(text: str) -> int | Literal["auto"]:
    """Number of attention slices from "true", "false" or a number; "auto" lets the pipeline choose."""
    if text.lower() in TRUE_WORDS[:4]:
        return "auto"
    if text.lower() in FALSE_WORDS[:4]:
        return 1
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true, false nor a number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """All flags with their defaults and meanings."""
    flags = argparse.ArgumentParser(prog="generate.py", description="Generate a video or an image with Wan2.1.")
    add = flags.add_argument
    add("--task", choices=tuple(MODELS), default="t2v-14B", help="model and task")
    add("--size", help="WIDTH*HEIGHT in pixels; default: the task's")
    add("--frame_num", type=int, help="frames, of the form 4n+1; default: the task's")
    add("--ckpt_dir", required=True, help='official checkpoint folder, or "random" for seeded random weights')
    add("--offload_model", type=truth, default=True, help="components leave the device when not needed (true)")
    add("--t5_cpu", action="store_true", help="run the text encoder on the CPU")
    add("--save_file", type=Path, help="where to write; default: a name made of task, size, prompt and time")
    add("--prompt", help="what to show; default: an example")
    add("--base_seed", type=int, default=-1, help="seed of the noise; -1 draws one and prints it")
    add("--sample_solver", choices=SOLVERS, default="unipc", help="the sampler")
    add("--sample_steps", type=int, help="denoising steps; default: the task's")
    add("--sample_shift", type=float, help="shift of the noise schedule; default: the task's")
    add("--sample_guide_scale", type=float, help="classifier-free guidance; 1 switches it off; default: the task's")
    add("--precision", choices=PRECISIONS, default="bf16", help="number format of the DiT")
    add("--load_strategy", choices=LOAD_STRATEGIES, default="full", help="block and part stream weights from host")
    add("--attention_slicing", type=slices, default=1, help="true, false or a number of slices")
    add("--gradient_checkpointing", action="store_true", help="recompute blocks where gradients are kept")
    add("--ulysses_size", type=int, default=1, help="ranks that share the heads of attention; start them with torchrun")
    add("--ring_size", type=int, default=1, help="ranks that pass keys and values around")
    add("--cfg_parallel", action="store_true", help="the two passes of guidance on two halves of the ranks")
    add("--t5_fsdp", action="store_true", help="shard the text encoder's weights over the ranks")
    add("--dit_fsdp", action="store_true", help="shard the DiT's weights over the ranks")
    add("--device", default=None, help="cuda, cuda:N or cpu; default: the GPU if there is one")
    return flags


class ProgressBars:
    """Shows phases and steps on the terminal."""

    wants_blocks = False

    def __init__(self, console: Console) -> None:
        self.display = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._steps: TaskID | None = None

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """A line for a phase, and a bar for its steps."""
        if span.kind == "phase":
            task = self.display.add_task(span.name.replace("_", " "), total=1)
            self._steps = task if span.name == "denoise" else None
            yield
            if self._steps is None:
                self.display.advance(task)
        elif span.kind == "step" and self._steps is not None:
            self.display.update(self._steps, total=span.total)
            yield
            self.display.advance(self._steps)
        else:
            yield


def default_path(spec: ModelSpec, size: str, prompt: str) -> Path:
    """A file name that tells task, size, prompt and time, and that every file system takes."""
    words = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in prompt)[:NAME_LENGTH]
    stamp = datetime.now().astimezone().strftime("%Y%m%d_%H%M%S")
    return Path(f"{spec.name}_{size.replace('*', 'x')}_1_1_{words}_{stamp}{'.png' if spec.is_image else '.mp4'}")


def run(flags: argparse.Namespace) -> None:
    """Generates what the flags ask for and writes it."""
    spec = model_spec(flags.task)
    seed = flags.base_seed if flags.base_seed >= 0 else secrets.randbelow(2**63)
    request = make_request(
        spec,
        seed=seed,
        prompt=flags.prompt,
        size=flags.size,
        frame_num=flags.frame_num,
        solver=flags.sample_solver,
        num_steps=flags.sample_steps,
        shift=flags.sample_shift,
        guide_scale=flags.sample_guide_scale,
    )
    options = Options(
        precision=flags.precision,
        offload=flags.offload_model,
        load_strategy=flags.load_strategy,
        t5_cpu=flags.t5_cpu,
        attention_slices=flags.attention_slicing,
        gradient_checkpointing=flags.gradient_checkpointing,
        ckpt_dir=None if flags.ckpt_dir == "random" else flags.ckpt_dir,
        layout=Layout(
            ulysses=flags.ulysses_size,
            ring=flags.ring_size,
            cfg=2 if flags.cfg_parallel else 1,
            dit_fsdp=flags.dit_fsdp,
            t5_fsdp=flags.t5_fsdp,
        ),
    )
    check_layout(options.layout, spec, request)
    path = flags.save_file or default_path(spec, flags.size or spec.default_size, request.prompt)
    suffix = ".png" if spec.is_image else ".mp4"
    if path.suffix.lower() != suffix:
        raise UsageError(f"save_file={path} does not end in {suffix}, which {spec.name} writes; rename it")
    if not path.parent.is_dir():
        raise UsageError(f"save_file={path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"save_file={path}: the folder {path.parent} cannot be written; choose another")
    generate_to(path, spec, request, options, flags.device)


def generate_to(path: Path, spec: ModelSpec, request: Request, options: Options, device: str | None) -> None:
    """Runs the pipeline and writes its result to a file.

    Of several processes each runs its part; the first one draws the seed for all, talks, and writes.
    """
    from wan21.assets import open_assets
    from wan21.frames import save_image, save_video
    from wan21.parallel.exchange import agreed
    from wan21.parallel.world import connect, local_device
    from wan21.pipeline import TextToVideo
    from wan21.runtime import default_device, make_runtime

    device = local_device(device or default_device())
    runtime = make_runtime(device)
    world = connect(options.layout, runtime)
    request = replace(request, seed=agreed(world.everyone, request.seed, runtime.device))
    console = Console(quiet=world.rank > 0)
    assets = open_assets(spec, options, runtime)
    console.print(f"{spec.name} on {device}, {options.precision}, weights: {assets.description}, seed {request.seed}")
    for knob, reason in idle_knobs(options, runtime.device.type).items():
        console.print(f"{knob} changes nothing: {reason}")
    bars = ProgressBars(console)
    with bars.display:
        pipeline = TextToVideo(spec, options, assets, runtime, bars, world)
        for video in pipeline.generate(request).videos[:1]:
            with bars.span(Span(kind="phase", name="save")):
                if spec.is_image:
                    save_image(video[0], path)
                else:
                    save_video(video, path)
    console.print(f"wrote {path}")
    world.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is that of wan21.errors."""
    flags = parser().parse_args(arguments)
    try:
        run(flags)
    except WanError as error:
        return complain(str(error), error.exit_code)
    except OSError as error:
        return complain(f"{error.filename or flags.save_file}: {error.strerror or error}", 1)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        way_out = "try --offload_model true --load_strategy block --attention_slicing true --t5_cpu, or a smaller size"
        return complain(f"{str(error).splitlines()[0]}; {way_out}", 1)
    return 0


def complain(message: str, exit_code: int) -> int:
    """Tells what went wrong, and passes the exit code on."""
    print(f"generate.py: {message}", file=sys.stderr)  # noqa: T201  # this is the command line
    return exit_code
