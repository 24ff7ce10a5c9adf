"""`python -m wan_sweep.plan model=t2v-14B 'size=1280*720' vram_gib=8`: which knobs for which card."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from wan21.errors import WanError
from wan_sweep import convert
from wan_sweep.cards import CARDS, card_named
from wan_sweep.environment import Machine
from wan_sweep.errors import UsageError
from wan_sweep.planner.client import ask, margin_of, nearest_card, why_nothing_fits
from wan_sweep.report.pareto import pareto_front
from wan_sweep.rules import resolve
from wan_sweep.schema import KNOBS, Job, text
from wan_sweep.units import GIB, format_bytes, format_gib, format_seconds

USAGE = """python -m wan_sweep.plan [model=...] [size=...] [any other knob=value] vram_gib=8 | card=NAME
    the fastest configuration that fits, the runners-up, and what limits each
    max=frame_num or max=size   the largest workload that fits, and its fastest configuration
    margin_gib=0.5              what stays unused; default 2 % of the card and at least 0.25 GiB
Cards: """ + ", ".join(CARDS)
LARGEST = ("frame_num", "size")
_OWN = ("margin_gib", "max")
_WIDTH_WITHOUT_TERMINAL = 160


def main(arguments: Sequence[str]) -> int:
    """Plans and prints; the exit code is 0 if something fits, 1 if nothing does, 2 for what cannot be read."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    if not arguments or {"-h", "--help"} & set(arguments):
        console.print(USAGE, markup=False)
        return 0 if arguments else 2
    try:
        return _plan(_values(arguments), console)
    except WanError as error:
        sys.stderr.write(f"wan_sweep: {error}\n")
        return error.exit_code


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    """Names and values, in Hydra's grammar.

    Raises:
        UsageError: a name that is none, or several values.
    """
    values: dict[str, Any] = {}
    for one in convert.parse(arguments):
        name = str(one.key_or_group)
        if name not in KNOBS and name not in _OWN:
            raise UsageError(f"there is no knob {name}; {USAGE}")
        if one.is_sweep_override():
            raise UsageError(f"{one.input_line} lists several values; a plan is for one workload")
        values[name] = _plain(one)
    return values


def _plain(one: Override) -> Any:  # noqa: ANN401 # whatever was typed
    value = one.value()
    return str(value) if hasattr(value, "text") else value


def _plan(values: dict[str, Any], console: Console) -> int:
    largest = values.pop("max", None)
    if largest not in {None, *LARGEST}:
        raise UsageError(f"max={largest} cannot be: choose {' or '.join(LARGEST)}")
    vram_gib, margin_gib = (values.pop(name, None) for name in ("vram_gib", "margin_gib"))
    for name, number in (("vram_gib", vram_gib), ("margin_gib", margin_gib)):
        if number is not None and (not isinstance(number, int | float) or number <= 0):
            raise UsageError(f"{name}={number} cannot be: choose a number above 0")
    if vram_gib is None and "card" not in values:
        raise UsageError("for which card? give vram_gib=8, or card=NAME with one of " + ", ".join(CARDS))
    if "card" in values:
        card = card_named(str(values["card"]))
        vram_bytes = card.device_bytes if vram_gib is None else int(vram_gib * GIB)
    else:
        vram_bytes = int(vram_gib * GIB)
        card = nearest_card(vram_bytes)
    margin_bytes = margin_of(vram_bytes) if margin_gib is None else int(margin_gib * GIB)
    checked = {name: convert.value_of(KNOBS[name], value) for name, value in values.items()}
    one = resolve(Job(mode="estimate", kernels="auto").replace(**{**checked, "card": card.name}), Machine())
    if one.refusal:
        raise UsageError(one.refusal)
    what = f"{one.job.model} {one.job.size}" + ("" if largest == "frame_num" else f", {one.job.frame_num} frames")
    console.print(
        f"{what}, {one.job.precision}, on {format_bytes(vram_bytes)} with {format_bytes(margin_bytes)} kept free; "
        f"kernels and times as on the {card.name}",
        soft_wrap=True,
    )
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("estimate 1, of mostly 4 to 10", total=None)  # how many it takes nobody knows

        def say(words: str) -> None:
            console.print(Text(f"  {words}", style="dim"), soft_wrap=True)
            progress.update(bar, advance=1)
            progress.update(bar, description=f"estimate {int(progress.tasks[0].completed) + 1}, of mostly 4 to 10")

        answer = ask(one.job, card, vram_bytes=vram_bytes, margin_bytes=margin_bytes, largest=largest, say=say)
    if answer["best"] is None:
        why = why_nothing_fits(one.job, answer, margin_bytes)
        console.print(Text(f"Nothing fits into {format_bytes(vram_bytes)}: {why}."), soft_wrap=True)
        return 1
    _show(answer, largest, console)
    return 0


def _show(answer: Mapping[str, Any], largest: str | None, console: Console) -> None:
    best = answer["best"]
    workload = answer["workload"]
    if largest:
        console.print(f"Largest: {largest}={workload[largest]}", markup=False)
    fitting = [best, *answer["others"]]
    front = pareto_front([(one["needed_bytes"], one["least_seconds"]) for one in fitting])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("", "configuration", "needs GiB", "host GiB", "at least", "limited by"):
        table.add_column(
            title, overflow="fold", justify="right" if title in {"needs GiB", "host GiB", "at least"} else "left"
        )
    for number, one in enumerate(fitting):
        takes_less = number in front and one["needed_bytes"] < best["needed_bytes"]
        mark = "fastest" if number == 0 else "less memory" if takes_less else "dominated"
        table.add_row(mark, *_cells(one))
    for one in answer["refused"]:
        table.add_row("does not fit", *_cells(one))
    console.print(table)
    typed = " ".join(f"{name}={text(value)}" for name, value in best["knobs"].items())
    asked = " ".join(
        f"'{name}={text(workload[name])}'" for name in ("model", "size", "frame_num", "precision", "kernels")
    )
    console.print(f"\npython -m wan_sweep {asked} {typed}", soft_wrap=True, markup=False)


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    words = " ".join(f"{name}={text(value)}" for name, value in one["knobs"].items()) or "defaults"
    needs = format_gib(one["needed_bytes"]) if one["needed_bytes"] else "-"
    host = format_gib(one["pinned_bytes"]) if one["needed_bytes"] else "-"
    return words, needs, host, format_seconds(one["least_seconds"]), one["limited_by"].partition(" needs most")[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
