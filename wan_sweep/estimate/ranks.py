"""A job of several ranks: one of each kind is gone through, as many at a time as asked, and the rest are like these.

What can tell ranks apart is listed in `_kind`. Ranks of one kind ask for the same bytes. Where each holds another share
of the weights, those between the first and the last draw other pieces of them while they load, so where tensors lie may
differ among them, and by that their allocated and reserved memory, by a segment or so.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from wan21.models import ModelSpec
from wan21.options import Options
from wan21.request import Request
from wan21.vae import Vae, choose_plan
from wan21.vae.plan import Strip, tiles
from wan_sweep.allocator import Settings
from wan_sweep.build import build_options, build_request, build_spec
from wan_sweep.cards import Card
from wan_sweep.estimate.dry_run import SILENT_SINK
from wan_sweep.estimate.predict import DEFAULT_SETTINGS, estimate
from wan_sweep.estimate.processes import shared_out
from wan_sweep.headline import PEAK_RANK, told_together
from wan_sweep.measure.recorder import Sink
from wan_sweep.schema import Job

SinkOf = Callable[[int], Sink]
"""Where the events of the rank of this number go."""

MADE_BEFORE_COLLECTING = 50_000
"""Objects, where Python's own default looks for cycles after 700: modules and fake tensors are many, and stay."""


def estimate_ranks(
    job: Job,
    card: Card,
    settings: Settings = DEFAULT_SETTINGS,
    sink_of: SinkOf = lambda _: SILENT_SINK,
    *,
    num_processes: int = 1,
) -> dict[str, Any]:
    """What `estimate` tells, of all ranks of a job together.

    Args:
        job: resolved.
        card: on which each rank runs, on one of its own.
        settings: of torch's allocator there.
        sink_of: gets the events of the ranks that are gone through; asked in the process that goes through the rank.
        num_processes: so many at the most go through ranks, this one among them. More than one may only be asked for
            where no other thread runs.

    Returns:
        As `estimate` does; of several ranks with the largest numbers of all, as a measured job has them, `ranks` with
        those of each, and the ending of the first that does not fit. `peaks` are the fullest rank's, `peaks_by_rank`
        those of each. In `estimate`, `gone_through` tells for each rank which one's numbers it has, and `confidence` is
        for each phase that of the rank with the highest peak.
    """
    started = time.perf_counter()
    like = ranks_gone_through(job)

    def tell(ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        return {rank: estimate(job, card, settings, sink_of(rank), rank=rank) for rank in ranks}

    with seldom_collecting():
        told = shared_out(tell, sorted(set(like.values())), num_processes)
    if len(like) == 1:
        return {**told[0], "ranks": [{"rank": 0, "metrics": told[0]["metrics"], "series": told[0]["series"]}]}
    by_rank = {rank: told[other] for rank, other in like.items()}
    together = told_together(by_rank)
    peak_rank = together["metrics"].get(PEAK_RANK, 0)
    return {
        **together,
        **_ending(told),
        "warnings": _warnings(told),
        "peaks": by_rank[peak_rank]["peaks"],
        "peaks_by_rank": {str(rank): one["peaks"] for rank, one in by_rank.items()},
        "estimate": {
            **told[0]["estimate"],
            "confidence": _confidence(told),
            "gone_through": {str(rank): other for rank, other in like.items()},
            "seconds": time.perf_counter() - started,
        },
    }


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Inside it Python looks for cycles less often, and not among what was there before: all of torch."""
    outer = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(MADE_BEFORE_COLLECTING, *outer[1:])
    try:
        yield
    finally:
        gc.set_threshold(*outer)
        gc.unfreeze()


def ranks_gone_through(job: Job) -> dict[int, int]:
    """For each rank of a job the one that is gone through for it: the first of its kind."""
    spec, options, request = build_spec(job), build_options(job), build_request(job)
    if options.layout.world_size == 1:
        return {0: 0}
    tile_kinds = _tile_kinds(spec, options, request)
    first: dict[object, int] = {}
    return {
        rank: first.setdefault((*_kind(rank, spec, options, request), tile_kinds[rank]), rank)
        for rank in range(options.layout.world_size)
    }


def _kind(rank: int, spec: ModelSpec, options: Options, request: Request) -> tuple[object, ...]:
    """All that can make a rank's numbers other than another's, but its tiles.

    The first encodes the text for all, and puts the video together. Each half of guidance in parallel has a prompt of
    its own. Where tokens do not divide, members of a ring meet the shorter parts in another order. Of a shared table
    the last ranks may have fewer rows. Where each has a share of the weights, the last one's may be smaller.
    """
    layout = options.layout
    divides = request.denoised_shape.num_tokens % layout.sequence == 0
    has_shares = layout.dit_fsdp or layout.t5_fsdp or options.load_strategy != "full"
    table_rows = -(-spec.text.vocab_size // layout.world_size)
    return (
        rank == 0,
        rank // layout.sequence,
        None if divides else rank // layout.ulysses % layout.ring,
        has_shares and max(0, min(table_rows, spec.text.vocab_size - rank * table_rows)),
        has_shares and rank == layout.world_size - 1,
    )


def _tile_kinds(spec: ModelSpec, options: Options, request: Request) -> list[tuple[object, ...]]:
    """By rank, the sizes of the tiles that it decodes, in the order in which it meets them."""
    plan = choose_plan(spec, options, request.shape.latent)
    with torch.device("meta"):
        decoder = Vae(spec.vae, kernels=options.kernels).decoder
    kinds = [(_sizes(tile.rows), _sizes(tile.cols)) for tile in tiles(decoder, plan, *request.shape.latent[1:])]
    size = options.layout.world_size
    return [tuple(dict.fromkeys(kinds[rank::size])) for rank in range(size)]


def _sizes(strip: Strip) -> tuple[int, ...]:
    """Sizes alone: a tile at one edge of the picture and its mirror image at the other take the same."""
    sides = (strip.pixels, strip.features)
    windows = (side for window in strip.windows.values() for side in (window.computed, window.kept))
    return tuple(len(side) for side in (*sides, *windows))


def _ending(told: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Of the first rank that does not come to a good end, if there is one."""
    for rank, one in told.items():
        if one["outcome"] != "ok":
            failure = {**(one["failure"] or {}), "rank": rank}
            return {"outcome": one["outcome"], "reason": f"rank {rank}: {one['reason']}", "failure": failure}
    return {"outcome": "ok", "reason": "", "failure": None}


def _warnings(told: Mapping[int, Mapping[str, Any]]) -> list[dict[str, str]]:
    """What all ranks say is said once; what some say, with their numbers."""
    by_warning: dict[tuple[str, str, str], list[int]] = {}
    for rank, one in told.items():
        for warning in one["warnings"]:
            by_warning.setdefault((warning["code"], warning["text"], warning["advice"]), []).append(rank)
    return [
        {"code": code, "text": text if len(ranks) == len(told) else f"rank {ranks[0]}: {text}", "advice": advice}
        for (code, text, advice), ranks in by_warning.items()
    ]


def _confidence(told: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    by_phase: dict[str, Any] = {}
    for one in told.values():
        for phase, confidence in one["estimate"]["confidence"].items():
            fullest = by_phase.get(phase)
            if fullest is None or confidence["allocated_bytes"] > fullest["allocated_bytes"]:
                by_phase[phase] = confidence
    return by_phase
