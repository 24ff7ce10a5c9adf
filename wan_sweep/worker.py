"""The child process that does a job: `python -m wan_sweep.worker JOB_FOLDER`.

It reads job.json, runs the pipeline with the measurer listening, and leaves events.jsonl (as things happen) and
measurement.json (at the end, also when the end is bad). It knows neither Hydra nor MLflow. Exit codes: 0 ok, 3 out of
memory, 1 anything else.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from wan_sweep.measure.failure import explain
from wan_sweep.schema import Job
from wan_sweep.units import GIB

if TYPE_CHECKING:
    from wan21.runtime import Runtime

EXIT_CODES = {"ok": 0, "oom": 3, "failed": 1}
PR_SET_PDEATHSIG = 1


class EventFile:
    """events.jsonl: one line per event, on disk when `write` returns."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, event: dict[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def die_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)


def memory_limit_bytes(job: Job) -> int | None:
    """The job's limit, if it has one."""
    return None if job.memory_limit_gib is None else int(job.memory_limit_gib * GIB)


def limit_this_process(num_bytes: int) -> None:
    """Lets this process have no more data memory than this; what a limit means on a CPU."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def environment(runtime: "Runtime") -> dict[str, str]:
    """What torch says of itself and of the device."""
    import torch

    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default"
    return {"torch": torch.__version__, "allocator": allocator, **runtime.facts()}


def run(job: Job, folder: Path, events: TextIO) -> dict[str, Any]:
    """Runs a job; what it returns goes to measurement.json."""
    memory_limit = memory_limit_bytes(job)
    from wan21.assets import open_assets
    from wan21.config import idle_knobs
    from wan21.events import Span
    from wan21.frames import save_image, save_video
    from wan21.pipeline import TextToVideo
    from wan21.runtime import make_runtime
    from wan_sweep.build import build_options, build_request, build_spec
    from wan_sweep.measure.recorder import Recorder

    spec, request, options = build_spec(job), build_request(job), build_options(job)
    is_on_cpu = job.device == "cpu"
    runtime = make_runtime(job.device, memory_limit_bytes=None if is_on_cpu else memory_limit)
    if is_on_cpu and memory_limit is not None:
        limit_this_process(memory_limit)
    assets = open_assets(spec, options, runtime)
    result: dict[str, Any] = {
        "outcome": "ok",
        "reason": "",
        "failure": None,
        "weights": assets.description,
        "environment": environment(runtime),
        "idle_knobs": idle_knobs(options, job.device),
        "ranks": [],
    }
    with runtime.counting():
        recorder = Recorder(runtime, EventFile(events), wants_blocks=job.block_events)
        try:
            pipeline = TextToVideo(spec, options, assets, runtime, recorder)
            generation = pipeline.generate(request)
            with recorder.span(Span(kind="phase", name="save")):
                for index, video in enumerate(generation.videos if job.save_video else []):
                    suffix = f"_{index}" if len(generation.videos) > 1 else ""
                    if spec.is_image:
                        save_image(video[0], folder / f"image{suffix}.png")
                    else:
                        save_video(video, folder / f"video{suffix}.mp4")
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this job's outcome
            traceback.print_exc()
            result |= explain(error, recorder.failed_at, memory_limit)
        metrics, series = recorder.metrics(), recorder.series()
    result |= {"metrics": metrics, "series": series, "warnings": recorder.warnings}
    result["ranks"] = [{"rank": 0, "metrics": metrics, "series": series}]
    return result


def main(arguments: list[str]) -> int:
    """Does the job whose folder is the one argument."""
    die_with_parent()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts on a CPU, is chatty otherwise
    folder = Path(arguments[0])
    job = Job.from_dict(json.loads((folder / "job.json").read_text())["knobs"])
    with (folder / "events.jsonl").open("a") as events:
        try:
            result = run(job, folder, events)
        except Exception as error:  # noqa: BLE001  # before the pipeline began
            traceback.print_exc()
            result = explain(error, None, memory_limit_bytes(job))
    write_json(folder / "measurement.json", result)
    return EXIT_CODES[result["outcome"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
