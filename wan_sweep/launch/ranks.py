"""From how several ranks ended, and what each left, to one outcome: the rank that began the trouble is the one named.

When one rank ends, the others fail soon after it, since the ones that they talk to are gone; and torchrun stops whoever
is left. So the first cause is looked for in the order in which such things follow each other, not by time alone.
"""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_sweep.errors import RecordError
from wan_sweep.headline import told_together
from wan_sweep.launch.outcome import LONGEST_REASON, Result, in_place, log_tail, warnings_of, without_a_word
from wan_sweep.launch.process import Ending, Limits
from wan_sweep.store import FAILED_RANKS_FILE, MEASURE, Pass, rank_folder, read_json

# What kills a process by itself, and not because a peer has gone.
_FATAL = frozenset({signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})

_WAITS_FOR_OTHERS = re.compile(r"[/\\]torch[/\\](distributed[/\\]|cuda[/\\]\w+\.py.* in (synchronize|wait_stream)$)")
_FRAME = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>\S+)')
_STACK = "(most recent call first)"
_STACK_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        told: The result that it left; None if it left none, or a damaged one.
        where: The last position that it told.
        exit_code: As torchrun saw it; None if torchrun did not say that it failed.
        damage: What is wrong with its result.
    """

    rank: int
    told: Mapping[str, Any] | None
    where: str
    exit_code: int | None
    damage: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it came to its end and says so."""
        return self.told is not None and self.told["outcome"] == "ok"

    @property
    def time(self) -> float:
        """When it failed, in seconds since 1970, as far as it told."""
        return float(((self.told or {}).get("failure") or {}).get("time", 0.0))

    @property
    def suspicion(self) -> int | None:
        """How likely it began the trouble, 0 the most; None if it did not fail by itself."""
        if self.told is None:
            if self.exit_code in {None, 0, -signal.SIGTERM}:
                return None  # torchrun stops with SIGTERM whoever is left
            return 1 if -(self.exit_code or 0) in _FATAL else 3
        if self.is_ok:
            return None
        if self.told["outcome"] == "oom":
            return 0
        return 4 if (self.told.get("failure") or {}).get("is_from_peers") else 2


def settle_ranks(folder: Path, ending: Ending, limits: Limits, wheres: Sequence[str], one: Pass = MEASURE) -> Result:
    """The outcome of a pass of several ranks.

    Args:
        folder: The job's folder.
        ending: How torchrun ended.
        limits: The limits that the pass had.
        wheres: The last position that each rank told.
        one: Which pass of the job it was.
    """
    ends = [_end(folder, rank, where, one) for rank, where in enumerate(wheres)]
    by_rank = {end.rank: end.told for end in ends if end.told is not None}
    suspects = [end for end in ends if end.suspicion is not None]
    if all(end.is_ok for end in ends):
        found = Result(outcome="ok")
    elif suspects:
        found = _because_of(folder, min(suspects, key=lambda end: (end.suspicion, end.time, end.rank)), one)
    else:
        found = _unfinished(folder, ending, limits, ends, one)
    return Result(
        outcome=found.outcome,
        reason=found.reason[:LONGEST_REASON],
        failure=found.failure,
        measurement=told_together(by_rank) if one is MEASURE else by_rank.get(0, {}),
        warnings=tuple(warnings_of(ending)),
        by_rank=by_rank,
    )


def _end(folder: Path, rank: int, where: str, one: Pass) -> RankEnd:
    path = rank_folder(folder, rank) / one.result
    told, damage = None, ""
    if path.exists():
        try:
            told = read_json(path)
            told["outcome"]
        except (RecordError, KeyError) as error:
            told, damage = None, f"; {one.result} is damaged: {error}"
    return RankEnd(rank=rank, told=told, where=where, exit_code=_exit_codes(folder).get(rank), damage=damage)


def _exit_codes(folder: Path) -> dict[int, int]:
    """The ranks that failed, as torchrun saw them."""
    path = folder / FAILED_RANKS_FILE
    if not path.exists():
        return {}
    return {int(rank): int(failure["exit_code"]) for rank, failure in read_json(path)["failures"].items()}


def _because_of(folder: Path, end: RankEnd, one: Pass) -> Result:
    if end.told is not None:
        failure = {**(end.told.get("failure") or {}), "rank": end.rank}
        reason = f"rank {end.rank}: {end.told.get('reason') or ''}"
        return Result(outcome=end.told["outcome"], reason=reason, failure=failure)
    tail = log_tail(rank_folder(folder, end.rank) / one.log)
    exit_code = end.exit_code or 0
    outcome, kind, words = without_a_word(exit_code, in_place(end.where), tail)
    failure = {"kind": kind, "where": end.where, "exit_code": exit_code, "log_tail": tail, "rank": end.rank}
    return Result(outcome=outcome, reason=f"rank {end.rank}: {words}{end.damage}", failure=failure)


def _unfinished(folder: Path, ending: Ending, limits: Limits, ends: Sequence[RankEnd], one: Pass) -> Result:
    """No rank says that it failed: a limit was hit, or what started the ranks has ended."""
    tail = log_tail(folder / one.log)
    if ending.limit not in {"time", "silence"}:
        outcome, kind, words = without_a_word(ending.exit_code, in_place(ends[0].where), tail)
        failure = {"kind": kind, "where": ends[0].where, "exit_code": ending.exit_code, "log_tail": tail}
        damage = "".join(end.damage for end in ends)
        return Result(outcome=outcome, reason=f"torchrun: {words}{damage}", failure=failure)
    stacks = {end.rank: _stack(rank_folder(folder, end.rank) / one.log) for end in ends if not end.is_ok}
    # A rank that does not wait for others is stuck by itself; one that does not even answer is stuck for good.
    stuck = [rank for rank, frames in stacks.items() if frames and not _waits(frames)]
    stuck = stuck or [rank for rank, frames in stacks.items() if not frames] or list(stacks)
    end = ends[stuck[0]]
    who = f"rank {end.rank}" if len(stuck) == 1 else f"ranks {', '.join(map(str, stuck))}"
    frame = _FRAME.match(next(iter(stacks[end.rank]), ""))
    at = f" at {Path(frame['file']).name}:{frame['line']}, {frame['function']}" if frame else ""
    if ending.limit == "time":
        kind, knob, words = "limit", "timeout_s", f"longer than timeout_s={limits.timeout_s:g}"
    else:
        kind, knob, words = "stall", "stall_timeout_s", f"no event for {limits.stall_timeout_s:g} s"
    return Result(
        outcome="timeout",
        reason=f"{who}: {words}{in_place(end.where)}{at}; raise {knob} if that is expected",
        failure={
            "kind": kind,
            "where": end.where,
            "exit_code": ending.exit_code,
            "log_tail": tail,
            "rank": end.rank,
            "stacks": {str(rank): frames for rank, frames in stacks.items()},
        },
    )


def _stack(log: Path) -> list[str]:
    """The frames of the main thread that a rank wrote into its log when it was asked, the innermost first."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _STACK_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    starts = [index for index, line in enumerate(lines) if line.startswith("Current thread") and _STACK in line]
    frames: list[str] = []
    for line in lines[starts[-1] + 1 :] if starts else []:
        if not _FRAME.match(line):
            break
        frames.append(line.strip())
    return frames


def _waits(frames: Sequence[str]) -> bool:
    """Whether a rank waits for others, or for a device that may do so: then it is not the one that hangs."""
    return any(_WAITS_FOR_OTHERS.search(frame) for frame in frames)
