"""Shows that measuring is invisible: in bytes, to the byte, and in the time of a step, within 1 %.

Why: a number that measuring itself has moved is worth nothing.

How: python scripts/measure_overhead.py --model t2v-1.3B   (on a machine that does nothing else; 3 minutes on an H100)
Peaks: two fresh processes do the same generation, one with nobody listening, which reads the allocator's peaks once, at
its end, the other with the measurer at every phase, step and block. Times: one process does the same denoising again
and again, by turns without and with the measurer, and waits for the device at both ends of a step either way; the first
round is left out. On a CPU the measurer's counter is torch's profiler, which costs time by design (docs/memory.md):
there the times are shown and not judged. Exit code 1 if a limit is exceeded. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import TYPE_CHECKING, Any

from wan21.errors import WanError
from wan21.events import SILENT, Observer, Span
from wan21.models import MODELS, model_spec
from wan21.options import LOAD_STRATEGIES, PRECISIONS, Options
from wan21.request import Request, make_request
from wan_sweep.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from wan21.pipeline import VideoPipeline
    from wan21.runtime import Runtime
    from wan_sweep.measure.recorder import Recorder

LIMIT_PERCENT = 1.0
PEAKS = ("requested", "allocated", "reserved")


class BeforeDecodingError(Exception):
    """Ends a run whose steps are timed."""


class StepTimer:
    """Times each step between two waits for the device, and ends the run after the last one.

    `listener` hears of every span, inside the time; unlike a pipeline's observer it can be changed between two runs.
    """

    def __init__(self, runtime: "Runtime") -> None:
        self.listener: Observer = SILENT
        self.seconds: list[float] = []
        self._runtime = runtime

    @property
    def wants_blocks(self) -> bool:
        """As the listener does."""
        return self.listener.wants_blocks

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Passes the span on, and times it if it is a step."""
        if span.name == "decode":
            raise BeforeDecodingError
        if span.kind != "step":
            with self.listener.span(span):
                yield
            return
        self._runtime.synchronize()
        began = time.perf_counter()
        with self.listener.span(span):
            yield
        self._runtime.synchronize()
        self.seconds.append(time.perf_counter() - began)


def request_of(flags: argparse.Namespace) -> Request:
    """What is generated."""
    return make_request(
        model_spec(flags.model), seed=0, size=flags.size, frame_num=flags.frame_num, num_steps=flags.steps
    )


def runtime_of(flags: argparse.Namespace) -> "Runtime":
    """Where it is computed."""
    from wan21.runtime import default_device, make_runtime

    return make_runtime(flags.device or default_device())


def pipeline_of(flags: argparse.Namespace, runtime: "Runtime", observer: Observer) -> "VideoPipeline":
    """The pipeline with random weights."""
    from wan21.assets import open_assets
    from wan21.pipeline import VideoPipeline

    spec = model_spec(flags.model)
    options = Options(precision=flags.precision, offload=flags.offload, load_strategy=flags.load_strategy)
    return VideoPipeline(spec, options, open_assets(spec, options, runtime), runtime, observer)


@contextmanager
def measuring(runtime: "Runtime") -> Iterator["Recorder"]:
    """The measurer as a worker uses it, with blocks, writing to a file."""
    from wan_sweep.measure.recorder import Recorder
    from wan_sweep.worker import EventFile

    with tempfile.TemporaryFile("w") as file:
        yield Recorder(runtime, EventFile(file), wants_blocks=True)


def peaks_off(flags: argparse.Namespace) -> dict[str, Any]:
    """The allocator's own peaks of a run to which nobody listens."""
    runtime = runtime_of(flags)
    pipeline = pipeline_of(flags, runtime, SILENT)
    with runtime.counting():
        runtime.warm_up()
        runtime.reset_memory_peaks()
        pipeline.generate(request_of(flags))
        memory = runtime.memory()
    return {name: getattr(memory, f"{name}_peak_bytes") for name in PEAKS}


def peaks_on(flags: argparse.Namespace) -> dict[str, Any]:
    """The peaks that the measurer tells."""
    runtime = runtime_of(flags)
    with runtime.counting():
        runtime.warm_up()
        with measuring(runtime) as recorder:
            pipeline_of(flags, runtime, recorder).generate(request_of(flags))
            metrics = recorder.metrics()
    return {name: metrics[f"memory/peak/{name}_bytes"] for name in PEAKS}


