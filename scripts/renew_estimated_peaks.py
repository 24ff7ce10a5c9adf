"""Writes tests/data/estimated_peaks.json: what a few presets are estimated to take on an H100.

A test fails when one of these peaks grows, so that no change of the code costs memory unnoticed. Run this when a growth
is meant, look at the difference with `python -m wan_sweep.report.compare`, and commit the file with the change:

    python scripts/renew_estimated_peaks.py
"""

import sys
from pathlib import Path

from wan_sweep.report.compare import Entry, differences, read_entries, table_of, write_table

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE = REPOSITORY / "tests" / "data" / "estimated_peaks.json"


def main() -> int:
    """Estimates, shows what changes, and writes the table."""
    from rich.console import Console

    sys.path.insert(0, str(REPOSITORY))
    from tests.wan_sweep.estimated_presets import estimated_peaks

    peaks = [Entry(label=label, identity=label, metrics=metrics) for label, metrics in estimated_peaks().items()]
    if TABLE.exists():
        Console(width=160).print(table_of(differences(read_entries(TABLE), peaks), 0.0))
    write_table(TABLE, peaks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
