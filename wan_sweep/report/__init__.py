"""Tables, sentences and pictures, made from the files of a sweep and from nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wan_sweep.errors import RecordError
from wan_sweep.report.csv_table import csv_text
from wan_sweep.report.markdown import markdown_text
from wan_sweep.report.page import page_text
from wan_sweep.report.ranks import fullest_rank
from wan_sweep.report.sheet import Sheet, read_records, read_sheet
from wan_sweep.report.text_table import print_sheet
from wan_sweep.report.timeline import Timeline, read_timeline
from wan_sweep.report.timeline_picture import draw, draw_timeline
from wan_sweep.store import MEMORY_EVENTS_FILE, TIMELINE_FILE, rank_folder, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["draw_timeline", "print_summary", "write_reports", "write_table"]


def write_table(sweep_dir: Path) -> None:
    """Write results.csv from the records that are there.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    records, _ = read_records(sweep_dir)
    write_atomically(sweep_dir / "results.csv", csv_text(records))


def write_reports(sweep_dir: Path) -> None:
    """Write results.csv, the pictures, report.md and report.html, each whole or not at all.

    Raises:
        OSError: as `write_table`.
    """
    from wan_sweep.report.pictures import draw_all

    write_table(sweep_dir)
    sheet = read_sheet(sweep_dir)
    timelines, damaged = _draw_jobs(sheet)
    sheet = replace(sheet, damaged=(*sheet.damaged, *damaged))
    parts = []
    for part in sheet.by_mode():
        shown = [(row, timelines[row.number]) for row in part.measured if row.number in timelines]
        parts.append((part, draw_all(part, shown)))
    write_atomically(sweep_dir / "report.md", markdown_text(parts))
    write_atomically(sweep_dir / "report.html", page_text(parts))


def print_summary(sweep_dir: Path, console: "Console") -> None:
    """Print the table and what follows from it."""
    print_sheet(read_sheet(sweep_dir), console)


def _draw_jobs(sheet: Sheet) -> tuple[dict[int, Timeline], list[str]]:
    """Draw the timeline of each rank of each job that left one.

    Returns:
        The timeline of each configuration by its number, of several ranks that of the fullest; and what is wrong with
        the files that cannot be read.
    """
    timelines: dict[int, Timeline] = {}
    damaged = []
    for row in sheet.rows:
        for record in row.records:
            for rank in range(max(1, len(record.ranks))):
                folder = rank_folder(sheet.folder / record.name, rank)
                source = folder if (folder / MEMORY_EVENTS_FILE).exists() or not record.measured_in else None
                try:
                    timeline = read_timeline(source or rank_folder(Path(record.measured_in or folder), rank))
                except RecordError as error:
                    damaged.append(str(error))
                    continue
                if timeline is None:
                    continue
                if rank == fullest_rank(record):
                    timelines.setdefault(row.number, timeline)
                if source:
                    draw(timeline, folder / TIMELINE_FILE)
    return timelines, damaged