def times(flags: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, by round, without and with the measurer."""
    runtime, request = runtime_of(flags), request_of(flags)
    timer = StepTimer(runtime)
    pipeline = pipeline_of(flags, runtime, timer)
    rounds: dict[str, list[list[float]]] = {"off": [], "on": []}
    for number in range(flags.repeats + 1):
        for way in ("off", "on") if number % 2 else ("on", "off"):  # so that a drift helps neither
            timer.seconds = []
            with suppress(BeforeDecodingError):
                if way == "off":
                    timer.listener = SILENT
                    pipeline.generate(request)
                else:
                    with runtime.counting(), measuring(runtime) as timer.listener:
                        pipeline.generate(request)
            rounds[way].append(timer.seconds)
    device = runtime.facts()["device"]
    return {"device": device, "is_judged": runtime.is_asynchronous, **{way: all_[1:] for way, all_ in rounds.items()}}


PARTS = {"peaks_off": peaks_off, "peaks_on": peaks_on, "times": times}


def run_part(part: str) -> dict[str, Any]:
    """What a part gives, run by a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    environment = {"KINETO_LOG_LEVEL": "99", **os.environ}  # the counter of a CPU is chatty otherwise
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} ended with {done.returncode}; nothing was measured")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def percent(on: float, off: float) -> float:
    """How much longer it took."""
    return 100 * (on / off - 1)


def compare_peaks() -> tuple[dict[str, Any], bool]:
    """Prints the peaks side by side; the figures, and whether they are equal."""
    off, on = run_part("peaks_off"), run_part("peaks_on")
    print(f"{'peak of a run':<16}{'measuring off':>16}{'measuring on':>16}{'difference':>14}{'limit':>8}")
    for name in PEAKS:
        difference = format_bytes(on[name] - off[name])
        print(f"{name:<16}{format_bytes(off[name]):>16}{format_bytes(on[name]):>16}{difference:>14}{'0 B':>8}")
    return {"peaks_off": off, "peaks_on": on}, off == on


def compare_times() -> tuple[dict[str, Any], bool]:
    """Prints the times side by side; the figures, and whether the limit is kept, where there is one."""
    told = run_part("times")
    off, on = ([seconds for one in told[way] for seconds in one] for way in ("off", "on"))
    by_round = [
        percent(median(with_it), median(without)) for with_it, without in zip(told["on"], told["off"], strict=True)
    ]
    slower = percent(median(on), median(off))
    limit = f"{LIMIT_PERCENT:.0f} %" if told["is_judged"] else "none"
    print(f"\n{'time of a step':<16}{'measuring off':>16}{'measuring on':>16}{'difference':>14}{'limit':>8}")
    for name, of in (("median", median), ("shortest", min), ("longest", max)):
        row = f"{name:<16}{format_seconds(of(off)):>16}{format_seconds(of(on)):>16}{percent(of(on), of(off)):>+12.2f} %"
        print(row + (f"{limit:>8}" if name == "median" else ""))
    print(f"{len(off)} steps each way in {len(by_round)} rounds, whose medians differ by", end=" ")
    print(f"{min(by_round):+.2f} to {max(by_round):+.2f} %; on {told['device']}.")
    if not told["is_judged"]:
        print("Not judged: on a CPU the counter is torch's profiler, which costs time by design.")
    return {"times": told, "slower_percent": slower}, slower <= LIMIT_PERCENT or not told["is_judged"]


def main() -> int:
    """Measures, prints both tables and the figures, and compares with the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--size", help="WIDTH*HEIGHT; default: the model's")
    parser.add_argument("--frame-num", type=int, help="default: the model's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=6, help="rounds that count")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--load-strategy", choices=LOAD_STRATEGIES, default="full")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part:
        print(json.dumps(PARTS[flags.part](flags)))
        return 0
    shape = request_of(flags).shape
    ways = f"{flags.precision}, load_strategy={flags.load_strategy}, offload={str(flags.offload).lower()}"
    print(f"{flags.model}, {shape.width}*{shape.height}, {shape.num_frames} frames, {flags.steps} steps, {ways}\n")
    peaks, are_equal = compare_peaks()
    seconds, is_fast = compare_times()
    print(json.dumps({"arguments": sys.argv[1:], **peaks, **seconds}, separators=(",", ":")))
    return int(not (are_equal and is_fast))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WanError as error:
        sys.exit(f"measure_overhead.py: {error}")
