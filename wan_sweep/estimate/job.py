"""An estimate as a pass of a job: what the worker writes in place of a measurement."""

import os
from pathlib import Path
from typing import Any

from wan_sweep.allocator import settings_of
from wan_sweep.cards import card_named
from wan_sweep.estimate.predict import estimate
from wan_sweep.measure.recorder import Sink
from wan_sweep.schema import Job
from wan_sweep.store import ATTRIBUTION, write_json

ATTRIBUTION_VERSION = 1


def estimate_job(folder: Path, job: Job, sink: Sink) -> dict[str, Any]:
    """Estimates a resolved job for its card, with the allocator's settings of this process's environment.

    Leaves attribution.json in the folder: who fills the card at each peak needs no extra run.

    Raises:
        UsageError: the job's card is not known.
    """
    settings, unknown = settings_of(os.environ)
    result = estimate(job, card_named(str(job.card)), settings, sink)
    peaks = result.pop("peaks")
    attribution = {
        "schema_version": ATTRIBUTION_VERSION,
        "device": job.card,
        "outcome": "ok",
        "reason": "",
        "num_steps": job.sample_steps,
        "drift_bytes": None,
        "peaks": peaks,
        "oom": None,
    }
    write_json(folder / ATTRIBUTION.result, attribution)
    warnings = [
        {
            "code": "allocator_option_unknown",
            "text": f"the model of the allocator does not know {option}",
            "advice": "reserved memory may differ from a real run with it",
        }
        for option in unknown
    ]
    return {
        **result,
        "weights": "never drawn",
        "warnings": result["warnings"] + warnings,
        "ranks": [{"rank": 0, "metrics": result["metrics"], "series": result["series"]}],
    }
