"""What the scripts that make a table of sweeps have in common: arguments, printing, writing."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_sweep.errors import RecordError
from wan_sweep.store import write_atomically

Page = Callable[[Sequence[Path]], str]
Pack = Callable[[Path, Sequence[Path], str], None]


def main(description: str | None, page: Page, pack: Pack | None = None) -> int:
    """Prints the table, and writes it to the files that are named.

    Args:
        description: for the help page.
        page: makes the table of sweeps' folders.
        pack: writes an archive of the folders and the table, if there can be one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="SWEEP_FOLDER")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    if pack is not None:
        parser.add_argument("--pack", type=Path, help="compressed archive to write as well")
    flags = parser.parse_args()
    try:
        words = page(flags.folders)
    except RecordError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(words)
    if flags.output:
        write_atomically(flags.output, words)
        print(f"Written to {flags.output}")
    if pack is not None and flags.pack:
        pack(flags.pack, flags.folders, words)
        print(f"Packed into {flags.pack}")
    return 0
