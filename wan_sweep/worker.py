"""The child process that runs one pass of a job: `python -m wan_sweep.worker JOB_FOLDER [PASS]`.

It reads job.json, runs the pipeline with the pass's listener, and leaves the files of the pass (`store.PASSES`): events
as they happen, and a result at the end, also when the end is bad. The pass "measure" gives the numbers, or "estimate"
where nothing shall run; the others run the same pipeline again so that what they record costs the numbers nothing. It
knows neither Hydra nor MLflow.

Of several ranks that torchrun started each is such a process, and all but the first leave their files in a folder of
their own (`store.rank_folder`).

Exit codes: 0 ok, 3 out of memory, 1 anything else.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from wan_sweep.environment import device_used_bytes
from wan_sweep.errors import RecordError
from wan_sweep.extension import extend, extension_warnings
from wan_sweep.measure.failure import explain
from wan_sweep.measure.fidelity import digests, write_outputs
from wan_sweep.nvml import ProcessMemory
from wan_sweep.parent import die_with_parent
from wan_sweep.place import ALONE, Place, read_place
from wan_sweep.schema import Job
from wan_sweep.store import (
    ATTRIBUTION,
    ESTIMATE,
    JOB_FILE,
    MEASURE,
    PASSES,
    SNAPSHOT_FILE,
    TRACE,
    Pass,
    rank_folder,
    read_json,
    write_json,
)
from wan_sweep.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from wan21.assets import Assets
    from wan21.events import Observer, Span
    from wan21.models import ModelSpec
    from wan21.options import Options
    from wan21.parallel.world import World
    from wan21.pipeline import Generation
    from wan21.request import Request
    from wan21.runtime import Runtime
    from wan_sweep.measure.recorder import Recorder

EXIT_CODES = {"ok": 0, "oom": 3, "failed": 1}
MOST_STEPS_TO_PEAK = 3
"""A solver's history is full by then, so later steps repeat the third."""


class EventFile:
    """A line per event, on disk when `write` returns if the event is urgent.

    Args:
        file: where they go.
        log_interval: after each so many steps the log gets a line for people; 0 for none.
    """

    def __init__(self, file: TextIO, log_interval: int = 0) -> None:
        self._file = file
        self._log_interval = log_interval

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Appends a line."""
        self._file.write(json.dumps(event) + "\n")
        if is_urgent:
            self._file.flush()
        is_step = event["kind"] == "step" and event["event"] == "end"
        if is_step and self._log_interval and (event["index"] + 1) % self._log_interval == 0:
            peak = format_bytes(event["span"]["allocated_peak_bytes"])
            reserved = format_bytes(event["span"]["reserved_peak_bytes"])
            seconds = format_seconds(event["seconds"])
            print(f"step {event['index'] + 1} of {event['total']}: {seconds}, peak {peak}, reserved {reserved}")  # noqa: T201


class Beat:
    """An observer that tells the parent where the run is, and reads nothing."""

    wants_blocks = False

    def __init__(self, sink: EventFile) -> None:
        self._sink = sink

    @contextmanager
    def span(self, span: "Span") -> Iterator[None]:
        """Writes a line at both ends."""
        self._tell("begin", span)
        try:
            yield
        finally:
            self._tell("end", span)

    def _tell(self, event: str, span: "Span") -> None:
        values = {"kind": span.kind, "name": span.name, "index": span.index, "total": span.total}
        self._sink.write({"event": event, "time": time.time(), **values}, is_urgent=True)


def memory_limit_bytes(job: Job) -> int | None:
    """The job's limit, if it has one."""
    return None if job.memory_limit_gib is None else int(job.memory_limit_gib * GIB)


