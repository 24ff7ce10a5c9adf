"""Goes down the ladders until every phase fits, with as few estimates as that takes. No torch in here."""

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

from wan21.errors import VaeBudgetError
from wan_sweep.build import build_spec
from wan_sweep.cards import Card
from wan_sweep.planner.ladder import (
    BESIDE_BUDGET_BYTES,
    SEARCHED,
    Family,
    Knobs,
    Rung,
    bounds_of,
    first_tried,
    ladders,
    smallest,
)
from wan_sweep.schema import KNOBS, Job, text
from wan_sweep.units import format_bytes

Estimate = Callable[[Job], Mapping[str, Any]]
"""From a resolved job to what `estimate.predict.estimate` says of it."""

MOST_FRAMES = 1025
_TIME_STRIDE = 4
_OF_T5 = ("load", "encode_text")
"""Phases that nothing but the load strategy makes smaller."""
_DENOISE, _DECODE = (*_OF_T5, "denoise"), ("encode_image", "decode")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A configuration that was looked at.

    Attributes:
        knobs: what it sets of the searched knobs.
        needed_bytes: of the device, context included; what the allocator keeps unused, too.
        allocated_bytes: the same with live tensors only: with less it must run out of memory.
        pinned_bytes: of the host's memory, pinned.
        least_seconds: a lower bound of the run.
        limited_by: the phase that needs most, and how much.
        needs: of the allocator, by phase; empty where it cannot be at all.
        excess: phases that do not fit, with what they need of the allocator.
        refusal: why it cannot be at all, such as a budget that no tile fits into.
        least_budget_gib: of the VAE, that would work; 0 where the budget is no obstacle.
    """

    knobs: Knobs
    needed_bytes: int
    allocated_bytes: int
    pinned_bytes: int
    least_seconds: float
    limited_by: str
    needs: Mapping[str, int] = field(default_factory=dict)
    excess: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""
    least_budget_gib: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For whoever asked."""
        return {**self.__dict__, **{name: dict(getattr(self, name)) for name in ("knobs", "needs", "excess")}}


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


Steps = Generator[Rung, Choice, Rung | None]
"""Asks for rungs, is told what was found with each, and ends with the first that fits."""


def _down(families: Sequence[Family], room_bytes: int, phases: Sequence[str]) -> Steps:
    """The first rung of a ladder with which these phases fit, family by family."""
    hopeless: set[object] = set()
    for family in families:
        strategy = family[0].knobs.get("load_strategy")
        if strategy is not None and strategy in hopeless:
            continue
        rung, last_needs = yield from _within(family, room_bytes, phases)
        if rung is not None:
            return rung
        if any(last_needs.get(phase, 0) > room_bytes for phase in _OF_T5):
            hopeless.add(strategy)
    return None


