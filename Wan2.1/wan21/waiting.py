"""What streamed weights take of pinned host memory, by their sizes alone; no torch in here.

Weights that come and go together are a piece: a block, or a part of one. Pieces wait on the host; within a budget some
of them are read again from the checkpoint's files instead, through a ring of a few buffers (`memory.reading`).

Letters: D model width; M feed-forward width.
"""

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wan21.errors import UsageError
from wan21.models import ClipConfig, DitConfig, ModelSpec, TextEncoderConfig
from wan21.options import LoadStrategy, Options

GIB = 2**30
ITEM_BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
FP32 = ITEM_BYTES["fp32"]

ALIGNMENT = 256
"""Every tensor starts at a multiple of this in a packed buffer, as it would coming from an allocator."""

NUM_BUFFERS = 3
"""Of a ring: one is copied from, one is full, one is being filled."""

Sizes = Sequence[int]
"""Bytes of each tensor."""


def whole_pages(num_bytes: int) -> int:
    """Bytes of the pages that a buffer takes."""
    return -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def aligned(num_bytes: int, num_shares: int = 1) -> int:
    """So many bytes, rounded up to what divides into so many aligned shares."""
    share = ALIGNMENT * num_shares
    return -(-num_bytes // share) * share


def spread_evenly(sizes: Sequence[int], budget_bytes: int) -> frozenset[int]:
    """Which of them to keep within a budget: up to each, the kept share is at most what the budget is of all."""
    kept: set[int] = set()
    kept_bytes = seen_bytes = 0
    for number, num_bytes in enumerate(sizes):
        seen_bytes += num_bytes
        if (kept_bytes + num_bytes) * sum(sizes) <= budget_bytes * seen_bytes:
            kept_bytes += num_bytes
            kept.add(number)
    return frozenset(kept)


def least_pinned(sizes: Sequence[int]) -> int:
    """The least bytes of host memory from which pieces of these sizes can be brought in: a ring, or all of them."""
    pages = [whole_pages(size) for size in sizes]
    return min(sum(pages), NUM_BUFFERS * max(pages, default=0))


def choose_pinned(sizes: Sequence[int], budget_bytes: int) -> frozenset[int]:
    """The numbers of the pieces that are pinned for good within a budget: all, or those that the ring leaves room for.

    Args:
        sizes: of this process's share of each piece, in the order of use.
        budget_bytes: for these and the ring; at least `least_pinned`.
    """
    pages = [whole_pages(size) for size in sizes]
    if sum(pages) <= budget_bytes:
        return frozenset(range(len(pages)))
    # Spread evenly, so that reading has time between them.
    return spread_evenly(pages, budget_bytes - NUM_BUFFERS * max(pages))


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A component whose blocks are streamed.

    blocks: in the order of use, the weights in each part of a block; without what is on the device always.
    once: weights that wait packed together if parts are streamed, since a run needs them once.
    table: bytes of a row, and rows, of what is looked up on the host if parts are streamed.
    """

    name: str
    blocks: Sequence[Sequence[Sizes]]
    once: Sizes = ()
    table: tuple[int, int] = (0, 0)

    def least_bytes(self, strategy: LoadStrategy, resident_bytes: int, num_shares: int) -> int:
        """The least pinned host memory that one process needs for it, of so many that share the weights."""
        by_part = strategy == "part"
        pieces = [
            [_packed(part, num_shares) for part in (block if by_part else [[n for part in block for n in part]])]
            for block in self.blocks
        ]
        kept = spread_evenly([sum(block) for block in pieces], resident_bytes)
        sizes = [size // num_shares for number, block in enumerate(pieces) if number not in kept for size in block]
        return least_pinned(sizes) + (self._aside(num_shares) if by_part else 0)

    def _aside(self, num_shares: int) -> int:
        row_bytes, num_rows = self.table
        rows = row_bytes * -(-num_rows // num_shares)
        once = _packed(self.once, num_shares) // num_shares
        return sum(whole_pages(aligned(size)) for size in (rows, once) if size)


def check_host_budget(options: Options) -> None:
    """Refuses a budget of host memory for weights that cannot be read again.

    Raises:
        UsageError: they are drawn, or made while they are loaded.
    """
    if options.host_budget_gib is None or options.load_strategy == "full":
        return
    if options.ckpt_dir is None:
        raise UsageError(
            f"host_budget_gib={options.host_budget_gib:g} reads weights from a checkpoint's files again and again, and "
            "random ones are drawn; choose ckpt_dir=FOLDER (scripts/make_tiny_checkpoint.py --model NAME writes one "
            "with random weights), or host_budget_gib=null"
        )
    if options.linear_format != "same":
        raise UsageError(
            f"host_budget_gib={options.host_budget_gib:g} reads weights as they are stored, and "
            f"linear_format={options.linear_format} makes them while they are loaded; choose linear_format=same, or "
            "host_budget_gib=null"
        )


def check_host_room(spec: ModelSpec, options: Options, device: str) -> None:
    """Refuses a budget of pinned host memory that is too small for the ring of some component.

    Args:
        spec: the task.
        options: how to run.
        device: "cpu" or "cuda".

    Raises:
        UsageError: names the least that works.
    """
    if options.host_budget_gib is None or options.load_strategy == "full":
        return
    name, least = _neediest(spec, options, options.load_strategy, device)
    if int(options.host_budget_gib * GIB) >= least:
        return
    way_out = f"choose {_gib(least):g} or more, or null, which pins all"
    other: LoadStrategy = "block" if options.load_strategy == "part" else "part"
    _, elsewise = _neediest(spec, options, other, device)
    if elsewise < least and not (other == "part" and options.share_first_attention):
        way_out += f"; with load_strategy={other} {_gib(elsewise):g} is enough"
    raise UsageError(
        f"host_budget_gib={options.host_budget_gib:g} is too little: with load_strategy={options.load_strategy} {name} "
        f"needs {_gib(least):g} GiB, for what waits on the host in any case and a ring of {NUM_BUFFERS} buffers for "
        f"the rest; {way_out}"
    )


def _gib(num_bytes: int) -> float:
    """Rounded up."""
    return math.ceil(num_bytes / GIB * 1000) / 1000


def _neediest(spec: ModelSpec, options: Options, strategy: LoadStrategy, device: str) -> tuple[str, int]:
    """The component that needs most pinned host memory at the least, and how much."""
    resident, num_shares = int(options.resident_gib * GIB), options.layout.world_size
    needs = {one.name: one.least_bytes(strategy, resident, num_shares) for one in streamed(spec, options, device)}
    name = max(needs, key=lambda name: needs[name])
    return name, needs[name]


def streamed(spec: ModelSpec, options: Options, device: str) -> list[Streamed]:
    """The components whose blocks are streamed on this device unless load_strategy=full."""
    components = [_dit(spec.dit, ITEM_BYTES[options.precision])]
    if not options.t5_cpu or device == "cpu":
        components.append(_t5(spec.text, ITEM_BYTES[options.t5_precision]))
    if spec.clip is not None:
        components.append(_clip(spec.clip, ITEM_BYTES[options.clip_precision]))
    return components


def _packed(sizes: Sizes, num_shares: int) -> int:
    return aligned(sum(map(aligned, sizes)), num_shares)


def _linear(inputs: int, outputs: int, item: int) -> Sizes:
    return [inputs * outputs * item, outputs * item]


def _dit(dit: DitConfig, item: int) -> Streamed:
    """Norms and what has to do with time are float32 always."""
    dim, width = dit.dim, dit.image_dim
    square, norm = _linear(dim, dim, item), [dim * FP32]
    two = [*square, *square, *norm]
    feed_forward = [_linear(dim, dit.ffn_dim, item), _linear(dit.ffn_dim, dim, item)]
    block = [two, two, two * 2 if width else two, [*norm, *norm, *two], *feed_forward]
    beside = () if dit.vace is None else dit.vace.layers
    blocks: list[Sequence[Sizes]] = []
    for layer in range(dit.num_layers):
        blocks += [block, [*block, square]] if layer in beside else [block]
    once = [
        *(*_linear(dit.text_dim, dim, item), *square),
        *(*_linear(dit.freq_dim, dim, FP32), *_linear(dim, dim, FP32), *_linear(dim, 6 * dim, FP32)),
    ]
    if width:
        once += [*[width * FP32] * 2, *_linear(width, width, item), *_linear(width, dim, item), *norm, *norm]
        once += [dit.num_image_positions * width * FP32]
    return Streamed(name="dit", blocks=blocks, once=once)


def _t5(text: TextEncoderConfig, item: int) -> Streamed:
    dim = text.dim
    attention = [dim * item, *[dim * dim * item] * 4, text.num_buckets * text.num_heads * item]
    feed_forward = [dim * item, *[dim * text.ffn_dim * item] * 3]
    table = (dim * item, text.vocab_size)
    return Streamed(name="t5", blocks=[[attention, feed_forward]] * text.num_layers, table=table)


def _clip(clip: ClipConfig, item: int) -> Streamed:
    """Without the last block, which is never run."""
    dim, norm = clip.dim, [clip.dim * item] * 2
    attention = [*norm, *_linear(dim, 3 * dim, item), *_linear(dim, dim, item)]
    feed_forward = [*norm, *_linear(dim, clip.ffn_dim, item), *_linear(clip.ffn_dim, dim, item)]
    return Streamed(name="clip", blocks=[[attention, feed_forward]] * (clip.num_layers - 1))