def limit_this_process(num_bytes: int) -> None:
    """Lets this process have no more data memory than this; what a limit means on a CPU."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A job ready to run: what to make, and where.

    folder: of the job.
    place: of this process among those that run it; `world` is the same as the pipeline takes it.
    """

    job: Job
    folder: Path
    place: Place
    world: "World"
    keeps_outputs: bool
    spec: "ModelSpec"
    request: "Request"
    options: "Options"
    runtime: "Runtime"

    @classmethod
    def set_up(cls, folder: Path, assignment: dict[str, Any], place: Place) -> "Stage":
        """From what stands in the job.json of a folder."""
        from wan21.parallel.world import connect
        from wan21.runtime import make_runtime
        from wan21.vae import choose_plan
        from wan_sweep.build import build_options, build_request, build_spec

        job = Job.from_dict(assignment["knobs"])
        is_on_cpu, limit = job.device == "cpu", memory_limit_bytes(job)
        spec, request, options = build_spec(job), build_request(job), build_options(job)
        choose_plan(spec, options, request.shape.latent)  # refuses a budget that is too small, before any loading
        device = "cpu" if is_on_cpu else f"{job.device}:{place.local_rank}"
        runtime = make_runtime(device, memory_limit_bytes=None if is_on_cpu else limit)
        if is_on_cpu and limit is not None:
            limit_this_process(limit)
        return cls(
            job=job,
            folder=folder,
            place=place,
            world=connect(options.layout, runtime),
            keeps_outputs=bool(assignment.get("keeps_outputs")),
            spec=spec,
            request=request,
            options=options,
            runtime=runtime,
        )

    @property
    def home(self) -> Path:
        """Where this rank leaves its files."""
        return rank_folder(self.folder, self.place.rank)

    def open_assets(self) -> "Assets":
        """Weights and tokenizer."""
        from wan21.assets import open_assets

        return open_assets(self.spec, self.options, self.runtime)

    def with_extended_prompt(self, observer: "Observer") -> tuple["Stage", dict[str, str] | None]:
        """The same with its prompt extended if the job asks for that, and what the record says of it."""
        request, told = extend(self.job, self.request, self.runtime, observer, self.world)
        return replace(self, request=request), told

    def with_measured_prompt(self) -> "Stage":
        """The same with the prompt that the measuring pass came to."""
        try:
            told = read_json(self.folder / MEASURE.result).get("prompt_extension")
        except RecordError:
            return self
        return replace(self, request=replace(self.request, prompt=told["prompt"])) if told else self

    def generate(self, assets: "Assets", observer: "Observer", *, num_steps: int | None = None) -> "Generation":
        """Runs the pipeline, for fewer steps than the job asks for if so told, and takes leave of the other ranks."""
        from wan21.pipeline import VideoPipeline

        request = self.request if num_steps is None else replace(self.request, num_steps=num_steps)
        pipeline = VideoPipeline(self.spec, self.options, assets, self.runtime, observer, self.world)
        generation = pipeline.generate(request)
        self.world.close()
        return generation

    def explain(self, error: Exception, failed_at: dict[str, Any] | None) -> dict[str, Any]:
        """What an error means for the outcome; the traceback goes to the log."""
        traceback.print_exc()
        return explain(error, failed_at, memory_limit_bytes(self.job))


def environment(runtime: "Runtime") -> dict[str, str]:
    """What torch says of itself and of the device."""
    import torch

    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default"
    return {"torch": torch.__version__, "allocator": allocator, **runtime.facts()}


def process_used(
    runtime: "Runtime", used_before: list[int], *, is_shared: bool
) -> tuple[Callable[[], int | None], str]:
    """How to read this process's bytes on the device, and that way in words.

    Args:
        runtime: of the device.
        used_before: what was in use on it before this process had a context.
        is_shared: whether other jobs may use it, too.
    """
    if runtime.device.type != "cuda":
        return lambda: None, ""
    told = ProcessMemory()
    if told.read() is not None:
        return told.read, "as the driver tells"
    if is_shared:
        return lambda: None, ""
    index = runtime.device.index or 0
    return (
        lambda: device_used_bytes()[index] - used_before[index],
        "all that is used minus what was used before the job",
    )


