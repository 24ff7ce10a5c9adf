"""From how a job's process ended, and what it left, to an outcome with a reason."""

import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_sweep.errors import RecordError
from wan_sweep.launch.process import Ending, Limits
from wan_sweep.record import Outcome
from wan_sweep.store import MEASURE, Pass, read_json

EXIT_OOM = 3

_LOG_LINES = 20
_LOG_BYTES = 8192
LONGEST_REASON = 500
_NEXT_TO_NOTHING = 2**20


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a pass came to.

    Attributes:
        measurement: What its worker told, empty if it did not get that far; of several ranks, what they told together.
        by_rank: What each of several ranks told; empty where there is one.
    """

    outcome: Outcome
    reason: str = ""
    failure: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[Mapping[str, str], ...] = ()
    by_rank: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def log_tail(path: Path) -> list[str]:
    """The last lines of a log that are not empty."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _LOG_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-_LOG_LINES:]


def is_full(folder: Path) -> bool:
    """Whether the disk under a folder has next to nothing left."""
    try:
        return shutil.disk_usage(folder).free < _NEXT_TO_NOTHING
    except OSError:
        return False


def classify(folder: Path, ending: Ending, limits: Limits, where: str, one: Pass = MEASURE) -> Result:
    """The outcome of a pass.

    Args:
        folder: The job's folder.
        ending: How its process ended.
        limits: The limits that it had.
        where: The last position that it told, such as "denoise, step 3 of 4".
        one: Which pass of the job it was.
    """
    warnings = tuple(warnings_of(ending))
    damage = ""
    if (folder / one.result).exists():
        try:
            measurement = read_json(folder / one.result)
            return Result(
                outcome=measurement["outcome"],
                reason=str(measurement.get("reason") or "")[:LONGEST_REASON],
                failure=measurement.get("failure"),
                measurement=measurement,
                warnings=warnings,
            )
        except (RecordError, KeyError) as error:
            damage = f"; {one.result} is damaged: {error}"
    tail = log_tail(folder / one.log)
    outcome, kind, reason = _without_measurement(ending, limits, where, tail)
    if outcome == "failed" and is_full(folder):
        damage += f"; the disk of {folder} is full"
    return Result(
        outcome=outcome,
        reason=(reason + damage)[:LONGEST_REASON],
        failure={"kind": kind, "where": where, "exit_code": ending.exit_code, "log_tail": tail},
        warnings=warnings,
    )


def _without_measurement(ending: Ending, limits: Limits, where: str, tail: list[str]) -> tuple[Outcome, str, str]:
    place = in_place(where)
    if ending.limit == "time":
        reason = f"longer than timeout_s={limits.timeout_s:g}{place}; raise timeout_s if that is expected"
        return "timeout", "limit", reason
    if ending.limit == "silence":
        reason = f"no event for {limits.stall_timeout_s:g} s{place}; raise stall_timeout_s if that is expected"
        return "timeout", "stall", reason
    return without_a_word(ending.exit_code, place, tail)


def in_place(where: str) -> str:
    """The last position that a worker told, as part of a sentence."""
    return f" in {where}" if where else " before the first event"


def without_a_word(exit_code: int, place: str, tail: list[str]) -> tuple[Outcome, str, str]:
    """Outcome, kind and reason of a process that ended by itself and left no result.

    Args:
        exit_code: As the process gave it; minus the number of the signal that killed it.
        place: Where it was, as `in_place` says it.
        tail: The last lines of its log.
    """
    last_words = f": {tail[-1].strip()}" if tail else ""
    if exit_code < 0:
        name = signal_name(-exit_code)
        guess = (
            "; the kernel's out-of-memory killer does that when the host's memory is full" if name == "SIGKILL" else ""
        )
        return "failed", "signal", f"killed by {name}{place}{guess}"
    if exit_code == EXIT_OOM:
        return "oom", "exit", f"out of memory{place}, and no measurement was written{last_words}"
    return "failed", "exit", f"exit code {exit_code}{place}{last_words}"


def signal_name(number: int) -> str:
    """Such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def warnings_of(ending: Ending) -> list[Mapping[str, str]]:
    """What makes a result doubtful, by how its processes ended."""
    warnings: list[Mapping[str, str]] = []
    if ending.num_left_behind:
        warnings.append(
            {
                "code": "left_behind",
                "text": f"The job left {ending.num_left_behind} processes behind, which were ended.",
                "advice": "See its log for what it started.",
            }
        )
    if not ending.is_clean:
        warnings.append(
            {
                "code": "survivors",
                "text": "A process of the job survives SIGKILL.",
                "advice": "Look at it with ps; later jobs may be slower, or short of memory, because of it.",
            }
        )
    if ending.limit in {"time", "silence"}:
        warnings.append(
            {
                "code": "ended_by_limit",
                "text": "The process was stopped by a limit.",
                "advice": "Its numbers hold until then.",
            }
        )
    return warnings
