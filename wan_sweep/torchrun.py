"""torchrun for the ranks of one job: `python -m wan_sweep.torchrun FAILURES_FILE [arguments of torchrun]`.

It is torch's own `torch.distributed.run`, and two things that a sweep needs besides. It ends with the process that
started it: killed, torchrun would leave its ranks behind. And it tells in a file which ranks failed, and how: torchrun
itself exits with 1 whatever happened, and writes the rest into a log.
"""

import sys
import tempfile
from pathlib import Path

from wan_sweep.parent import die_with_parent
from wan_sweep.store import write_json

EXIT_FAILED = 1


def main(arguments: list[str]) -> int:
    """Runs torchrun; its failures go to the file that is the first argument, which is not there if all went well."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # torchrun wants a folder per rank even for nothing; by itself it leaves it behind in the system's temporary one.
    with tempfile.TemporaryDirectory(prefix="wan_sweep_ranks_") as folder:
        try:
            torchrun(["--log-dir", folder, *arguments[1:]])
        except ChildFailedError as error:
            failures = {
                str(rank): {"exit_code": failure.exitcode, "pid": failure.pid, "time": failure.timestamp}
                for rank, failure in error.failures.items()
            }
            write_json(Path(arguments[0]), {"first": error.get_first_failure()[0], "failures": failures})
            return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
