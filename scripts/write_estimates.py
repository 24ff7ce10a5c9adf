"""Writes what a few configurations are estimated to take, with the torch that is installed here.

Estimates are to be the same whatever build of torch makes them: for CPUs, or for CUDA without a visible GPU, and of
versions whose allocator follows the same rules. A test compares each file in tests/data/estimates with what the present
torch says, to the byte; this makes such a file elsewhere, in half a minute:

    CUDA_VISIBLE_DEVICES= python scripts/write_estimates.py tests/data/estimates/torch2.11.0_cu130.json
"""

import argparse
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from wan_sweep.allocator import Settings
from wan_sweep.cards import DEFAULT_CARD, card_named
from wan_sweep.environment import Machine
from wan_sweep.errors import UsageError
from wan_sweep.rules import resolve
from wan_sweep.schema import Job
from wan_sweep.store import write_json

TINY = Job(model="tiny", mode="estimate", card=DEFAULT_CARD, sample_steps=2)
SMALL = Job(mode="estimate", card=DEFAULT_CARD, frame_num=5, size="832*480", sample_steps=2, offload=True)
JOBS: Mapping[str, Job] = {
    "tiny": TINY,
    "tiny streamed": TINY.replace(load_strategy="part", offload=True, attention_slicing=True, kernels="fused"),
    "tiny tiled": TINY.replace(size="256*160", frame_num=17, vae_budget_gib=0.01, offload=True, precision="bf16"),
    "tiny-vace": TINY.replace(model="tiny-vace", size="96*64", frame_num=9, precision="bf16", attention_kernel="fa3"),
    "t2v-1.3B": SMALL.replace(model="t2v-1.3B", precision="bf16", vae_precision="bf16", vae_budget_gib=0.69),
    "t2v-14B": SMALL.replace(model="t2v-14B", load_strategy="block", kernels="fused", sample_solver="dpm++"),
}
EXPANDABLE = ("tiny", "tiny streamed")


def estimated(job: Job, settings: Settings) -> dict[str, int | float]:
    """Every metric of memory.

    Raises:
        UsageError: the job cannot be estimated.
    """
    from wan_sweep.estimate.predict import estimate

    resolved = resolve(job, Machine())
    if resolved.refusal:
        raise UsageError(resolved.refusal)
    metrics = estimate(resolved.job, card_named(DEFAULT_CARD), settings)["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("memory/")}


def estimates() -> dict[str, dict[str, int | float]]:
    """All of them, by what they are of."""
    expandable = Settings(expandable_segments=True)
    found = {name: estimated(job, Settings()) for name, job in JOBS.items()}
    return found | {f"{name}, expandable segments": estimated(JOBS[name], expandable) for name in EXPANDABLE}


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="of the file")
    path = parser.parse_args().path
    import torch

    if torch.cuda.is_available():
        sys.stderr.write("this process sees a GPU, and estimates are made without: CUDA_VISIBLE_DEVICES= python ...\n")
        return 2
    made_with = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    write_json(path, {"made_with": made_with, "estimates": estimates()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
