"""An estimate as a pass of a job: what the worker writes in place of a measurement."""

import os
import shutil
from pathlib import Path
from typing import Any

from wan_sweep.allocator import settings_of
from wan_sweep.cards import card_named
from wan_sweep.estimate.ranks import SinkOf, estimate_ranks
from wan_sweep.schema import Job
from wan_sweep.store import ATTRIBUTION, ESTIMATE, rank_folder, write_json

ATTRIBUTION_VERSION = 1


def estimate_job(folder: Path, job: Job, sink_of: SinkOf, *, num_processes: int = 1) -> dict[str, Any]:
    """Estimates a resolved job for its card, with the allocator's settings of this process's environment.

    Leaves attribution.json in the folder of each rank: who fills the card at each peak needs no extra run. Of several
    ranks so many at the most are gone through at a time, as `estimate_ranks` says.

    Raises:
        UsageError: the job's card is not known.
    """
    settings, unknown = settings_of(os.environ)
    result = estimate_ranks(job, card_named(str(job.card)), settings, sink_of, num_processes=num_processes)
    peaks = result.pop("peaks")
    for rank, peaks_of_rank in result.pop("peaks_by_rank", {"0": peaks}).items():
        home = rank_folder(folder, int(rank))
        home.mkdir(exist_ok=True)
        write_json(home / ATTRIBUTION.result, _attribution(job, peaks_of_rank))
    for rank, other in result["estimate"].get("gone_through", {}).items():
        if int(rank) != other:  # its events are those of the other one
            shutil.copyfile(*(rank_folder(folder, one) / ESTIMATE.events for one in (other, int(rank))))
    warnings = [
        {
            "code": "allocator_option_unknown",
            "text": f"the model of the allocator does not know {option}",
            "advice": "reserved memory may differ from a real run with it",
        }
        for option in unknown
    ]
    return {**result, "weights": "never drawn", "warnings": result["warnings"] + warnings}


def _attribution(job: Job, peaks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema_version": ATTRIBUTION_VERSION,
        "device": job.card,
        "outcome": "ok",
        "reason": "",
        "num_steps": job.sample_steps,
        "drift_bytes": None,
        "peaks": peaks,
        "oom": None,
    }
