"""What can be done to make a phase smaller, fastest first. No torch in here.

With `offload` the phases are alone on the card, so what one of them needs does not depend on the choices of the others:
each has a ladder of its own, and the fastest configuration takes from each the first rung that fits.

A ladder is made of families. In one of them the same thing is done ever more, so each rung needs at most as much as
the one before, and a search may leave out what lies between; from one family to the next that need not hold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product

from wan21.errors import UsageError
from wan21.waiting import check_host_room
from wan_sweep.build import build_options, build_request, build_spec
from wan_sweep.cards import Card
from wan_sweep.estimate.lower_bound import (
    ITEM_BYTES,
    dit_block_numbers,
    lower_bounds,
    num_dit_blocks,
    shared_operations,
    text_block_numbers,
)
from wan_sweep.schema import KNOBS, Job, Scalar
from wan_sweep.units import GIB

Knobs = Mapping[str, Scalar]

BUDGETS_GIB = (8.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.69, 0.5, 0.35)
ABOUT_BYTES_PER_PIXEL = 15_000
"""What whole frames take in the VAE, roughly; a guess, which says where a search begins."""
ABOUT_BYTES_PER_NUMBER = 12
"""What a block takes for each number of the residual: that in float32, and queries, keys, values, outputs in half."""
ABOUT_BLOCKS = 3
"""On the card where blocks are streamed: the one in use, and those that come and go."""
BESIDE_BUDGET_BYTES = int(0.5 * GIB)
"""What decoding takes besides its budget, at the most: weights in half precision, latents, libraries."""
BESIDE_MATRICES = 1.002
"""A block with its biases and norms, to its matrices."""
SEARCHED = (
    "offload",
    "load_strategy",
    "t5_cpu",
    "share_first_attention",
    "resident_gib",
    "attention_slicing",
    "rows_at_once",
    "residual_on_host",
    "vae_precision",
    "vae_budget_gib",
)
"""The knobs that a search sets; one that is not at its default was chosen by the user, and stays."""

_SLICES: Sequence[Knobs] = (
    {"attention_slicing": True},
    {"attention_slicing": True, "rows_at_once": 2048},
    {"attention_slicing": True, "rows_at_once": 2048, "residual_on_host": 0.5},
    {"attention_slicing": True, "rows_at_once": 1024, "residual_on_host": 1.0},
)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way for the phases of a ladder.

    Attributes:
        knobs: what it sets.
        about_bytes: what its phases take, roughly: says where to look first, no more.
    """

    knobs: Knobs
    about_bytes: int = 0


Family = Sequence[Rung]


@dataclass(frozen=True, kw_only=True)
class Ladders:
    """Families of rungs, fastest first: one ladder for denoising, which settles that of T5 too, one for the VAE."""

    denoise: Sequence[Family]
    decode: Sequence[Family]


def ladders(job: Job, room_bytes: int) -> Ladders:
    """The rungs for a job, without those that cannot fit whatever else is done.

    T5 on the CPU is no rung: streamed, it takes less of the card and less time.

    Args:
        job: resolved; what it sets besides the defaults stays.
        room_bytes: what the allocator may take.
    """
    return Ladders(
        denoise=_agreeing(job, _denoise_families(job, room_bytes)),
        decode=_agreeing(job, _decode_families(job, room_bytes)),
    )


def first_tried(job: Job, room_bytes: int) -> Knobs | None:
    """Everything on the card all the time, which nothing is faster than; None where the weights alone do not fit."""
    dit_bytes, text_bytes = _weights(job)
    if dit_bytes + text_bytes > room_bytes:
        return None
    return next(filter(lambda knobs: _agrees(job, knobs), _openings(job)), None)


def _agreeing(job: Job, families: Sequence[Family]) -> Sequence[Family]:
    agreeing = ([rung for rung in family if _agrees(job, rung.knobs)] for family in families)
    working = ([rung for rung in family if not _host_refusal(job, rung.knobs)] for family in agreeing)
    return [family for family in working if family]


def _weights(job: Job) -> tuple[int, int]:
    """Bytes of the DiT's and T5's weights, nearly all of them."""
    spec = build_spec(job)
    text_numbers = text_block_numbers(spec.text) * spec.text.num_layers + spec.text.vocab_size * spec.text.dim
    dit_bytes = dit_block_numbers(spec.dit) * num_dit_blocks(spec.dit) * ITEM_BYTES[job.precision]
    return dit_bytes, 0 if job.t5_cpu else text_numbers * ITEM_BYTES[job.t5_precision]


