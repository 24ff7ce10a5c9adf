"""Room on the disk and in the host's memory."""

from pathlib import Path

from wan_sweep.checks.check import Check
from wan_sweep.units import GIB, MIB, format_bytes

# What a job leaves with everything on: latents and frames for the comparison, video, trace, snapshot, MLflow's copies.
JOB_BYTES = 512 * MIB
# Under this, not even records and the report are sure to be written.
LEAST_BYTES = 64 * MIB

# Python, torch with CUDA's libraries, and the pieces of weights on their way to the device.
WORKER_BYTES = {"cuda": 4 * GIB, "cpu": GIB}


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there already."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def check_disk(folder: Path, free_bytes: int, num_jobs: int) -> Check:
    """Whether the results of so many jobs will fit."""
    text = f"{format_bytes(free_bytes)} free for {folder}"
    if free_bytes < LEAST_BYTES:
        return Check(
            name="disk",
            state="refused",
            text=f"{text}; the records alone may take {format_bytes(LEAST_BYTES)}",
            advice="make space, or choose another place with output_root=FOLDER",
        )
    need = num_jobs * JOB_BYTES
    if free_bytes < need:
        jobs = "a job" if num_jobs == 1 else f"{num_jobs} jobs"
        return Check(
            name="disk",
            state="warning",
            text=f"{text}; {jobs} may leave up to {format_bytes(need)} with traces and snapshots",
            advice="make space, or choose another place with output_root=FOLDER",
        )
    return Check(name="disk", text=text)


def check_memory(available_bytes: int, *, uses_gpu: bool) -> Check:
    """Whether a worker fits beside what is in the host's memory already."""
    text = f"{format_bytes(available_bytes)} of the host's memory are available"
    need = WORKER_BYTES["cuda" if uses_gpu else "cpu"]
    if available_bytes < need:
        return Check(
            name="memory",
            state="warning",
            text=f"{text}; a worker takes some {format_bytes(need)} besides weights that wait on the host",
            advice="end other programs; with load_strategy=block and t5_cpu=true weights are on the host as well",
        )
    return Check(name="memory", text=text)
