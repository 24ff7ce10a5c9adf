"""An estimate in a process of its own: `python -m wan_sweep.estimate.run JOB_FOLDER CARD`.

It reads the folder's job.json and leaves estimate.json there. Exit codes are the worker's: 0 it fits, 3 it does not.
"""

import os
import sys
from pathlib import Path

from wan_sweep.allocator import settings_of
from wan_sweep.cards import card_named
from wan_sweep.environment import num_cpu_cores
from wan_sweep.schema import Job
from wan_sweep.store import JOB_FILE, read_json, write_json

ESTIMATE_FILE = "estimate.json"
EXIT_CODES = {"ok": 0, "oom": 3, "failed": 1}


def main(arguments: list[str]) -> int:
    """Estimates the job whose folder is the first argument, for the card that the second one names."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch comes: it would start a context that nobody uses
    from wan_sweep.estimate.ranks import estimate_ranks

    folder, card = Path(arguments[0]), card_named(arguments[1])
    settings, _ = settings_of(os.environ)
    job = Job.from_dict(read_json(folder / JOB_FILE)["knobs"])
    result = estimate_ranks(job, card, settings, num_processes=num_cpu_cores())
    write_json(folder / ESTIMATE_FILE, result)
    return EXIT_CODES[result["outcome"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
