"""The environment checks as a table: `python -m wan_sweep.checks [key=value ...]`.

Takes the overrides of a sweep and minds device, output_root and foreign_processes. Exit code 2 if a sweep would be
refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wan_sweep.checks import Check, run_checks
from wan_sweep.environment import read_machine
from wan_sweep.errors import UsageError
from wan_sweep.schema import KNOBS

EXIT_REFUSED = 2

_WIDTH_WITHOUT_TERMINAL = 160
_STYLES = {"ok": "green", "warning": "yellow", "refused": "red"}


def values_of(name: str, overrides: Sequence[str]) -> list[str]:
    """The values that a knob gets from these overrides, or its default.

    Raises:
        UsageError: a value that it cannot have.
    """
    knob = KNOBS[name]
    values = [str(knob.default)]
    for override in overrides:
        key, _, value = override.partition("=")
        if key == name:
            values = [one.strip("'\" ") for one in value.split(",")]
    for value in values:
        if knob.choices and value not in knob.choices:
            raise UsageError(f"{name}={value} cannot be: choose {knob.allowed}")
    return values


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """A row for each, and advice below where there is any."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("check", "state", "found"):
        table.add_column(title)
    for check in checks:
        table.add_row(check.name, Text(check.state, style=_STYLES[check.state]), Text(check.text))
    console.print(table)
    for check in checks:
        if check.advice:
            console.print(Text(f"{check.name}: {check.advice}"), soft_wrap=True)


def main(overrides: Sequence[str]) -> int:
    """Checks, prints, and returns the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    try:
        policy, output_root = (values_of(name, overrides)[-1] for name in ("foreign_processes", "output_root"))
        devices = values_of("device", overrides)
    except UsageError as error:
        Console(stderr=True, highlight=False).print(Text(f"wan_sweep.checks: {error}"), soft_wrap=True)
        return error.exit_code
    checks = run_checks(
        read_machine(),
        policy,  # type: ignore[arg-type]  # one of its choices
        devices=devices,
        output_root=Path(output_root).absolute(),
        say=lambda words: console.print(Text(words), soft_wrap=True),
    )
    print_checks(checks, console)
    return EXIT_REFUSED if any(check.state == "refused" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
