"""Our presets and diffusers' set-ups side by side: memory, seconds, and the ratios between them.

Why: "less memory" and "faster" mean something against what a user would otherwise run, on the same card and day.

How: python scripts/bench_peers.py --model t2v-1.3B                                    (one H100: some 6 minutes)
     python scripts/bench_peers.py --model t2v-14B --size '1280*720' --steps 2 --keep large.json      (9 minutes a call)
It needs the packages of the extra "peers" (pip install -e ".[peers]"). Each set-up runs in a process of its own, one
after the other, with random weights of the official sizes. Ours are jobs of wan_sweep (scripts/peer_diffusers.py says
what is in theirs, and what is not); both sides have the VAE in the same format. With --keep, what was measured is
kept in that file, and the same command goes on where the time ran out.

A forward is the median step, the first left out, divided by its two passes. Fifty steps are not run: their time is that
of the text encoder, of fifty such steps, and of decoding. Loading weights, compiling and saving are in none of these.
The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import peer_diffusers
from peer_results import THEIRS, Result, figures, ratio_columns, ratios

from wan21.errors import WanError
from wan21.models import MODELS, model_spec
from wan21.options import PRECISIONS
from wan21.request import make_request
from wan_sweep.environment import describe, read_machine
from wan_sweep.errors import RecordError, UsageError
from wan_sweep.report.markdown import table
from wan_sweep.store import read_json, write_json
from wan_sweep.units import format_seconds

OURS = {
    "fastest": ("optimization=fastest",),
    "lowest_memory": ("optimization=lowest_memory",),
    "fastest_sdpa": ("optimization=fastest", "attention_kernel=sdpa"),
    "balanced": ("optimization=balanced",),
    "none": ("optimization=none",),
}
"""Presets; fastest_sdpa has the attention that theirs have, where there is a faster one."""

SETUPS = (*list(OURS)[:2], *(f"{THEIRS}{name}" for name in peer_diffusers.SETUPS), *list(OURS)[2:])
"""In the order of running: what a call that runs out of time must have comes first."""

PACKAGES = ("diffusers", "transformers", "accelerate")
SCHEMA_VERSION = 1
TOLD_OF_MACHINE = ("gpu", "driver", "torch", "cuda", "cudnn", "python", "allocator", "git_commit", "git_dirty")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every set-up generates, and how."""

    model: str
    size: str
    frame_num: int
    steps: int
    vae_precision: str
    device: str

    @classmethod
    def of(cls, flags: argparse.Namespace) -> Self:
        """With what was left open decided.

        Raises:
            UsageError: a size or number that the model cannot do.
        """
        spec = model_spec(flags.model)
        shape = make_request(spec, seed=0, size=flags.size, frame_num=flags.frame_num, num_steps=flags.steps).shape
        if flags.steps < 2:
            raise UsageError(f"--steps {flags.steps} leaves nothing to measure: the first step does not count; give 2")
        return cls(
            model=flags.model,
            size=f"{shape.width}*{shape.height}",
            frame_num=shape.num_frames,
            steps=flags.steps,
            vae_precision=flags.vae_precision,
            device=flags.device or ("cuda" if read_machine().num_gpus else "cpu"),
        )


