"""Tables, sentences and pictures, made from the files of a sweep and from nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

from wan_sweep.report.csv_table import csv_text
from wan_sweep.report.markdown import markdown_text
from wan_sweep.report.sheet import read_sheet
from wan_sweep.report.text_table import print_sheet
from wan_sweep.store import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_summary", "write_reports", "write_table"]


def write_table(sweep_dir: Path) -> None:
    """Write results.csv from the records that are there.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    write_atomically(sweep_dir / "results.csv", csv_text(read_sheet(sweep_dir).records))


def write_reports(sweep_dir: Path) -> None:
    """Write results.csv, the pictures and report.md, each whole or not at all.

    Raises:
        OSError: as `write_table`.
    """
    from wan_sweep.report.pictures import draw_all

    write_table(sweep_dir)
    sheet = read_sheet(sweep_dir)
    pictures = draw_all(sheet)
    write_atomically(sweep_dir / "report.md", markdown_text(sheet, pictures))


def print_summary(sweep_dir: Path, console: "Console") -> None:
    """Print the table and what follows from it."""
    print_sheet(read_sheet(sweep_dir), console)
