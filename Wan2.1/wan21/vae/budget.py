"""What a plan takes, in bytes and in work, and the best plan for a number of bytes. By arithmetic: nothing runs.

Here for decoding, and what encoding shares with it; `encode_budget` has the rest.

Bytes are what tensors ask for. Kernels that need room of their own come on top; cuDNN needs none for these
convolutions when channels come last.

Letters: C channels; T frames at the layer at hand; P positions that it computes; t, h, w of the latents.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, cast

from torch import nn

from wan21.errors import UsageError
from wan21.vae.decoder import Decoder
from wan21.vae.fused_budget import Launch, launches
from wan21.vae.fused_budget import chain as fused_chain
from wan21.vae.layers import AttentionBlock, Downsample, ResidualBlock, Upsample
from wan21.vae.need import NOTHING, Need, Positions, macs_of
from wan21.vae.plan import DecodePlan, Strip, strips

PAST = 2
"""Frames that a causal convolution remembers."""

MIN_TILE = 8
"""Latent positions on a side of the smallest tile that is looked at: a smaller one is all halo."""

SINGLE_FRAME_WORK = 1.06
"""How much longer frames one at a time take: each is joined to two earlier ones, where four at once share two."""


def _block(block: ResidualBlock, positions: Positions, frames: int, past: int, stored: int) -> Need:
    first, second = cast("nn.Conv3d", block.residual["2"]), cast("nn.Conv3d", block.residual["6"])
    in_dim, out_dim = first.in_channels, first.out_channels
    outer, inner = positions[first], positions[second]
    normed, joined = frames * in_dim * outer, (frames + past) * in_dim * outer
    between, joined_again = frames * out_dim * outer, (frames + past) * out_dim * inner
    # Beside the input: normed and joined; joined and the first result; that, joined; joined and the second result.
    passing = frames * in_dim * stored + max(normed + joined, joined + between, between + joined_again)
    macs = frames * (macs_of(first, outer) + macs_of(second, inner))
    if isinstance(block.shortcut, nn.Conv3d):
        macs += frames * macs_of(block.shortcut, outer)
    return Need(past * (in_dim * outer + out_dim * inner), passing, macs)


def _attention(block: AttentionBlock, positions: Positions, frames: int) -> Need:
    computed = frames * positions[block]
    # The input, normed, and queries, keys and values. The products of attention itself are left out of the work.
    return Need(
        0, 5 * block.proj.in_channels * computed, macs_of(block.to_qkv, computed) + macs_of(block.proj, computed)
    )


def _upsample(layer: Upsample, positions: Positions, frames: int, past: int, stored: int) -> Need:
    conv = cast("nn.Conv2d", layer.resample[1])
    before, dim = positions[layer] // 4, conv.in_channels
    passing, remembered, macs = frames * dim * stored, 0, 0
    if layer.time_conv is not None and past:
        remembered, macs = past * dim * before, frames * macs_of(layer.time_conv, before)
        frames *= 2
        passing += frames * dim * before
    # The enlarged input is four times it, the result with half the channels twice.
    return Need(remembered, passing + 6 * frames * dim * before, macs + frames * macs_of(conv, positions[layer]))


def _downsample(layer: Downsample, positions: Positions, frames: int, past: int, stored: int) -> Need:
    conv = cast("nn.Conv2d", layer.resample[1])
    after, dim = positions[layer], conv.in_channels
    # The input, a padded copy of it, and the result.
    passing, remembered, macs = frames * dim * (stored + 5 * after), 0, frames * macs_of(conv, after)
    if layer.time_conv is not None and past:
        remembered = dim * after
        # The result, joined to the frame before it, and half as many.
        passing = max(passing, (2 * frames + 1 + frames // 2) * dim * after)
        macs += frames // 2 * macs_of(layer.time_conv, after)
    return Need(remembered, passing, macs)


def chain(
    layers: Iterable[nn.Module], positions: Positions, frames: int, past: int, stored: int
) -> tuple[Need, int, int]:
    """What layers take in a row, how many frames come out, and in memory for how many positions each of them lies.

    What is cut off stays in memory as long as the rest, so `stored` may be more than the next layer computes.
    """
    need = NOTHING
    for layer in layers:
        if isinstance(layer, ResidualBlock):
            need = need.then(_block(layer, positions, frames, past, stored))
            stored = positions[layer.residual["6"]]
        elif isinstance(layer, AttentionBlock):
            need = need.then(_attention(layer, positions, frames))
        elif isinstance(layer, Upsample):
            need = need.then(_upsample(layer, positions, frames, past, stored))
            stored = positions[layer]
            frames *= 2 if layer.time_conv is not None and past else 1
        elif isinstance(layer, Downsample):
            need = need.then(_downsample(layer, positions, frames, past, stored))
            stored = positions[layer]
            frames //= 2 if layer.time_conv is not None and past else 1
    return need, frames, stored


@dataclass(frozen=True)
class _Parts:
    """What the decoder's three parts take, for one latent frame.

    num_frames: how many come out.
    waiting: numbers of the middle part's result, and of pixels that are ready, while the high part runs in parts.
    """

    low: Need
    mid: Need
    high: Need
    waiting: int
    num_frames: int


def _parts(decoder: Decoder, num_positions: int, positions: Positions, past: int, frames_at_once: int | None) -> _Parts:
    whole = dict.fromkeys(decoder.modules(), num_positions)
    low, _, _ = chain((*decoder.middle, *decoder.upsamples[: decoder.first_upsampling]), whole, 1, past, num_positions)
    first = decoder.conv1
    low = low.then(Need(past * first.in_channels * num_positions, 0, macs_of(first, num_positions)))

    layers = list(decoder.upsamples[decoder.first_upsampling : decoder.last_upsampling])
    last_layers = list(decoder.upsamples[decoder.last_upsampling :])
    head = cast("nn.Conv3d", decoder.head["2"])
    if decoder.kernels == "fused":
        mid, frames = fused_chain(layers, last_layers[0], positions, 1, past)
        stored = positions[last_layers[0]] // 4
    else:
        mid, frames, stored = chain(layers, positions, 1, past, positions[layers[0]] // 4)
    at_once = min(frames, frames_at_once or frames)
    if decoder.kernels == "fused":
        high, _ = fused_chain([*last_layers, decoder.head], None, positions, at_once, past)
    else:
        high, _, _ = chain(last_layers, positions, at_once, past, stored)
        computed = head.in_channels * positions[head]
        macs = at_once * macs_of(head, positions[head])
        high = high.then(Need(past * computed, (2 * at_once + past) * computed, macs))
    waiting = 0
    if at_once < frames:
        last = cast("nn.Conv2d", cast("Upsample", last_layers[0]).resample[1])
        waiting = frames * (last.in_channels * stored + head.out_channels * positions[head])
        # All of it is done as often as it takes.
        high = Need(high.past, high.passing, high.macs * frames // at_once)
    return _Parts(low, mid, high, waiting, frames)


class TileBudget(ABC):
    """Bytes and work of plans for one video.

    Args:
        latent_shape: (t, h, w).
        itemsize: bytes of a number in the VAE's format.
        batch_size: videos coded together.
    """

    verb: ClassVar[str]
    """What is done with the video."""

    def __init__(self, latent_shape: tuple[int, int, int], *, itemsize: int, batch_size: int = 1) -> None:
        self._shape = latent_shape
        self._batch_size = batch_size
        self._itemsize = itemsize
        self._bytes_per_number = itemsize * batch_size
        self._past = PAST if latent_shape[0] > 1 else 0
        self._cache: dict[tuple[str, int, bool], Positions] = {}
        self._all_strips: dict[tuple[str, int], Sequence[Strip]] = {}

    @abstractmethod
    def num_bytes(self, plan: DecodePlan) -> int:
        """The most that is taken at a time, beside weights and what is given."""

    @abstractmethod
    def work(self, plan: DecodePlan, num_ranks: int = 1) -> float:
        """Multiply-adds for one latent frame, halos included; those of one of the ranks that share the tiles."""

    def cost(self, plan: DecodePlan, num_ranks: int = 1) -> float:
        """What plans are compared by; what is the same for all of them may be left out."""
        return self.work(plan, num_ranks)

    @abstractmethod
    def _strips(self, size: int, count: int, name: str) -> Sequence[Strip]:
        """Rows or columns of tiles."""

    def least_bytes(self) -> int:
        """What the plan takes that takes least."""
        return min(map(self.num_bytes, self._plans(1)))

    def best_plan(self, budget_bytes: float, num_ranks: int = 1) -> DecodePlan:
        """The plan of least cost among those that take no more than `budget_bytes`.

        Args:
            budget_bytes: of each rank; may be infinite.
            num_ranks: ranks that share the tiles; the least cost of one of them counts.

        Raises:
            UsageError: there is none.
        """
        for frames_at_once in (None, 1):
            fitting = [plan for plan in self._plans(frames_at_once) if self.num_bytes(plan) <= budget_bytes]
            if fitting:
                return min(fitting, key=lambda plan: (self.cost(plan, num_ranks), plan.num_tiles))
        t, h, w = self._shape
        raise UsageError(
            f"budget_bytes={budget_bytes} is too little to {self.verb} {t} x {h} x {w} latents: the smallest tiles "
            f"need {self.least_bytes()}; allow that, or choose a smaller number format, a smaller picture or fewer "
            "frames"
        )

    def _plans(self, frames_at_once: int | None) -> list[DecodePlan]:
        """All that are looked at."""
        _, h, w = self._shape
        counts = product(range(1, max(1, h // MIN_TILE) + 1), range(1, max(1, w // MIN_TILE) + 1))
        return [
            DecodePlan(num_tile_rows=rows, num_tile_cols=cols, frames_at_once=frames_at_once) for rows, cols in counts
        ]

    def _positions(self, plan: DecodePlan, *, largest: bool) -> Positions:
        """By layer, the positions that it computes: in the largest tile, or in all tiles together."""
        _, h, w = self._shape
        rows = self._computed("num_tile_rows", h, plan.num_tile_rows, largest=largest)
        cols = self._computed("num_tile_cols", w, plan.num_tile_cols, largest=largest)
        return {layer: rows[layer] * cols[layer] for layer in rows}

    def _computed(self, name: str, size: int, count: int, *, largest: bool) -> Positions:
        """By layer, the rows (or columns) that it computes."""
        key = (name, count, largest)
        if key not in self._cache:
            combine = max if largest else sum
            found = self._kept_strips(size, count, name)
            self._cache[key] = {
                layer: combine(len(strip.windows[layer].computed) for strip in found) for layer in found[0].windows
            }
        return self._cache[key]

    def _kept_strips(self, size: int, count: int, name: str) -> Sequence[Strip]:
        if (name, count) not in self._all_strips:
            self._all_strips[name, count] = self._strips(size, count, name)
        return self._all_strips[name, count]


class Budget(TileBudget):
    """Bytes and work of plans for decoding one video.

    Args:
        decoder: its layers are counted; it may be on the meta device.
        latent_shape: (t, h, w).
        itemsize: bytes of a number in the decoder's format.
        batch_size: videos decoded together.
    """

    verb = "decode"

    def __init__(
        self, decoder: Decoder, latent_shape: tuple[int, int, int], *, itemsize: int, batch_size: int = 1
    ) -> None:
        super().__init__(latent_shape, itemsize=itemsize, batch_size=batch_size)
        self._decoder = decoder
        self._launches: dict[int | None, list[Launch]] = {}

    def num_bytes(self, plan: DecodePlan) -> int:
        """The most that `Vae.decode_pieces` takes at a time, beside weights and the latents that it is given."""
        t, h, w = self._shape
        parts = self._parts(plan, largest=True)
        low, mid, high = parts.low, parts.mid, parts.high
        tile = mid.past + high.past + max(mid.passing, parts.waiting + high.passing)
        if plan.num_tiles == 1:
            most = low.past + max(low.passing, tile)
        else:
            most = self._decoder.low_dim * t * h * w + max(low.past + low.passing, tile)
        scaled = self._decoder.conv1.in_channels * t * h * w
        return (scaled + most) * self._bytes_per_number

    def work(self, plan: DecodePlan, num_ranks: int = 1) -> float:
        parts = self._parts(plan, largest=False)
        of_one = -(-plan.num_tiles // num_ranks) / plan.num_tiles
        macs = parts.low.macs + (parts.mid.macs + parts.high.macs) * of_one
        return macs * (SINGLE_FRAME_WORK if plan.frames_at_once == 1 and parts.num_frames > 1 else 1)

    def cost(self, plan: DecodePlan, num_ranks: int = 1) -> float:
        """With kernels of our own the multiply-adds that there is time for; small tiles leave part of it idle."""
        if self._decoder.kernels != "fused":
            return self.work(plan, num_ranks)
        _, h, w = self._shape
        if plan.frames_at_once not in self._launches:
            self._launches[plan.frames_at_once] = launches(
                self._decoder, plan.frames_at_once, self._past, itemsize=self._itemsize, batch_size=self._batch_size
            )
        every = self._launches[plan.frames_at_once]
        rows = self._places(every, "num_tile_rows", h, plan.num_tile_rows)
        cols = self._places(every, "num_tile_cols", w, plan.num_tile_cols)
        macs = sum(
            num_rows * num_cols * launch.macs_of(high * wide)
            for of_row, num_rows in rows.items()
            for of_col, num_cols in cols.items()
            for launch, high, wide in zip(every, of_row, of_col, strict=True)
        )
        return macs * -(-plan.num_tiles // num_ranks) / plan.num_tiles

    def _places(self, every: Sequence[Launch], name: str, size: int, count: int) -> Counter[tuple[int, ...]]:
        """How often each launch's programs fit into a strip, one below the other or side by side; strips by kind."""
        is_row = name == "num_tile_rows"
        sides = [launch.blocks.tile_h if is_row else launch.blocks.tile_w for launch in every]
        return Counter(
            tuple(-(-len(strip.windows[launch.layer].kept) // side) for launch, side in zip(every, sides, strict=True))
            for strip in self._kept_strips(size, count, name)
        )

    def _parts(self, plan: DecodePlan, *, largest: bool) -> _Parts:
        _, h, w = self._shape
        return _parts(self._decoder, h * w, self._positions(plan, largest=largest), self._past, plan.frames_at_once)

    def _strips(self, size: int, count: int, name: str) -> Sequence[Strip]:
        return strips(self._decoder, size, count, name)