def measure(folder: Path, assignment: dict[str, Any], events: TextIO, place: Place) -> dict[str, Any]:
    """The pass that gives the numbers: nothing but counters is read while it runs."""
    from wan_sweep.measure.recorder import Recorder

    used_before = device_used_bytes()
    stage = Stage.set_up(folder, assignment, place)
    job, runtime = stage.job, stage.runtime
    assets = stage.open_assets()
    from wan21.options import idle_knobs
    from wan21.sources import described

    result: dict[str, Any] = {
        "outcome": "ok",
        "reason": "",
        "failure": None,
        "weights": assets.description,
        "sources": described(stage.spec, stage.request.sources),
        "idle_knobs": idle_knobs(stage.options, job.device, stage.spec, stage.request),
        "ranks": [],
    }
    with runtime.counting():
        started = time.perf_counter()
        runtime.warm_up()
        warm_up_seconds = time.perf_counter() - started
        read_process, how = process_used(runtime, used_before, is_shared=job.share_gpu)
        sink = EventFile(events, job.log_interval)
        recorder = Recorder(runtime, sink, wants_blocks=job.block_events, process_used=read_process)
        generation = None
        extension = None
        try:
            stage, extension = stage.with_extended_prompt(recorder)
            generation = stage.generate(assets, recorder)
            recorder.forget_components()
            if place.rank == 0:
                save(stage, generation, recorder)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this job's outcome
            result |= stage.explain(error, recorder.failed_at)
        metrics, series = recorder.metrics() | {"time/warm_up_s": warm_up_seconds}, recorder.series()
    if generation is not None and place.rank == 0:
        latents, videos = generation.latents.numpy(), [video.numpy() for video in generation.videos]
        result["outputs"] = digests(latents, videos)
        if stage.keeps_outputs:
            write_outputs(folder, latents, videos)
    facts = environment(runtime) | ({"process_used": how} if how else {})
    warnings = [*extension_warnings(extension), *recorder.warnings]
    result |= {"environment": facts, "metrics": metrics, "series": series, "warnings": warnings}
    result["prompt_extension"] = extension
    result["ranks"] = [{"rank": place.rank, "metrics": metrics, "series": series}]
    return result


def save(stage: Stage, generation: "Generation", recorder: "Recorder") -> None:
    """The phase of that name: video or image files, if they are asked for."""
    from wan21.events import Span
    from wan21.frames import save_image, save_video

    with recorder.span(Span(kind="phase", name="save")):
        for index, video in enumerate(generation.videos if stage.job.save_video else []):
            suffix = f"_{index}" if len(generation.videos) > 1 else ""
            if stage.spec.is_image:
                save_image(video[0], stage.folder / f"image{suffix}.png")
            else:
                save_video(video, stage.folder / f"video{suffix}.mp4")


def attribute(folder: Path, assignment: dict[str, Any], events: TextIO, place: Place) -> dict[str, Any]:
    """Who fills the device at the peak, or when memory runs out: the run again, as far as the step with the peak."""
    from wan21.events import together
    from wan_sweep.measure.attribution import Attributor
    from wan_sweep.measure.snapshot import history, write_snapshot

    stage = Stage.set_up(folder, assignment, place)
    job, num_steps = stage.job, steps_to_peak(folder, stage.request.num_steps)
    has_history = stage.runtime.device.type == "cuda"
    outcome: dict[str, Any] = {"outcome": "ok", "reason": ""}
    assets = stage.open_assets()
    attributor = Attributor(stage.runtime)
    with ExitStack() as stack:
        if has_history:
            stack.enter_context(history(stacks=job.record_stacks))
        stack.enter_context(attributor.recording())
        stage.runtime.warm_up()
        try:
            observer = together(Beat(EventFile(events)), attributor)
            if job.prompt_extend_method == "local_qwen":  # its model fills the device, too
                stage.with_extended_prompt(observer)
            stage.with_measured_prompt().generate(assets, observer, num_steps=num_steps)
        except Exception as error:  # noqa: BLE001  # an OOM is what this pass may be here for
            outcome = stage.explain(error, None)
        if has_history:
            write_snapshot(stage.home / SNAPSHOT_FILE)
    return attributor.result(outcome=outcome["outcome"], reason=outcome["reason"], num_steps=num_steps)


def steps_to_peak(folder: Path, num_steps: int) -> int:
    """How many steps to run until the peak of denoising, or the failure, that the measuring pass found."""
    try:
        measured = read_json(folder / MEASURE.result)
    except RecordError:
        return min(MOST_STEPS_TO_PEAK, num_steps)
    peaks = measured.get("series", {}).get("step/allocated_bytes", [])
    failed_step = (measured.get("failure") or {}).get("step")
    index = failed_step if failed_step is not None else peaks.index(max(peaks)) if peaks else 0
    return min(MOST_STEPS_TO_PEAK, index % num_steps + 1)


