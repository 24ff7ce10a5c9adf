"""Asks a child process for a plan, since estimates need torch and whoever plans a sweep must not import it."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from wan21.errors import UsageError
from wan_sweep.build import build_layout
from wan_sweep.cards import CARDS, Card
from wan_sweep.launch import worker_environment
from wan_sweep.planner.ladder import host_obstacle
from wan_sweep.schema import Job
from wan_sweep.units import GIB, format_bytes

PLANNER = (sys.executable, "-m", "wan_sweep.planner")
MARGIN_SHARE = 0.02
LEAST_MARGIN_BYTES = GIB // 4


def margin_of(vram_bytes: int) -> int:
    """What a plan leaves unused: 2 % of the card, and at least 256 MiB."""
    return max(LEAST_MARGIN_BYTES, int(MARGIN_SHARE * vram_bytes))


def nearest_card(vram_bytes: int) -> Card:
    """The known card whose memory is nearest, for kernels and times where none is named."""
    return min(CARDS.values(), key=lambda card: abs(card.device_bytes - vram_bytes))


def ask(
    job: Job,
    card: Card,
    *,
    vram_bytes: int,
    margin_bytes: int,
    largest: str | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What `search.Found` holds, as plain values.

    Args:
        job: resolved.
        card: for kernels and times.
        vram_bytes: what there is.
        margin_bytes: what stays unused.
        largest: frame_num or size, to look for the largest workload that fits.
        say: hears what is looked at.

    Raises:
        UsageError: the job has several ranks, an estimate was refused, or the planner ended without an answer.
    """
    layout = build_layout(job)
    if layout.world_size > 1:
        raise UsageError(
            f"{layout.words()} cannot be planned: the planner searches for one process on one card; choose sizes of 1, "
            "or estimate layouts side by side: wan_sweep -m mode=estimate ulysses_size=1,2,4"
        )
    question = {
        "job": job.to_dict(),
        "card": card.name,
        "vram_bytes": vram_bytes,
        "margin_bytes": margin_bytes,
        "largest": largest,
    }
    with subprocess.Popen(
        PLANNER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**worker_environment(), "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise UsageError("the planner could not be asked: it has no pipes")
        process.stdin.write(json.dumps(question))
        process.stdin.close()
        answer: dict[str, Any] = {}
        for line in process.stdout:
            told = json.loads(line)
            if "said" in told:
                say(told["said"])
            else:
                answer = told
    if process.returncode or not answer:
        raise UsageError(
            f"the planner ended with exit code {process.returncode} and no answer; its message stands above"
        )
    if "refusal" in answer:
        raise UsageError(answer["refusal"])
    return answer


def why_nothing_fits(job: Job, answer: Mapping[str, Any], margin_bytes: int) -> str:
    """What is needed at the least, which budgets of the job stand in the way, and the ways out."""
    refused = answer["refused"]
    needs = [one["needed_bytes"] for one in refused if not one["refusal"]]
    told = "choose fewer frames, a smaller size, or a larger card"
    if needs:
        least = format_bytes(min(needs) + margin_bytes)
        told = f"the least found needs {least}, {format_bytes(margin_bytes)} of it kept free; {told}"
    elif refused:
        told = refused[0]["refusal"]
    return "; ".join(filter(None, (told, host_obstacle(job))))


def _mutter(job: Job, words: str) -> None:
    sys.stderr.write(f"vram_gib={job.vram_gib:g}: {words}\n")
    sys.stderr.flush()


@functools.cache
def _answer_for(job: Job, card: Card) -> Mapping[str, Any]:
    """The planner's answer for a job with `vram_gib`; asked for once, also where nothing fits."""
    vram_bytes = int((job.vram_gib or 0) * GIB)
    margin, asked = margin_of(vram_bytes), job.replace(vram_gib=None)
    return ask(asked, card, vram_bytes=vram_bytes, margin_bytes=margin, say=lambda words: _mutter(job, words))


def chosen_for(job: Job, card: Card) -> tuple[Mapping[str, Any], str]:
    """The knobs of the fastest configuration of a job with `vram_gib`, and the choice in words.

    Raises:
        UsageError: nothing fits.
    """
    answer, margin = _answer_for(job, card), margin_of(int((job.vram_gib or 0) * GIB))
    best = answer["best"]
    if best is None:
        raise UsageError(
            f"vram_gib={job.vram_gib:g} is too little for {job.model} at {job.size} with {job.frame_num} frames: "
            + why_nothing_fits(job, answer, margin)
        )
    knobs = best["knobs"]
    words = " ".join(f"{name}={str(value).lower()}" for name, value in knobs.items()) or "no saving"
    told = f"vram_gib={job.vram_gib:g}: {words}; {best['limited_by']}, and {format_bytes(margin)} stay free."
    return knobs, told
