"""What layers take when `wan21.vae.fused` carries them out: bytes, and rounds of programs.

Letters: C channels; T frames at the layer at hand; P positions that it computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from wan21.kernels.vae_blocks import Blocks, blocks_for, fits_one_program, programs_at_once
from wan21.vae.decoder import Decoder
from wan21.vae.layers import ResidualBlock, Upsample
from wan21.vae.need import NOTHING, Need, Positions, macs_of


def chain(
    layers: Sequence[nn.Module], following: nn.Module | None, positions: Positions, frames: int, past: int
) -> tuple[Need, int]:
    """What layers take in a row, and how many frames come out.

    Args:
        layers: as `wan21.vae.fused.run` takes them.
        following: the layer that takes what they return.
        positions: by layer.
        frames: that go in.
        past: frames that a causal convolution remembers.
    """
    need = NOTHING
    for index, layer in enumerate(layers):
        is_last = index + 1 == len(layers)
        kept = _read_by(following if is_last else layers[index + 1], positions)
        if isinstance(layer, ResidualBlock):
            has_norm = not is_last and not isinstance(layers[index + 1], Upsample)
            need = need.then(_block(layer, positions, frames, past, kept, has_norm=has_norm))
        elif isinstance(layer, Upsample):
            doubles = layer.time_conv is not None and past > 0
            need = need.then(_upsample(layer, positions, frames, past if doubles else 0, kept))
            frames *= 2 if doubles else 1
        else:
            need = need.then(_head(cast("nn.Conv3d", cast("nn.ModuleDict", layer)["2"]), positions, frames, past))
    return need, frames


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A convolution as it is launched for a tile.

    layer: whose rows and columns it computes.
    blocks: how it is cut.
    num_parts: programs for each place in which one computes.
    times: how often it is launched for one latent frame.
    macs: multiply-adds of a program.
    """

    layer: nn.Module
    blocks: Blocks
    num_parts: int
    times: int
    macs: int

    def macs_of(self, num_places: int) -> int:
        """Multiply-adds for which there would be time, were the chip never idle: rounds are as long as full ones."""
        at_once = programs_at_once(self.blocks)
        return self.times * -(-num_places * self.num_parts // at_once) * at_once * self.macs


def launches(
    decoder: Decoder, frames_at_once: int | None, past: int, *, itemsize: int, batch_size: int
) -> list[Launch]:
    """What decoding launches for a tile and a latent frame, but for the few convolutions that are cuDNN's.

    Args:
        decoder: whose middle and high part it is.
        frames_at_once: of the plan.
        past: frames that a causal convolution remembers.
        itemsize: bytes of a number.
        batch_size: videos decoded together.
    """
    found = []
    frames = times = 1

    def add(layer: nn.Module, conv: nn.Module) -> None:
        weight = cast("nn.Conv3d", conv).weight
        c_out, c_in = weight.shape[:2]
        blocks = blocks_for(c_in, c_out, frames, itemsize)
        channels = sum(blocks.channels)
        num_parts = -(-c_out // channels) * (frames // blocks.frames) * batch_size
        positions = blocks.frames * blocks.tile_h * blocks.tile_w
        macs = positions * min(channels, c_out) * weight[0].numel()
        found.append(Launch(layer=layer, blocks=blocks, num_parts=num_parts, times=times, macs=macs))

    for index, layer in enumerate(decoder.upsamples):
        if index < decoder.first_upsampling:
            continue
        if index == decoder.last_upsampling:
            at_once = min(frames, frames_at_once or frames)
            frames, times = at_once, frames // at_once
        if isinstance(layer, Upsample):
            frames *= 2 if layer.time_conv is not None and past else 1
            add(layer, layer.resample[1])
        else:
            block = cast("ResidualBlock", layer)
            for name in ("2", "6"):
                add(block.residual[name], block.residual[name])
    add(decoder.head["2"], decoder.head["2"])
    return found


def _read_by(layer: nn.Module | None, positions: Positions) -> int:
    """Positions that a layer reads, which are all that the one before it computes."""
    if isinstance(layer, ResidualBlock):
        return positions[layer.residual["2"]]
    if isinstance(layer, Upsample):
        return positions[layer] // 4
    return 0 if layer is None else positions[cast("nn.ModuleDict", layer)["2"]]


def _block(block: ResidualBlock, positions: Positions, frames: int, past: int, kept: int, *, has_norm: bool) -> Need:
    first, second = cast("nn.Conv3d", block.residual["2"]), cast("nn.Conv3d", block.residual["6"])
    outer, inner = positions[first], positions[second]
    entering, between, leaving = first.in_channels * outer, first.out_channels * inner, first.out_channels * kept
    has_shortcut = isinstance(block.shortcut, nn.Conv3d)
    projected = first.out_channels * outer if has_shortcut else 0
    is_cut = kept != outer
    # Beside the past: the input and what its norm made of it, while the residual is projected or cut;
    residual = 2 * entering + projected + (leaving if is_cut else 0)
    # the residual, the first convolution's input and result, which lies beside its norm if that is a step of its own;
    in_first = leaving + entering + between * (1 if fits_one_program(first.out_channels) else 2)
    # the residual, which becomes the result, the second one's input, and what the next norm makes of the result.
    in_second = leaving + between + (leaving if has_norm else 0)
    macs = frames * (macs_of(first, inner) + macs_of(second, kept))
    if has_shortcut:
        macs += frames * macs_of(block.shortcut, outer)
    return Need(past * (entering + between), frames * max(residual, in_first, in_second), macs)


def _upsample(layer: Upsample, positions: Positions, frames: int, past: int, kept: int) -> Need:
    """`past` is that of the convolution in time, if it takes part."""
    conv = cast("nn.Conv2d", layer.resample[1])
    before = conv.in_channels * positions[layer] // 4
    macs, in_time = 0, 0
    if layer.time_conv is not None and past:
        # The input, the same joined to its past, twice the channels, and these as frames.
        in_time = frames * before + (frames + past) * before + 4 * frames * before
        macs = frames * macs_of(layer.time_conv, positions[layer] // 4)
        frames *= 2
    passing = max(in_time, frames * (before + 2 * conv.out_channels * kept))
    return Need(past * before, passing, macs + frames * macs_of(conv, kept))


def _head(conv: nn.Conv3d, positions: Positions, frames: int, past: int) -> Need:
    entering = conv.in_channels * positions[conv]
    passing = frames * (2 * entering + conv.out_channels * positions[conv])
    return Need(past * entering, passing, frames * macs_of(conv, positions[conv]))