def trace(folder: Path, assignment: dict[str, Any], events: TextIO, place: Place) -> dict[str, Any]:
    """A trace of torch's profiler over a few steps, of a run of its own."""
    from wan21.events import together
    from wan_sweep.measure.tracer import Tracer

    stage = Stage.set_up(folder, assignment, place).with_measured_prompt()
    job = stage.job
    outcome: dict[str, Any] = {"outcome": "ok", "reason": ""}
    where = folder
    if job.trace_path is not None:
        where = Path(job.trace_path) / folder.parent.name / folder.name
        where.mkdir(parents=True, exist_ok=True)
    assets = stage.open_assets()
    stage.runtime.warm_up()
    tracer = Tracer(stage.runtime, where, place.rank, with_stack=job.record_stacks)
    try:
        with tracer.recording():
            stage.generate(assets, together(Beat(EventFile(events)), tracer), num_steps=tracer.num_steps)
    except Exception as error:  # noqa: BLE001  # what was recorded until then is kept
        outcome = stage.explain(error, None)
    told = tracer.result()
    exchanged = exchanged_by([where / name for name in told["files"]]) if place.size > 1 else {}
    return {
        "outcome": outcome["outcome"],
        "reason": outcome["reason"],
        "folder": str(where),
        **told,
        **({"metrics": exchanged} if exchanged else {}),
    }


def exchanged_by(traces: Sequence[Path]) -> dict[str, float]:
    """What a step exchanges with other ranks, as metrics, from this rank's trace; empty if that cannot be read."""
    from wan_sweep.analyze import UnreadableFileError
    from wan_sweep.analyze.chrome.analysis import exchanged_per_step

    try:
        return {name: value for path in traces for name, value in exchanged_per_step(path).items()}
    except UnreadableFileError as error:
        print(error)  # noqa: T201 - goes to the log
        return {}


def estimate(folder: Path, assignment: dict[str, Any], events: TextIO, _: Place) -> dict[str, Any]:
    """The pass that takes the measuring one's place where no GPU is needed: the same numbers from a model.

    This process and forks of it go through all ranks, and leave the files of each.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch comes: it would start a context that nobody uses
    from wan_sweep.environment import num_cpu_cores
    from wan_sweep.estimate.job import estimate_job

    with ExitStack() as stack:

        def sink_of(rank: int) -> EventFile:
            if rank == 0:
                return EventFile(events)
            home = rank_folder(folder, rank)
            home.mkdir(exist_ok=True)
            # Line by line: the copy that another rank of the same kind gets is to have all of them.
            return EventFile(stack.enter_context((home / ESTIMATE.events).open("a", buffering=1)))

        return estimate_job(folder, Job.from_dict(assignment["knobs"]), sink_of, num_processes=num_cpu_cores())


RUN: dict[str, Callable[[Path, dict[str, Any], TextIO, Place], dict[str, Any]]] = {
    MEASURE.name: measure,
    ESTIMATE.name: estimate,
    ATTRIBUTION.name: attribute,
    TRACE.name: trace,
}


def run(one: Pass, folder: Path, place: Place) -> dict[str, Any]:
    """Runs a pass; what it returns is its result."""
    assignment = read_json(folder / JOB_FILE)
    with (rank_folder(folder, place.rank) / one.events).open("a") as events:
        try:
            return RUN[one.name](folder, assignment, events, place)
        except Exception as error:  # noqa: BLE001  # before the pipeline began
            traceback.print_exc()
            return explain(error, None, memory_limit_bytes(Job.from_dict(assignment["knobs"])))


def log_apart(path: Path) -> None:
    """Sends all that this process prints from here on, libraries included, into a file of its own."""
    with path.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def main(arguments: list[str]) -> int:
    """Runs a pass of the job whose folder is the first argument; "measure" unless the second names another."""
    die_with_parent()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # asks where this process is, when it has to be stopped
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts on a CPU, is chatty otherwise
    folder, one = Path(arguments[0]), PASSES[arguments[1] if len(arguments) > 1 else MEASURE.name]
    place = read_place() or ALONE
    home = rank_folder(folder, place.rank)
    home.mkdir(exist_ok=True)
    if place.rank:
        log_apart(home / one.log)
    result = run(one, folder, place)
    write_json(home / one.result, result)
    exit_code = EXIT_CODES[result["outcome"]]
    if exit_code and place.size > 1:
        # The way out through torch would wait for ranks that will not answer any more.
        sys.stdout.flush()
        os._exit(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
