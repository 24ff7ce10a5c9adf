"""What the jobs of a sweep generate. Only jobs of one workload are compared by memory and time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from wan_sweep.record import Record
from wan_sweep.report.sheet import Row, Sheet, shortened
from wan_sweep.schema import Scalar, text

WORKLOAD = (
    "model",
    "size",
    "frame_num",
    "batch_size",
    "sample_steps",
    "sample_guide_scale",
    "image",
    "first_frame",
    "src_video",
    "src_mask",
    "src_ref_images",
    "use_prompt_extend",
)
"""The knobs that say what is generated, as far as memory and time depend on it: no prompt, no seed."""

_ALWAYS_NAMED = ("model", "size", "frame_num", "sample_steps")


def by_workload(sheet: Sheet) -> list[tuple[str, Sheet]]:
    """Return the rows with numbers by what they generate: the name of each workload, and a sheet of its rows."""
    groups: dict[tuple[Scalar, ...], list[Row]] = {}
    for row in sheet.measured:
        groups.setdefault(tuple(row.knobs.get(knob) for knob in WORKLOAD), []).append(row)
    others = [knob for knob in differing(sheet.measured) if knob not in _ALWAYS_NAMED]
    return [(_name(rows[0].knobs, others), replace(sheet, rows=tuple(rows))) for rows in groups.values()]


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the knobs of the workload in which rows differ."""
    return [knob for knob in WORKLOAD if len({row.knobs.get(knob) for row in rows}) > 1]


def unswept(records: Sequence[Record]) -> list[str]:
    """Return the knobs of the workload that differ though nobody swept them, such as sizes that follow the model.

    Jobs that were refused have not decided all of them.
    """
    swept = {knob for record in records for knob in record.overrides}
    return [
        knob
        for knob in WORKLOAD
        if knob not in swept and len({record.knobs.get(knob) for record in records} - {None}) > 1
    ]


def references(sheet: Sheet) -> dict[int, Row]:
    """Return, by number, which row each is compared with: the first of its workload, if that has more than one."""
    return {row.number: part.rows[0] for _, part in by_workload(sheet) for row in part.rows if part.rows[1:]}


def _name(knobs: Mapping[str, Scalar], others: Sequence[str]) -> str:
    words = [
        f"{text(knobs.get('model'))} {text(knobs.get('size'))}",
        _counted(knobs.get("frame_num"), "frame"),
        _counted(knobs.get("sample_steps"), "step"),
    ]
    return ", ".join([*words, *(f"{knob}={shortened(text(knobs.get(knob)))}" for knob in others)])


def _counted(number: Scalar, what: str) -> str:
    return f"{text(number)} {what}{'' if number == 1 else 's'}"