def _openings(job: Job) -> list[Knobs]:
    """Whether both passes of guidance share what they can, which saves a part of the work and keeps a residual more."""
    sharing = job.replace(share_first_attention=True)
    can_share = _agrees(job, {"share_first_attention": True}) and shared_operations(
        build_spec(job), build_options(sharing), build_request(job)
    )
    return [{"share_first_attention": True}, {}] if can_share else [{}]


def _denoise_families(job: Job, room_bytes: int) -> list[Family]:
    dit_bytes, text_bytes = _weights(job)
    block_bytes = BESIDE_MATRICES * dit_bytes / num_dit_blocks(build_spec(job).dit)
    num_numbers = build_request(job).denoised_shape.num_tokens * build_spec(job).dit.dim
    most_blocks = int(min(room_bytes, dit_bytes * BESIDE_MATRICES) / block_bytes)
    families: list[Family] = []
    for opening in _openings(job):
        if max(dit_bytes, text_bytes) <= room_bytes:
            families.append([Rung(knobs={"load_strategy": "full", **opening})])
        streaming_bytes = int(ABOUT_BLOCKS * block_bytes) + num_numbers * (
            ABOUT_BYTES_PER_NUMBER + (ITEM_BYTES["fp32"] if opening else 0)
        )
        # As many blocks as there is room for stay; the others come in while they compute, which costs next to nothing.
        kept = [math.ceil(100 * number * block_bytes / GIB) / 100 for number in range(most_blocks, -1, -1)]
        if job.resident_gib:
            kept = [job.resident_gib]
        families.append(
            [
                Rung(
                    knobs={"load_strategy": "block", **opening, "resident_gib": gib},
                    about_bytes=streaming_bytes + int(min(gib * GIB, dit_bytes)),
                )
                for gib in kept
            ]
        )
    rest = [*product(("block",), _SLICES), *product(("part",), ({}, *_SLICES))]
    return [*families, *([Rung(knobs={"load_strategy": strategy, **slices})] for strategy, slices in rest)]


def _decode_families(job: Job, room_bytes: int) -> list[Family]:
    shape = build_request(job).shape
    whole_bytes = ABOUT_BYTES_PER_PIXEL * shape.height * shape.width
    budgets = [gib for gib in BUDGETS_GIB if gib * GIB < room_bytes] or BUDGETS_GIB[-1:]
    whole = Rung(knobs={}, about_bytes=whole_bytes)
    family = [whole, *(Rung(knobs={"vae_budget_gib": gib}, about_bytes=int(gib * GIB)) for gib in budgets)]
    # Another number format is another video, so it comes last although it is faster.
    half = [Rung(knobs={"vae_precision": "bf16", **rung.knobs}, about_bytes=rung.about_bytes) for rung in family]
    return [family, half]


def smallest(rungs: Ladders, room_bytes: int) -> Knobs:
    """The knobs with which a workload fits if any do."""
    decode = [rung.knobs for rung in chain.from_iterable(rungs.decode)]
    budgets = [knobs for knobs in decode if "vae_budget_gib" in knobs]
    roomy = [one for one in budgets if float(one["vae_budget_gib"] or 0) * GIB <= room_bytes - BESIDE_BUDGET_BYTES]
    formats = [one for one in roomy if one.get("vae_precision") == "bf16"] or roomy or budgets[-1:] or [{}]
    # The largest budget, for more frames need more; they come in descending order.
    return {"offload": True, **formats[0], **(rungs.denoise[-1][-1].knobs if rungs.denoise else {})}


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


def _host_refusal(job: Job, knobs: Knobs) -> str:
    """Why a rung's weights cannot be streamed within the job's `host_budget_gib`; empty if they can."""
    try:
        check_host_room(build_spec(job), build_options(job.replace(**knobs)), job.device)
    except UsageError as error:
        return str(error)
    return ""


def host_obstacle(job: Job) -> str:
    """Why the way to load that takes least of the card is left out for `host_budget_gib`; empty if it is not."""
    ways: list[Knobs] = [{"load_strategy": "part"}, {"load_strategy": "block"}]
    least = next((knobs for knobs in ways if _agrees(job, knobs)), None)
    return "" if least is None else _host_refusal(job, least)


def bounds_of(job: Job, card: Card) -> dict[str, float]:
    """The lower bounds of a job's phases in seconds."""
    return lower_bounds(build_spec(job), build_options(job), build_request(job), card)
