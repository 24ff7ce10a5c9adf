"""Goes down the ladders until every phase fits, with as few estimates as that takes. No torch in here."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wan21.errors import UsageError
from wan_sweep.build import build_spec
from wan_sweep.cards import Card
from wan_sweep.planner.ladder import SEARCHED, Knobs, bounds_of, ladders, smallest
from wan_sweep.schema import KNOBS, Job, text
from wan_sweep.units import format_bytes

Estimate = Callable[[Job], Mapping[str, Any]]
"""From a resolved job to what `estimate.predict.estimate` says of it."""

MOST_FRAMES = 1025
_TIME_STRIDE = 4
_OF_DENOISING = ("load", "encode_text", "denoise")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A configuration that was looked at.

    Attributes:
        knobs: what it sets of the searched knobs.
        needed_bytes: of the device, context included.
        least_seconds: a lower bound of the run.
        limited_by: the phase that needs most, and how much.
        excess: phases that do not fit, with what they need of the allocator.
        refusal: why it cannot be at all, such as a budget that no tile fits into.
    """

    knobs: Knobs
    needed_bytes: int
    least_seconds: float
    limited_by: str
    excess: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        """For whoever asked."""
        return {**self.__dict__, "knobs": dict(self.knobs), "excess": dict(self.excess)}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to: the fastest that fits, those that fit too, and those that do not; fastest first each."""

    best: Choice | None
    others: tuple[Choice, ...]
    refused: tuple[Choice, ...]
    workload: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the planner's process answers."""
        return {
            "best": None if self.best is None else self.best.to_json(),
            "others": [one.to_json() for one in self.others],
            "refused": [one.to_json() for one in self.refused],
            "workload": dict(self.workload),
        }


