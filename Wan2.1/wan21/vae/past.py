"""What causal layers remember while a video passes through them chunk by chunk.

Letters: B videos; C channels; T, H, W frames, height and width of the layer at hand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wan21.vae.tiles import Crops


class Past:
    """The frames before the chunk at hand, as each causal layer saw them.

    One value belongs to one pass over one video, or over one tile of it: it is made where the pass begins and handed
    down, never kept on a module, so that it dies with the pass, an out-of-memory error included. With it a layer may be
    given a video in chunks of any length, one frame at a time included, and returns the frames that the whole video
    would give.

    Memory: after the second chunk, `num_frames` frames of its input for each causal layer, in memory that is written
    anew with each chunk; in a pass over whole frames these are the largest tensors that stay (decoding 832 x 480:
    3.8 GB in float32).

    Args:
        crops: what layers keep of their results; nothing is cut off if the pass is over whole frames.

    Attributes:
        is_first: the chunk at hand is the video's first. It has one frame, which temporal resampling leaves alone.
        is_last: the layers that are called next are called for the last time, so they no longer remember. An image,
            whose only chunk is first and last, needs no past at all.
    """

    def __init__(self, crops: Crops | None = None) -> None:
        self.is_first = True
        self.is_last = False
        self._crops = crops or Crops()
        self._frames: dict[nn.Module, Tensor] = {}
        self._windows: dict[nn.Module, list[Tensor]] = {}

    def extend(self, layer: nn.Module, x: Tensor, *, num_frames: int = 2) -> Tensor:
        """The chunk with the frames before it in front, as input of `layer`; its last frames are remembered.

        Before the video there are zeros. They are written out in front of a chunk of several frames only; a lone
        frame comes back shorter, and `CausalConv3d` leaves out the part of its kernel that would meet zeros.

        Args:
            layer: whose past it is.
            x: the chunk, [B, C, T, H, W].
            num_frames: how many earlier frames the layer sees.

        Returns:
            [B, C, num_frames + T, H, W], or fewer frames at the video's beginning if T = 1; then it may be x itself.

        Memory: one copy of the result, and [B, C, num_frames, H, W] to remember.
        """
        past = self._frames.pop(layer, None)
        parts = [x] if past is None else [past, x]
        num_missing = num_frames - sum(part.shape[2] for part in parts[:-1])
        if num_missing and x.shape[2] > 1:
            parts.insert(0, _empty_frames(x, num_missing).zero_())
        joined = torch.cat(parts, dim=2) if len(parts) > 1 else x  # copies
        parts.clear()
        if not self.is_last:
            # A view would keep all of `joined` alive.
            last = joined[:, :, -num_frames:]
            if past is None or past.shape != last.shape:
                past = None  # or it would stand beside the new one
                past = _empty_frames(x, last.shape[2])
            self._frames[layer] = past.copy_(last)
        return joined

    def window(self, layer: nn.Module, frames: list[Tensor], *, num_frames: int = 2) -> list[Tensor]:
        """The same with frames that are tensors of their own. Nothing is copied, and there are no zeros in front.

        Args:
            layer: whose past it is.
            frames: of the chunk; the last ones are kept, so nobody may write to them.
            num_frames: how many earlier frames the layer sees.
        """
        window = self._windows.pop(layer, []) + frames
        if not self.is_last:
            self._windows[layer] = window[-num_frames:]
        return window

    def kept(self, layer: nn.Module, size: Sequence[int]) -> tuple[slice, slice]:
        """Rows and columns of `layer`'s result, of the given height and width, that the tile needs."""
        crop = self._crops.of(layer)
        return crop or (slice(0, size[0]), slice(0, size[1]))

    def crop(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The part of `layer`'s result [..., H, W] that the tile needs: a view, or x itself."""
        crop = self._crops.of(layer)
        return x if crop is None else x[..., crop[0], crop[1]]


def _empty_frames(x: Tensor, num_frames: int) -> Tensor:
    """Memory for some frames like those of x [B, C, T, H, W], channels last."""
    shape = (*x.shape[:2], num_frames, *x.shape[3:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
