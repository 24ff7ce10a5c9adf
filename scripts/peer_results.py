"""What bench_peers.py measured of a set-up, and the tables of figures and of ratios."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from wan_sweep.errors import RecordError
from wan_sweep.record import load_records
from wan_sweep.report.cells import Column
from wan_sweep.report.sheet import PEAK_ALLOCATED, PEAK_RESERVED
from wan_sweep.units import format_gib

THEIRS = "diffusers/"
"""What the names of set-ups that are not ours begin with."""

WHOLE_RUN_STEPS = 50
PASSES = 2
"""Forwards in a step, with guidance."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a set-up: bytes and seconds; None where it did not get so far.

    what: the set-up in words.
    """

    what: str
    outcome: str
    reason: str = ""
    allocated_bytes: float | None = None
    reserved_bytes: float | None = None
    encode_s: float | None = None
    first_step_s: float | None = None
    step_s: float | None = None
    decode_s: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def forward_s(self) -> float | None:
        """One pass of the transformer."""
        return None if self.step_s is None else self.step_s / PASSES

    @property
    def whole_run_s(self) -> float | None:
        """Fifty steps, from the measured parts."""
        if self.encode_s is None or self.step_s is None or self.decode_s is None:
            return None
        return self.encode_s + WHOLE_RUN_STEPS * self.step_s + self.decode_s

    @classmethod
    def of_theirs(cls, what: str, told: Mapping[str, Any]) -> Self:
        """From what peer_diffusers.py printed."""
        steps = told.get("steps_s", [])
        return cls(
            what=what,
            outcome=told["outcome"],
            reason=told["reason"],
            first_step_s=steps[0] if steps else None,
            step_s=median(steps[1:]) if steps[1:] else None,
            versions=told.get("versions", {}),
            **{name: told.get(name) for name in ("allocated_bytes", "reserved_bytes", "encode_s", "decode_s")},
        )

    @classmethod
    def of_ours(cls, folder: Path) -> Self:
        """From the record of a job.

        Raises:
            RecordError: there is none.
        """
        records = load_records(folder)
        if not records:
            raise RecordError(f"{folder} holds no record")
        record, metrics = records[0], records[0].metrics
        return cls(
            what=f"ours, kernels {record.knobs['kernels']}, attention {record.knobs['attention_kernel']}",
            outcome=record.outcome,
            reason=record.reason,
            allocated_bytes=metrics.get(PEAK_ALLOCATED),
            reserved_bytes=metrics.get(PEAK_RESERVED),
            encode_s=metrics.get("time/encode_text_s"),
            first_step_s=metrics.get("time/first_step_s"),
            step_s=metrics.get("time/step_s"),
            decode_s=metrics.get("time/decode_s"),
        )


def figures(results: Mapping[str, Result]) -> list[Column]:
    """What was measured, a row for each set-up."""
    rows = list(results.values())

    def column(title: str, read: Callable[[Result], float | None], show: Callable[[float], str]) -> Column:
        values = [read(row) for row in rows]
        return Column(title=(title,), cells=tuple("-" if value is None else show(value) for value in values))

    return [
        Column(title=("set-up",), cells=tuple(results), is_number=False),
        Column(title=("what",), cells=tuple(row.what for row in rows), is_number=False),
        Column(title=("outcome",), cells=tuple(row.outcome for row in rows), is_number=False),
        column("peak allocated GiB", lambda row: row.allocated_bytes, format_gib),
        column("peak reserved GiB", lambda row: row.reserved_bytes, format_gib),
        column("forward s", lambda row: row.forward_s, "{:.3f}".format),
        column("first step s", lambda row: row.first_step_s, "{:.2f}".format),
        column("text s", lambda row: row.encode_s, "{:.2f}".format),
        column("decode s", lambda row: row.decode_s, "{:.2f}".format),
        column(f"{WHOLE_RUN_STEPS} steps s, computed", lambda row: row.whole_run_s, "{:.1f}".format),
    ]


RATIOS: Mapping[str, Callable[[Result], float | None]] = {
    "allocated": lambda result: result.allocated_bytes,
    "reserved": lambda result: result.reserved_bytes,
    "forward": lambda result: result.forward_s,
    "decode": lambda result: result.decode_s,
    f"{WHOLE_RUN_STEPS} steps": lambda result: result.whole_run_s,
}


def ratios(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """How many times ours the least of theirs is, by our presets: above 1 ours is less, or faster. Only whole runs."""
    found: dict[str, dict[str, float]] = {}
    results = {setup: result for setup, result in results.items() if result.outcome == "ok"}
    for name, read in RATIOS.items():
        theirs = [
            value
            for setup, result in results.items()
            if setup.startswith(THEIRS) and (value := read(result)) is not None
        ]
        for setup, result in results.items():
            ours = read(result)
            if theirs and ours and not setup.startswith(THEIRS):
                found.setdefault(setup, {})[name] = min(theirs) / ours
    return found


def ratio_columns(found: Mapping[str, Mapping[str, float]]) -> list[Column]:
    """The ratios, a row for each of our presets."""

    def cells(name: str) -> tuple[str, ...]:
        return tuple(f"{values[name]:.2f}" if name in values else "-" for values in found.values())

    return [
        Column(title=("their least over ours",), cells=tuple(found), is_number=False),
        *(Column(title=(name,), cells=cells(name)) for name in RATIOS),
    ]