def _within(
    family: Family, room_bytes: int, phases: Sequence[str]
) -> Generator[Rung, Choice, tuple[Rung | None, Mapping[str, int]]]:
    """The first of a family with which these phases fit, or None; and what the rung seen last needs.

    Rungs need ever less, so where one does not fit, none before it does. What one was found to need tells where to
    look next; it ends only when a rung fits and the one before it was seen not to.
    """
    too_large, small, beside = -1, len(family), BESIDE_BUDGET_BYTES
    found, needs = None, dict[str, int]()
    while small - too_large > 1:
        between = range(too_large + 1, small)
        likely = next((at for at in between if family[at].about_bytes + beside <= room_bytes), between[-1])
        seen = yield family[likely]
        needs = dict(seen.needs)
        need = max(needs.get(phase, 0) for phase in phases)
        if need > room_bytes:
            too_large = likely
        else:  # or too small to work at all, and smaller ones would be, too
            small, found = likely, None if seen.refusal else family[likely]
        if not seen.refusal:
            beside = need - family[likely].about_bytes
    return found, needs


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
        """The fastest configuration of a job that fits.

        Raises:
            UsageError: an estimate is refused for anything but the VAE's budget.
        """
        self._seen = {}
        knobs = first_tried(job, self._room_bytes)
        everything = None if knobs is None else self._look(knobs, job)
        if everything is None or everything.excess:
            best = self._descend(job)
        else:
            best = everything
            steps = ladders(job, self._room_bytes)
            self._look(_together(families[0][0] for families in (steps.denoise, steps.decode) if families), job)
        choices = sorted(self._seen.values(), key=lambda one: (one.least_seconds, -one.needed_bytes))
        fitting = [one for one in choices if not one.excess]
        return Found(
            best=best,
            others=tuple(one for one in fitting if one is not best),
            refused=tuple(one for one in choices if one.excess),
            workload={name: getattr(job, name) for name in ("model", "size", "frame_num", "precision", "kernels")},
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
        knobs = smallest(ladders(job, self._room_bytes), self._room_bytes)
        choice = self._look(knobs, job)
        if choice.least_budget_gib and job.vae_budget_gib is None:
            # There is no room for it, but so one hears how much there would have to be.
            choice = self._look({**knobs, "vae_budget_gib": choice.least_budget_gib}, job)
        return not choice.excess

    def _descend(self, job: Job) -> Choice | None:
        """Goes down both ladders at once, for an estimate tells of all phases; then looks at what is beside the best.

        Beside it are the next faster rung of each ladder, which does not fit, and the next slower one.
        """
        steps = ladders(job, self._room_bytes)
        both = (steps.denoise, steps.decode)
        walks = [
            _down(families, self._room_bytes, phases)
            for families, phases in zip(both, (_DENOISE, _DECODE), strict=True)
        ]
        rungs: list[Rung | None] = [next(walk, None) for walk in walks]
        walking = [rung is not None for rung in rungs]
        while any(walking) and None not in rungs:
            choice = self._look(_together(rungs), job)
            # What is refused says nothing of denoising.
            for number in [number for number in (0, 1) if walking[number] and (number or not choice.refusal)]:
                try:
                    rungs[number] = walks[number].send(choice)
                except StopIteration as end:
                    rungs[number], walking[number] = end.value, False
        every = [list(chain.from_iterable(families)) for families in both]
        ats = [flat.index(rung) for flat, rung in zip(every, rungs, strict=True) if rung is not None]
        if len(ats) < len(every):
            self._fits_least(job)  # so that whoever asked hears what it takes at the least
            return None
        while (best := self._look(_together(flat[at] for flat, at in zip(every, ats, strict=True)), job)).excess:
            for number in {int(phase not in _DENOISE) for phase in best.excess}:  # phases did depend on each other
                ats[number] += 1
                if ats[number] == len(every[number]):
                    return None
        for number, step in product((0, 1), (-1, 1)):
            beside = [at + step * (one == number) for one, at in enumerate(ats)]
            if 0 <= beside[number] < len(every[number]):
                self._look(_together(flat[at] for flat, at in zip(every, beside, strict=True)), job)
        return best

    def _look(self, knobs: Knobs, job: Job) -> Choice:
        asked = job.replace(**knobs)
        if asked in self._seen:
            return self._seen[asked]
        told = " ".join(f"{name}={text(value)}" for name, value in _chosen(asked).items()) or "all at the defaults"
        bound = bounds_of(asked, self._card)["total"]
        try:
            metrics = self._estimate(asked)["metrics"]
        except VaeBudgetError as error:
            choice = Choice(
                knobs=_chosen(asked),
                needed_bytes=0,
                allocated_bytes=0,
                pinned_bytes=0,
                least_seconds=bound,
                limited_by=str(error),
                excess={"decode": self._room_bytes},
                refusal=str(error),
                least_budget_gib=error.least_gib,
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
        reserved.pop("save", None)  # where nothing is taken any more
        highest = max(reserved, key=lambda phase: reserved[phase])
        return Choice(
            knobs=_chosen(job),
            needed_bytes=reserved[highest] + self._context_bytes,
            allocated_bytes=metrics["memory/peak/allocated_bytes"] + self._context_bytes,
            pinned_bytes=metrics["memory/peak/host_pinned_bytes"],
            least_seconds=bound,
            limited_by=f"{highest} needs most, {format_bytes(reserved[highest] + self._context_bytes)}",
            needs=reserved,
            excess={phase: need for phase, need in reserved.items() if need > self._room_bytes},
        )


def _together(rungs: Iterable[Rung | None]) -> Knobs:
    """With a rung of each ladder one component at a time is on the card."""
    knobs: dict[str, Any] = {"offload": True}
    for rung in rungs:
        knobs |= {} if rung is None else rung.knobs
    return knobs


def _chosen(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in SEARCHED if getattr(job, name) != KNOBS[name].default}


def _pixels(size: str) -> int:
    width, _, height = size.partition("*")
    return int(width) * int(height)
