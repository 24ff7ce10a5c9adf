"""`python -m wan_sweep.report SWEEP_DIR`: makes table, pictures and reports again from the files of a sweep."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from wan_sweep.report import print_summary, write_reports

_WIDTH_WITHOUT_TERMINAL = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild one sweep's report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wan_sweep.report", description="Rebuild the report of a sweep.")
    parser.add_argument("sweep_dir", type=Path, help="folder of the sweep, with a folder for each job")
    folder: Path = parser.parse_args(arguments).sweep_dir
    if not any(folder.glob("*/record.json")):
        sys.stderr.write(f"sweep_dir={folder} holds no */record.json; give the folder of one sweep\n")
        return 2
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    print_summary(folder, console)
    write_reports(folder)
    console.print(f"\nWritten to {folder}: results.csv, report.md, report.html and pictures.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
