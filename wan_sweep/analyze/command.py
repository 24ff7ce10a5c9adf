"""The command line of `scripts/analyze_trace_file.py`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from wan_sweep.analyze.finding import Analysis
from wan_sweep.analyze.kinds import DEFAULT_TOP, analyze
from wan_sweep.analyze.picture import draw
from wan_sweep.analyze.source import OnRead, UnreadableFileError
from wan_sweep.analyze.terminal import print_analysis
from wan_sweep.store import write_json

_STANDARD_OUTPUT = "-"
_WIDTH_WITHOUT_TERMINAL = 160
_USAGE = 2
_INTERRUPTED = 130


class _Console(Console):
    """One that lets `main` handle that nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyses one file and shows what it says; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        with _progress(given.path) as on_read:
            analysis = analyze(given.path, top=given.top, on_read=on_read)
        _show(analysis, given)
    except UnreadableFileError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` does; Python must not complain when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'the output'} cannot be written: {error.strerror or error}\n")
        return _USAGE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="analyze_trace_file.py",
        description="Says where memory and time went: reads a Chrome trace (torch.profiler's or any other), a memory "
        "snapshot of torch, or the memory_events.json or attribution.json of a job; each may be gzipped. What kind of "
        "file it is, is found from its content.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, help="the file")
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=_STANDARD_OUTPUT,
        help="write the numbers as JSON; alone or -: print it",
    )
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw a picture")
    parser.add_argument("--top", metavar="N", type=_positive, default=DEFAULT_TOP, help="rows of a table (%(default)s)")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; give 1 or more")
    return number


@contextmanager
def _progress(path: Path) -> Iterator[OnRead]:
    """A bar on a terminal, by bytes read; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=path.stat().st_size if path.is_file() else None)

        def on_read(num_bytes: int) -> None:
            bar.update(task, advance=num_bytes, description="reading" if num_bytes else "analyzing")

        yield on_read


def _show(analysis: Analysis, given: argparse.Namespace) -> None:
    """Files first: whoever reads the output may stop reading."""
    is_printed = given.json == _STANDARD_OUTPUT
    if given.json and not is_printed:
        write_json(Path(given.json), analysis.to_json())
    if given.png:
        draw(analysis, given.png)
    if is_printed:
        json.dump(analysis.to_json(), sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        console = _Console(highlight=False)
        if not console.is_terminal:
            console = _Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
        print_analysis(analysis, console)
    sys.stdout.flush()
