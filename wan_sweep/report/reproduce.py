"""The command that asks for the same jobs again."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from math import prod

from wan_sweep.record import Record
from wan_sweep.report.sheet import Sheet
from wan_sweep.schema import KNOBS, Scalar, text

_PLAIN = re.compile(r"[\w.+*/:-]+")
_ALSO_ASKED = ("repeats", "timeout_s")


def commands(sheet: Sheet) -> list[str]:
    """Return one command where the jobs are a full grid and all else is the same in them, else one per job.

    Knobs at their default are left out. A job that was refused has not decided all of its knobs, so it is not asked.
    """
    rows = [row.records[0] for row in sheet.rows]
    if not rows:
        return []
    axes = {knob: list(dict.fromkeys(_value(row.overrides.get(knob)) for row in rows)) for knob in sheet.axes}
    settings = [_unusual(row.knobs, axes) for row in rows if row.outcome != "refused"] or [
        _unusual(rows[0].knobs, axes)
    ]
    is_grid = prod(len(values) for values in axes.values()) == len(rows)
    if is_grid and all(one == settings[0] for one in settings):
        swept = [f"{knob}={','.join(values)}" for knob, values in axes.items()]
        return [_command(swept, settings[0], is_sweep=len(rows) > 1)]
    return [command_of(row) for row in rows]


def command_of(record: Record) -> str:
    """Return the command that asks for one job again."""
    swept = [f"{knob}={_value(value)}" for knob, value in record.overrides.items()]
    return _command(swept, _unusual(record.knobs, record.overrides))


def _command(swept: Sequence[str], unusual: Sequence[str], *, is_sweep: bool = False) -> str:
    start = ["python", "-m", "wan_sweep", *(["-m"] if is_sweep else [])]
    return shlex.join([*start, *swept, *unusual])


def _unusual(knobs: Mapping[str, Scalar], axes: Collection[str]) -> list[str]:
    """Return the settings beside the swept ones that are not the default and matter for the result."""
    return [
        f"{name}={_value(knobs[name])}"
        for name, knob in KNOBS.items()
        if name in knobs
        and name not in axes
        and (knob.rule.in_key or name in _ALSO_ASKED)
        and knobs[name] != knob.default
    ]


def _value(value: Scalar) -> str:
    """Return a value in Hydra's grammar: quoted where it holds more than a plain word."""
    words = text(value)
    if _PLAIN.fullmatch(words):
        return words
    # Hydra takes a backslash as one unless it stands before a quote, so only those are doubled.
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), words) + '"'
