"""One table of what the presets take: memory, seconds, fidelity, beside the goals and the limits of the hardware.

Why: the record is a claim, and a claim needs one page on which every figure stands next to what it was to be.

How: python scripts/record_table.py SWEEP_FOLDER ... [--output FILE]   (scripts/run_record.sh does it at its end)
Nothing is measured here: all figures come from the records of the sweeps. Where several sweeps hold the same job, with
and without expandable segments say, each is a row.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import table_command
from record_goals import (
    ALLOCATED,
    DECODE,
    FORWARD,
    GOALS,
    LATENTS,
    RESERVED,
    STATED_FOR,
    T5_PEAK,
    T5_SECONDS,
    Figure,
    Goal,
    Line,
    decode_limit,
    forward_limit,
    neighbours,
    ratio,
    read_lines,
)

from wan_sweep.report.cells import Column
from wan_sweep.report.facts import facts
from wan_sweep.report.fidelity import fidelity_cell
from wan_sweep.report.markdown import table
from wan_sweep.report.sheet import read_sheet
from wan_sweep.units import format_gib

NOTHING = "-"
NOTES = """\
- A forward is the median step, the first left out, divided by its passes. Decode is the whole phase, to the host.
- "x least": against the shortest exact one of the same workload here; for decode with the VAE in the same format.
- Peaks are of the whole run from prompt to video, text encoder included. Video: PSNR in dB against the reference, which
  has its VAE in its own format; latents: the norm of the difference over the plain run's norm.
"""


def notes(lines: Sequence[Line]) -> str:
    """What the words of the table mean, on which card it was, and what ran beside it."""
    found = [NOTES.rstrip()]
    if any(line.has_limits for line in lines):
        cards = ", ".join(dict.fromkeys(line.gpu for line in lines if line.has_limits))
        found.append(
            f"- Limits (bf16): each kind of kernel at the highest rate that was measured for it on an {STATED_FOR};\n"
            "  for decode cuDNN's convolutions over whole frames. scripts/record_goals.py holds the rates.\n"
            f"- Goals were stated for one {STATED_FOR}; here it was {cards}."
        )
        if any(line.has_limits and STATED_FOR not in line.gpu for line in lines):
            found[-1] += (
                " The processor and its rates of products and attention\n  are the same; faster memory helps what is "
                "bound by memory."
            )
    if number := neighbours(lines):
        found.append(
            f"- {number} of the jobs ran while another ran on the same host, each on a GPU of its own: they shared the "
            "cores and the\n  memory of the host, which can make them slower, not faster."
        )
    return "\n".join(found)


def _text(title: str, cells: Sequence[str]) -> Column:
    return Column(title=(title,), cells=tuple(cell or NOTHING for cell in cells), is_number=False)


def _numbers(title: str, values: Sequence[float | None], show: Callable[[float], str]) -> Column:
    return Column(title=(title,), cells=tuple(NOTHING if value is None else show(value) for value in values))


def _figure(figure: Figure, lines: Sequence[Line]) -> Column:
    return _numbers(figure.title, [figure.read(line) for line in lines], figure.show)


def _ratios(figure: Figure, lines: Sequence[Line]) -> Column:
    return _numbers("x least", [ratio(figure, line, lines) for line in lines], "{:.2f}".format)


def figures(lines: Sequence[Line]) -> list[Column]:
    """What was measured, a row for each configuration."""
    pinned, resident = "memory/peak/host_pinned_bytes", "memory/peak/host_rss_bytes"
    return [
        _text("workload", [line.workload for line in lines]),
        _text("preset", [line.label for line in lines]),
        _text("VAE", [line.vae for line in lines]),
        _text("attention", [line.attention for line in lines]),
        _text("allocator", [line.allocator for line in lines]),
        _text("outcome", [line.row.outcome for line in lines]),
        _figure(ALLOCATED, lines),
        _figure(RESERVED, lines),
        _figure(FORWARD, lines),
        _ratios(FORWARD, lines),
        _numbers("limit s", [forward_limit(line) for line in lines], FORWARD.show),
        _figure(DECODE, lines),
        _ratios(DECODE, lines),
        _numbers("limit s", [decode_limit(line) for line in lines], DECODE.show),
        _figure(T5_PEAK, lines),
        _figure(T5_SECONDS, lines),
        _figure(LATENTS, lines),
        _text("video dB", [fidelity_cell(line.row) or "" for line in lines]),
        _numbers("host pinned GiB", [line.value(pinned) for line in lines], format_gib),
        _numbers("host RSS GiB", [line.value(resident) for line in lines], format_gib),
    ]


def goals(lines: Sequence[Line]) -> list[Column]:
    """What was to be reached and what was, a row for each goal of a configuration; no column where none applies."""
    pairs = [(goal, line) for line in lines for goal in GOALS if goal.applies_to(line)]
    measured = [ratio(goal.figure, line, lines) if goal.is_ratio else goal.figure.read(line) for goal, line in pairs]
    if not pairs:
        return []
    return [
        _text("workload", [line.workload for _, line in pairs]),
        _text("preset", [line.label for _, line in pairs]),
        _text("VAE", [line.vae for _, line in pairs]),
        _text("attention", [line.attention for _, line in pairs]),
        _text("allocator", [line.allocator for _, line in pairs]),
        _text("figure", [_title(goal) for goal, _ in pairs]),
        Column(title=("at most",), cells=tuple(_show(goal, goal.at_most) for goal, _ in pairs)),
        Column(
            title=("measured",),
            cells=tuple(
                NOTHING if value is None else _show(goal, value)
                for (goal, _), value in zip(pairs, measured, strict=True)
            ),
        ),
        _text("reached", [_verdict(goal, value) for (goal, _), value in zip(pairs, measured, strict=True)]),
    ]


def _title(goal: Goal) -> str:
    return f"{goal.figure.title.removesuffix(' s')} x least" if goal.is_ratio else goal.figure.title


def _show(goal: Goal, value: float) -> str:
    return f"{value:.2f}" if goal.is_ratio else goal.figure.show(value)


def _verdict(goal: Goal, value: float | None) -> str:
    if value is None:
        return "not measured"
    return "yes" if value <= goal.at_most else f"no, {100 * (value / goal.at_most - 1):.0f} % more"


def page(folders: Sequence[Path]) -> str:
    """The whole table as Markdown.

    Raises:
        RecordError: a folder holds no records, or one cannot be read.
    """
    lines = read_lines(folders)
    blocks = ["# The record"]
    blocks.append("\n".join(f"- {name}: {words}" for name, words in facts([read_sheet(folder) for folder in folders])))
    blocks += [table(figures(lines)), notes(lines)]
    reasons = dict.fromkeys(
        f"- {line.workload} {line.label}, VAE {line.vae}: {line.row.records[0].reason}"
        for line in lines
        if line.row.outcome != "ok" and line.row.records[0].reason
    )
    if reasons:
        blocks += ["## Not measured, or taken over", "\n".join(reasons)]
    if goals(lines):
        blocks += ["## Goals", table(goals(lines))]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    sys.exit(table_command.main(__doc__, page))
