"""Which job of a sweep each job's output is compared with: the first one that generates the same thing."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wan_sweep.errors import RecordError
from wan_sweep.launch import worker_environment
from wan_sweep.measure.fidelity import comparable, remove_frames
from wan_sweep.record import Record
from wan_sweep.schema import Scalar
from wan_sweep.store import FIDELITY_FILE, FRAMES_FILE, LATENTS_FILE, read_json

COMPARISON: tuple[str, ...] = (sys.executable, "-m", "wan_sweep.measure.fidelity")
LIMIT_S = 600.0
_PREFIX = "fidelity/"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A job whose output others are compared with; `folder` is where that output lies."""

    name: str
    folder: Path
    knobs: Mapping[str, Scalar]


class References:
    """The references of a sweep: one for each workload, each the first job that left its output."""

    def __init__(self) -> None:
        self._known: list[Reference] = []

    def compare(self, record: Record, folder: Path) -> Record:
        """The record with its fidelity; the job becomes a reference if there is none for its workload.

        Args:
            record: Of a job that was measured, now or in an earlier sweep.
            folder: Where its outputs lie.
        """
        knobs = _with_extended_prompt(record)
        reference = next((one for one in self._known if not comparable(knobs, one.knobs)), None)
        has_outputs = (folder / FRAMES_FILE).exists() and (folder / LATENTS_FILE).exists()
        if reference is None:
            if not has_outputs:
                return _without(record, "the output was not kept, as there was nothing to compare it with")
            self._known.append(Reference(name=record.name, folder=folder, knobs=knobs))
            told = {"reference": record.name, "reference_folder": str(folder), "reason": "is the reference itself"}
            return replace(_without(record, ""), fidelity=told)
        if not has_outputs:
            return _taken_over(record, reference)
        told = {"reference": reference.name, "reference_folder": str(reference.folder), "reason": ""}
        if folder.samefile(reference.folder):
            return replace(record, fidelity=told)
        numbers, told["reason"] = _measure(folder, reference.folder)
        if record.measured_in is None:
            remove_frames(folder)
        metrics = {name: value for name, value in record.metrics.items() if not name.startswith(_PREFIX)}
        return replace(record, metrics={**metrics, **numbers}, fidelity=told)


def _with_extended_prompt(record: Record) -> Mapping[str, Scalar]:
    """The knobs with the prompt that the video was made from, which another model or a failure may have changed."""
    told = record.prompt_extension
    return record.knobs if told is None else {**record.knobs, "prompt": told["prompt"]}


def _without(record: Record, reason: str) -> Record:
    metrics = {name: value for name, value in record.metrics.items() if not name.startswith(_PREFIX)}
    return replace(
        record,
        metrics=metrics,
        fidelity={"reference": "", "reference_folder": "", "reason": reason} if reason else None,
    )


def _taken_over(record: Record, reference: Reference) -> Record:
    """Keeps an older comparison if it was with the same output."""
    before = (record.fidelity or {}).get("reference_folder")
    if before and Path(before).exists() and Path(before).samefile(reference.folder):
        return replace(record, fidelity={**(record.fidelity or {}), "reference": reference.name})
    return _without(record, f"the output was not kept, so it cannot be compared with that of {reference.name}")


def _measure(folder: Path, reference: Path) -> tuple[dict[str, float], str]:
    """The metrics of a comparison, made in a process of its own; and why there are none, if there are none."""
    command = [*COMPARISON, str(folder), str(reference)]
    try:
        done = subprocess.run(
            command, env=worker_environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if done.returncode:
            last = next(reversed(done.stderr.strip().splitlines()), "no message")
            return {}, f"the comparison ended with exit code {done.returncode}: {last}"
        told = read_json(folder / FIDELITY_FILE)
        return dict(told["metrics"]), str(told["reason"])
    except (OSError, subprocess.TimeoutExpired, RecordError, KeyError) as error:
        return {}, f"the comparison failed: {error}"


def is_alone(knobs: Mapping[str, Scalar], others: Sequence[Mapping[str, Scalar]]) -> bool:
    """Whether none of the other jobs generates the same thing."""
    return all(comparable(knobs, other) for other in others)