def run_ours(setup: str, workload: Workload, timeout_s: float) -> Result:
    """A job of wan_sweep, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        knobs = {"model": workload.model, "size": workload.size, "frame_num": workload.frame_num}
        knobs |= {"sample_steps": workload.steps, "vae_precision": workload.vae_precision, "device": workload.device}
        knobs |= {"precision": "bf16", "output_root": name, "hydra.run.dir": f"{name}/job/run"}
        switches = ["track=false", "save_video=false", "fidelity=false", "resume=false", *OURS[setup]]
        command = [sys.executable, "-m", "wan_sweep", *(f"{knob}={value}" for knob, value in knobs.items()), *switches]
        done = _run(command, timeout_s)
        try:
            return Result.of_ours(Path(name, "job", "run"))
        except RecordError:
            return Result(what="ours", outcome="failed", reason=_last_line(done.stderr or done.stdout))


def run_theirs(setup: str, workload: Workload, timeout_s: float) -> Result:
    """A set-up of diffusers."""
    what = peer_diffusers.SETUPS[setup]
    options = {name.replace("_", "-"): value for name, value in asdict(workload).items()}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = _run([sys.executable, peer_diffusers.__file__, setup, *arguments], timeout_s)
    if done.returncode:
        return Result(what=what, outcome="failed", reason=_last_line(done.stderr))
    return Result.of_theirs(what, json.loads(done.stdout.splitlines()[-1]))


def _run(command: Sequence[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def _last_line(words: str) -> str:
    return next(reversed(words.strip().splitlines()), "it ended without a word")


def run(setup: str, workload: Workload, timeout_s: float) -> Result:
    """One set-up; longer than this and it is stopped."""
    try:
        if setup in OURS:
            return run_ours(setup, workload, timeout_s)
        return run_theirs(setup.removeprefix(THEIRS), workload, timeout_s)
    except subprocess.TimeoutExpired:
        return not_run("the time of this call ended during it")


def not_run(reason: str) -> Result:
    """Of a set-up for which there was no time."""
    return Result(what="", outcome="not run", reason=reason)


def run_all(
    setups: Sequence[str], workload: Workload, results: dict[str, Result], budget_s: float, keep: Callable[[], None]
) -> None:
    """Runs what is missing, while there is time for what took longest so far; `keep` is called after each."""
    ends, longest = time.monotonic() + budget_s, 0.0
    for setup in setups:
        if setup in results and results[setup].outcome in {"ok", "oom"}:
            continue
        began = time.monotonic()
        if ends - began <= longest:
            results[setup] = not_run("no time was left in this call")
            continue
        results[setup] = run(setup, workload, ends - began)
        took = time.monotonic() - began
        longest = max(longest, took)
        print(f"{setup}: {results[setup].outcome}, {format_seconds(took)} {results[setup].reason}".rstrip(), flush=True)
        keep()


def page(workload: Workload, machine: Mapping[str, str], results: Mapping[str, Result]) -> str:
    """Both tables as Markdown."""
    versions = {name: words for result in results.values() for name, words in result.versions.items()}
    facts = [f"{name} {words}" for name, words in {**machine, **versions}.items()]
    blocks = [
        f"## {workload.model}, {workload.size}, {workload.frame_num} frames, bf16, VAE {workload.vae_precision}",
        f"{', '.join(facts)}. {workload.steps} steps with guidance, random weights.",
        table(figures(results)),
    ]
    reasons = [f"- {setup}: {result.reason}" for setup, result in results.items() if result.reason]
    if reasons:
        blocks.append("\n".join(reasons))
    found = ratios(results)
    if found:
        blocks.append(table(ratio_columns(found)))
    return "\n\n".join(blocks)


def kept_results(path: Path | None, head: Mapping[str, Any]) -> dict[str, Result]:
    """What an earlier call kept.

    Raises:
        RecordError: the file is damaged.
        UsageError: it is of another workload or machine.
    """
    if path is None or not path.exists():
        return {}
    values = read_json(path)
    if values.get("head") != head:
        raise UsageError(f"--keep {path} holds results of another workload or machine; name another file")
    return {setup: Result(**result) for setup, result in values["results"].items()}


def main() -> int:
    """Measures, prints both tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--size", help="WIDTH*HEIGHT; default: the model's")
    parser.add_argument("--frame-num", type=int, help="default: the model's")
    parser.add_argument("--steps", type=int, default=3, help="the first does not count; default: 3")
    parser.add_argument("--vae-precision", choices=PRECISIONS, default="bf16", help="of both sides; default: bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--setups", nargs="+", choices=tuple(SETUPS), default=tuple(SETUPS), metavar="SETUP")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds that this call may take; default: 540")
    parser.add_argument("--keep", type=Path, help="file to keep results in, and to go on from")
    flags = parser.parse_args()
    workload = Workload.of(flags)
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        print(f"Not installed: {', '.join(missing)}. Set-ups that need it fail; pip install -e '.[peers]'")
    machine = {name: words for name, words in describe(read_machine()).items() if name in TOLD_OF_MACHINE}
    head = {"schema_version": SCHEMA_VERSION, "workload": asdict(workload), "machine": machine}
    kept = kept_results(flags.keep, head)
    results = {setup: kept[setup] for setup in SETUPS if setup in kept}

    def values() -> dict[str, Any]:
        return {"head": head, "results": {setup: asdict(result) for setup, result in results.items()}}

    run_all(
        flags.setups,
        workload,
        results,
        flags.budget_s,
        lambda: write_json(flags.keep, values()) if flags.keep else None,
    )
    print(page(workload, machine, results), end="\n\n")
    print(json.dumps({**values(), "ratios": ratios(results)}, separators=(",", ":")))
    return int(any(result.outcome == "failed" for result in results.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UsageError, RecordError, WanError) as error:
        sys.exit(f"bench_peers.py: {error}")
