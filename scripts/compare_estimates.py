"""Holds estimates against measured runs: which commands to run on a GPU, and the table of what came of them.

    python scripts/compare_estimates.py jobs | bash                        # on the GPU machine: 40 configurations
    python scripts/compare_estimates.py table outputs/estimate_check/*     # anywhere: estimate them, and compare

Ten of the forty are drawn at random from all combinations, by a seed, so that nobody chose what suits the estimator.
The table has requested, allocated and reserved by phase, measured against estimated, the worst one named.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from wan_sweep.cards import DEFAULT_CARD, card_like
from wan_sweep.record import Record, load_records
from wan_sweep.store import JOB_FILE, read_json, write_json
from wan_sweep.units import format_bytes

SEED = 6
NUM_RANDOM = 10
PHASES = ("load", "encode_text", "denoise", "decode")
COUNTERS = ("requested", "allocated", "reserved")
COMMON = "save_video=false fidelity=false track=false sample_steps=2 name=estimate_check"
LARGE = "model=t2v-14B precision=bf16 offload=true"
EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
AXES: Mapping[str, tuple[str, ...]] = {
    "precision": ("fp16", "bf16"),
    "load_strategy": ("full", "block", "part"),
    "offload": ("true", "false"),
    "t5_cpu": ("true", "false"),
    "attention_slicing": ("true", "false", "3"),
    "rows_at_once": ("1024", "4096"),
    "residual_on_host": ("0", "0.5", "1"),
    "vae_precision": ("fp32", "bf16"),
    "vae_budget_gib": ("null", "1.5", "3"),
    "frame_num": ("5", "33", "81"),
}


def commands() -> list[str]:
    """Forty jobs: 24 of the experiment, six of the large model and of the presets, and ten at random."""
    run = f"python -m wan_sweep {COMMON}"
    chosen = [
        "python -m wan_sweep +experiment=estimate_check track=false",  # 24 jobs
        f"{run} {LARGE} size=832*480 frame_num=5",
        f"{run} {LARGE} size=1280*720 frame_num=33",
        f"{run} {LARGE} size=1280*720 frame_num=81 optimization=lowest_memory",
        f"{run} model=t2v-1.3B precision=fp32 optimization=memory_opt frame_num=33",
        f"{EXPANDABLE} {run} model=t2v-1.3B precision=bf16 offload=true",
        f"{EXPANDABLE} {run} model=t2v-1.3B precision=bf16 optimization=lowest_memory",
    ]
    draw = random.Random(SEED)  # noqa: S311 # nothing secret
    drawn = [{name: draw.choice(values) for name, values in AXES.items()} for _ in range(NUM_RANDOM)]
    words = [" ".join(f"{name}={value}" for name, value in one.items()) for one in drawn]
    return [*chosen, *(f"{run} model=t2v-1.3B {one}" for one in words)]


def estimated(record: Record, folder: Path) -> dict[str, Any]:
    """The estimate of a measured job, made in a process of its own with the same allocator settings."""
    gpu, num_bytes = record.environment.get("gpu", ""), int(record.environment.get("gpu_memory_bytes", 0))
    card = card_like(gpu, num_bytes)
    write_json(folder / JOB_FILE, {"knobs": {**record.knobs}})
    subprocess.run(
        [sys.executable, "-m", "wan_sweep.estimate.run", str(folder), card.name if card else DEFAULT_CARD],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": _conf(record)},
        check=False,
    )
    return read_json(folder / "estimate.json")


def _conf(record: Record) -> str:
    conf = record.environment.get("allocator", "")
    return "" if conf == "default" else conf


def differences(sweeps: list[Path]) -> Iterator[tuple[str, str, str, int, int]]:
    """Label, phase, counter, measured and estimated bytes of every measured job."""
    for sweep in sweeps:
        for record in load_records(sweep):
            if record.outcome != "ok" or record.mode != "measure":
                continue
            with tempfile.TemporaryDirectory() as folder:
                told = estimated(record, Path(folder))
            label = " ".join(f"{name}={json.dumps(value)}" for name, value in _telling(record).items())
            for phase in PHASES:
                for counter in COUNTERS:
                    name = f"memory/peak/{phase}/{counter}_bytes"
                    if name in record.metrics:
                        yield label, phase, counter, int(record.metrics[name]), int(told["metrics"].get(name, 0))


def _telling(record: Record) -> dict[str, Any]:
    knobs = ("model", "size", *AXES)
    return {name: record.knobs[name] for name in knobs if record.knobs.get(name) not in {None, False}} | (
        {"allocator": conf} if (conf := _conf(record)) else {}
    )


def table(sweeps: list[Path]) -> str:
    """The comparison as Markdown: by phase and counter the median and the worst error, and which job has it."""
    found = list(differences(sweeps))
    jobs = list(dict.fromkeys(label for label, *_ in found))
    lines = [
        f"{len(jobs)} measured jobs. Error of the estimate in percent of the measured value.",
        "",
        "| phase | counter | equal to the byte | median of abs. | worst | measured | estimated | worst job |",
        "| --- | --- | --: | --: | --: | --: | --: | --- |",
    ]
    for phase in PHASES:
        for counter in COUNTERS:
            rows = [one for one in found if one[1:3] == (phase, counter)]
            if not rows:
                continue
            errors = [100 * (guess - real) / real for *_, real, guess in rows]
            label, _, _, real, guess = max(rows, key=lambda one: abs(one[4] - one[3]) / one[3])
            equal = sum(error == 0 for error in errors)
            lines.append(
                f"| {phase} | {counter} | {equal} of {len(rows)} | {median(map(abs, errors)):.3f} | "
                f"{100 * (guess - real) / real:+.3f} | {format_bytes(real)} | {format_bytes(guess)} | {label} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Lists the commands, or makes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="what", required=True)
    subparsers.add_parser("jobs", help="print the commands to run on a GPU")
    subparsers.add_parser("table", help="compare sweeps").add_argument("sweeps", nargs="+", type=Path)
    asked = parser.parse_args()
    if asked.what == "jobs":
        print("\n".join(" ".join(map(_quoted, shlex.split(one))) for one in commands()))
    else:
        print(table(asked.sweeps))
    return 0


def _quoted(word: str) -> str:
    return shlex.quote(word) if "*" in word else word


if __name__ == "__main__":
    sys.exit(main())
