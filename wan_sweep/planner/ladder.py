"""What can be done to make a phase smaller, fastest first. No torch in here.

With `offload` the phases are alone on the card, so what one of them needs does not depend on the choices of the others:
each has a ladder of its own, and the fastest configuration takes from each the first rung that fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from wan21.errors import UsageError
from wan_sweep.build import build_options, build_request, build_spec
from wan_sweep.cards import Card
from wan_sweep.estimate.lower_bound import (
    ITEM_BYTES,
    dit_block_numbers,
    lower_bounds,
    num_dit_blocks,
    text_block_numbers,
)
from wan_sweep.schema import KNOBS, Job, Scalar
from wan_sweep.units import GIB

Knobs = Mapping[str, Scalar]

RESIDENT_STEP_GIB = 0.5
BUDGETS_GIB = (8.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.69, 0.5, 0.35)
BESIDE_BUDGET_BYTES = int(0.5 * GIB)
"""What decoding takes besides its budget, at the most: weights in half precision, latents, libraries."""
SEARCHED = (
    "offload",
    "load_strategy",
    "t5_cpu",
    "resident_gib",
    "attention_slicing",
    "rows_at_once",
    "residual_on_host",
    "vae_precision",
    "vae_budget_gib",
)
"""The knobs that a search sets; one that is not at its default was chosen by the user, and stays."""

_ACTIVATIONS: Sequence[Knobs] = (
    {},
    {"attention_slicing": True},
    {"attention_slicing": True, "rows_at_once": 2048},
    {"attention_slicing": True, "rows_at_once": 2048, "residual_on_host": 0.5},
    {"attention_slicing": True, "rows_at_once": 1024, "residual_on_host": 1.0},
)


@dataclass(frozen=True, kw_only=True)
class Ladders:
    """Rungs of each phase, fastest first; the phases are denoising, which settles that of T5 too, and decoding."""

    denoise: tuple[Knobs, ...]
    decode: tuple[Knobs, ...]


def ladders(job: Job, room_bytes: int) -> Ladders:
    """The rungs for a job, without those that cannot fit whatever else is done.

    T5 on the CPU is no rung: streamed, it takes less of the card and less time.

    Args:
        job: resolved; what it sets besides the defaults stays.
        room_bytes: what the allocator may take.
    """
    return Ladders(
        denoise=tuple(knobs for knobs in _denoise_rungs(job, room_bytes) if _agrees(job, knobs)),
        decode=tuple(knobs for knobs in _decode_rungs(room_bytes) if _agrees(job, knobs)),
    )


def _denoise_rungs(job: Job, room_bytes: int) -> list[Knobs]:
    spec = build_spec(job)
    dit_bytes = dit_block_numbers(spec.dit) * num_dit_blocks(spec.dit) * ITEM_BYTES[job.precision]
    text_bytes = text_block_numbers(spec.text) * spec.text.num_layers * ITEM_BYTES[job.t5_precision]
    text_bytes += spec.text.vocab_size * spec.text.dim * ITEM_BYTES[job.t5_precision]
    rungs: list[Knobs] = []
    if dit_bytes <= room_bytes and (text_bytes <= room_bytes or job.t5_cpu):
        rungs += [{"load_strategy": "full", **one} for one in _ACTIVATIONS[:3]]
    most_steps = int(min(room_bytes, dit_bytes + RESIDENT_STEP_GIB * GIB) / (RESIDENT_STEP_GIB * GIB))
    kept = [step * RESIDENT_STEP_GIB for step in range(max(0, most_steps), -1, -1)]
    # Less is kept before anything is sliced; and part by part nothing is kept, or blocks would do.
    rungs += [
        {"load_strategy": strategy, **one, "resident_gib": gib}
        for strategy, one, gib in product(("block", "part"), _ACTIVATIONS, kept)
        if gib == 0 or (strategy == "block" and not one)
    ]
    return rungs


def _decode_rungs(room_bytes: int) -> list[Knobs]:
    budgets: list[Knobs] = [{}, *({"vae_budget_gib": gib} for gib in BUDGETS_GIB if gib * GIB < room_bytes)]
    # Another number format is another video, so it comes last although it is faster.
    return [*budgets, *({"vae_precision": "bf16", **one} for one in budgets)]


def smallest(rungs: Ladders, room_bytes: int) -> Knobs:
    """The knobs with which a workload fits if any do."""
    budgets = [knobs for knobs in rungs.decode if "vae_budget_gib" in knobs]
    roomy = [one for one in budgets if float(one["vae_budget_gib"] or 0) * GIB <= room_bytes - BESIDE_BUDGET_BYTES]
    formats = [one for one in roomy if one.get("vae_precision") == "bf16"] or roomy or budgets[-1:] or [{}]
    # The largest budget, for more frames need more; they come in descending order.
    return {"offload": True, **formats[0], **(rungs.denoise[-1] if rungs.denoise else {})}


def _agrees(job: Job, knobs: Knobs) -> bool:
    """Whether a rung leaves alone what the job has chosen, and contradicts none of it."""
    for name in SEARCHED:
        chosen = getattr(job, name)
        if chosen != KNOBS[name].default and name in knobs and knobs[name] != chosen:
            return False
    try:
        build_options(job.replace(**knobs))
    except UsageError:
        return False
    return True


def bounds_of(job: Job, card: Card) -> dict[str, float]:
    """The lower bounds of a job's phases in seconds."""
    return lower_bounds(build_spec(job), build_options(job), build_request(job), card)
