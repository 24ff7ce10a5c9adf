"""The command line of wan21: one generation, with the flags of the official generate.py and a few more."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

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
from rich.text import Text

from wan21.errors import WanError
from wan21.events import Observer, Span
from wan21.flags import Asked, asked, parser, suffix_of
from wan21.layout import Layout
from wan21.models import ModelSpec
from wan21.options import idle_knobs
from wan21.prompt.settings import PromptExtension
from wan21.request import Request

if TYPE_CHECKING:
    from wan21.parallel.world import World
    from wan21.runtime import Runtime

NAME_LENGTH = 50


class ProgressBars:
    """Shows phases and steps on the terminal."""

    wants_blocks = False

    def __init__(self, console: Console) -> None:
        self.display = Progress(
            TextColumn("{task.description:>13}"),
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


def default_path(spec: ModelSpec, request: Request, layout: Layout) -> Path:
    """A file name that tells task, size, layout, prompt and time, and that every file system takes."""
    words = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in request.prompt)[:NAME_LENGTH]
    stamp = datetime.now().astimezone().strftime("%Y%m%d_%H%M%S")
    how = f"{request.size.replace('*', 'x')}_{layout.ulysses}_{layout.ring}"
    return Path(f"{spec.name}_{how}_{words}_{stamp}{suffix_of(spec)}")


def generate_to(want: Asked) -> None:
    """Runs the pipeline and writes its result.

    Of several processes each runs its part; the first one draws the seed and extends the prompt for all, talks, and
    writes.
    """
    from wan21.assets import open_assets
    from wan21.frames import save_image, save_video
    from wan21.parallel.exchange import agreed
    from wan21.parallel.world import connect, local_device
    from wan21.pipeline import VideoPipeline
    from wan21.runtime import default_device, make_runtime

    spec, options = want.spec, want.options
    device = local_device(want.device or default_device())
    runtime = make_runtime(device)
    world = connect(options.layout, runtime)
    request = replace(want.request, seed=agreed(world.everyone, want.request.seed, runtime.device))
    console = Console(quiet=world.rank > 0)
    assets = open_assets(spec, options, runtime)
    say(console, f"{spec.name} on {device}, {options.precision}, weights: {assets.description}, seed {request.seed}")
    for knob, reason in {**want.idle, **idle_knobs(options, runtime.device.type, spec, request)}.items():
        say(console, f"{knob} changes nothing: {reason}")
    bars = ProgressBars(console)
    with bars.display:
        if want.extension is not None:
            request = with_extended_prompt(spec, request, want.extension, runtime, world, bars, console)
        pipeline = VideoPipeline(spec, options, assets, runtime, bars, world)
        for video in pipeline.generate(request).videos[:1]:
            path = want.path or default_path(spec, request, options.layout)
            with bars.span(Span(kind="phase", name="save")):
                if spec.is_image:
                    save_image(video[0], path)
                else:
                    save_video(video, path)
            say(console, f"wrote {path}")
    world.close()


def with_extended_prompt(
    spec: ModelSpec,
    request: Request,
    extension: PromptExtension,
    runtime: "Runtime",
    world: "World",
    observer: Observer,
    console: Console,
) -> Request:
    """The request, its prompt written out by a language model of the first process if that can be done."""
    from wan21.parallel.exchange import agreed_text
    from wan21.prompt.extend import extend_prompt
    from wan21.sources import read_frames

    prompt = request.prompt
    if world.rank == 0:
        extended = extend_prompt(
            prompt,
            extension,
            pictures=read_frames(spec, request.sources, request.shape),
            is_image=spec.is_image,
            seed=request.seed,
            runtime=runtime,
            observer=observer,
        )
        prompt = extended.prompt
        if extended.problem:
            say(console, f"the prompt is not extended: {extended.problem}; {extended.advice}")
        else:
            say(console, f"extended prompt: {prompt}")
    return replace(request, prompt=agreed_text(world.everyone, prompt, runtime.device))


def say(console: Console, words: str) -> None:
    """Prints words as they are: a prompt may hold what rich would take for its markup."""
    console.print(Text(words), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is that of wan21.errors."""
    flags = parser().parse_args(arguments)
    try:
        generate_to(asked(flags))
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