class Search:
    """One search.

    Args:
        card: for kernels and times.
        vram_bytes: what the card has.
        margin_bytes: what stays unused, at least.
        context_bytes: what a process takes beside torch's allocator.
        estimate: asks the estimator; expensive.
        say: hears what is looked at.
    """

    def __init__(
        self,
        card: Card,
        *,
        vram_bytes: int,
        margin_bytes: int,
        context_bytes: int,
        estimate: Estimate,
        say: Callable[[str], None],
    ) -> None:
        self._card = card
        self._room_bytes = vram_bytes - margin_bytes - context_bytes
        self._context_bytes = context_bytes
        self._estimate = estimate
        self._say = say
        self._seen: dict[Job, Choice] = {}

    def fastest(self, job: Job) -> Found:
        """The fastest configuration of a job that fits."""
        self._seen = {}
        everything = self._look({}, job)
        best = everything if not everything.excess else self._descend(job)
        if best is not None:
            self._look_beside(best, job)
        choices = sorted(self._seen.values(), key=lambda one: (one.least_seconds, -one.needed_bytes))
        fitting = [one for one in choices if not one.excess]
        return Found(
            best=best,
            others=tuple(one for one in fitting if one is not best),
            refused=tuple(one for one in choices if one.excess),
            workload={name: getattr(job, name) for name in ("model", "size", "frame_num", "precision")},
        )

    def largest(self, job: Job, what: str) -> Job | None:
        """The job with as many frames, or as many pixels, as fit at all; None if not even the smallest does."""
        if what == "size":
            sizes = sorted(build_spec(job).sizes, key=_pixels, reverse=True)
            return next((one for size in sizes if self._fits_least(one := job.replace(size=size))), None)
        jobs = [job.replace(frame_num=frames) for frames in range(1, MOST_FRAMES + 1, _TIME_STRIDE)]
        number = bisect_left(jobs, 1, key=lambda one: 0 if self._fits_least(one) else 1)
        return jobs[number - 1] if number else None

    def _fits_least(self, job: Job) -> bool:
        """Whether the last rungs fit: the least memory that the knobs can do."""
        return not self._look(smallest(ladders(job, self._room_bytes), self._room_bytes), job).excess

    def _descend(self, job: Job) -> Choice | None:
        """Takes the next rung of each phase that does not fit."""
        steps = ladders(job, self._room_bytes)
        if job.offload != KNOBS["offload"].default and not job.offload:
            return None
        denoise, decode = 0, 0
        while denoise < len(steps.denoise) and decode < len(steps.decode):
            choice = self._look({"offload": True, **steps.denoise[denoise], **steps.decode[decode]}, job)
            if not choice.excess:
                return choice
            if any(phase in choice.excess for phase in _OF_DENOISING):
                denoise = self._next(steps.denoise, denoise, choice, _OF_DENOISING)
                while "denoise" not in choice.excess and denoise < len(steps.denoise):
                    here = steps.denoise[denoise]  # slices do not help where T5 or a load is what does not fit
                    if "attention_slicing" not in here:
                        break
                    denoise += 1
            if "decode" in choice.excess:
                decode = self._next(steps.decode, decode, choice, ("decode",))
        return None

    def _next(self, rungs: Sequence[Knobs], index: int, choice: Choice, phases: Sequence[str]) -> int:
        """The next rung that may fit: one that keeps so many GiB less on the card as there are too many."""
        excess = max(need - self._room_bytes for phase, need in choice.excess.items() if phase in phases)
        here = rungs[index]
        for number in range(index + 1, len(rungs)):
            there = rungs[number]
            if choice.refusal and "vae_budget_gib" in here and here.get("vae_precision") == there.get("vae_precision"):
                continue  # a smaller budget is refused, too
            is_same_but_kept = "resident_gib" in here and {**here, "resident_gib": 0} == {**there, "resident_gib": 0}
            if is_same_but_kept:
                freed = (float(here["resident_gib"] or 0) - float(there["resident_gib"] or 0)) * 2**30
                if freed < min(excess, float(here["resident_gib"] or 0) * 2**30):
                    continue
            return number
        return len(rungs)

    def _look_beside(self, best: Choice, job: Job) -> None:
        """Two runners-up: the next rung of each ladder."""
        steps = ladders(job, self._room_bytes)
        for rungs in (steps.denoise, steps.decode):
            numbers = [number for number, knobs in enumerate(rungs) if knobs.items() <= best.knobs.items()]
            after = numbers[-1] + 1 if numbers else 0
            if after < len(rungs):
                cleared = {name: KNOBS[name].default for knobs in rungs for name in knobs}
                self._look({**best.knobs, **cleared, "offload": True, **rungs[after]}, job)

    def _look(self, knobs: Knobs, job: Job) -> Choice:
        asked = job.replace(**knobs)
        if asked in self._seen:
            return self._seen[asked]
        told = " ".join(f"{name}={text(value)}" for name, value in _chosen(asked).items()) or "all at the defaults"
        bound = bounds_of(asked, self._card)["total"]
        try:
            metrics = self._estimate(asked)["metrics"]
        except UsageError as error:  # a budget that is too small for the picture
            choice = Choice(
                knobs=_chosen(asked),
                needed_bytes=0,
                least_seconds=bound,
                limited_by=str(error),
                excess={"decode": self._room_bytes},
                refusal=str(error),
            )
        else:
            choice = self._judge(asked, metrics, bound)
        self._seen[asked] = choice
        verdict = "does not fit" if choice.excess else "fits"
        self._say(f"{told}: {verdict}, {choice.limited_by}")
        return choice

    def _judge(self, job: Job, metrics: Mapping[str, int], bound: float) -> Choice:
        reserved = {
            name.split("/")[2]: num_bytes
            for name, num_bytes in metrics.items()
            if name.startswith("memory/peak/") and name.endswith("/reserved_bytes") and name.count("/") == 3
        }
        highest = max(reserved, key=lambda phase: reserved[phase])
        return Choice(
            knobs=_chosen(job),
            needed_bytes=reserved[highest] + self._context_bytes,
            least_seconds=bound,
            limited_by=f"{highest} needs most, {format_bytes(reserved[highest] + self._context_bytes)}",
            excess={phase: need for phase, need in reserved.items() if need > self._room_bytes and phase != "save"},
        )


def _chosen(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in SEARCHED if getattr(job, name) != KNOBS[name].default}


def _pixels(size: str) -> int:
    width, _, height = size.partition("*")
    return int(width) * int(height)
