"""What causal layers remember while a video passes through them chunk by chunk.

Letters: B videos; C channels; T, H, W frames, height and width of the layer at hand.
"""

import torch
from torch import Tensor, nn


class Past:
    """The frames before the chunk at hand, as each causal layer saw them.

    One value belongs to one pass over one video: it is made where the pass begins and handed down, never kept on a
    module, so that it dies with the pass, an out-of-memory error included. With it a layer may be given a video in
    chunks of any length, one frame at a time included, and returns the frames that the whole video would give.

    Memory: after the second chunk, `num_frames` frames of its input for each causal layer; in a pass over a video
    these are the largest tensors that stay (decoding 832 x 480: 3.8 GB in float32).

    Attributes:
        is_first: the chunk at hand is the video's first. It has one frame, which temporal resampling leaves alone.
        is_last: the layers that are called next are called for the last time, so they no longer remember. An image,
            whose only chunk is first and last, needs no past at all.
    """

    def __init__(self) -> None:
        self.is_first = True
        self.is_last = False
        self._frames: dict[nn.Module, Tensor] = {}

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

        Memory: one copy of the result, and [B, C, num_frames, H, W] to remember; the earlier past is gone by then.
        """
        parts = [x]
        if layer in self._frames:
            parts.insert(0, self._frames.pop(layer))
        num_missing = num_frames - sum(part.shape[2] for part in parts[:-1])
        if num_missing and x.shape[2] > 1:
            zeros_shape = (*x.shape[:2], num_missing, *x.shape[3:])
            zeros = torch.empty(zeros_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
            parts.insert(0, zeros.zero_())
        joined = torch.cat(parts, dim=2) if len(parts) > 1 else x  # copies
        parts.clear()
        if not self.is_last:
            self._frames[layer] = joined[:, :, -num_frames:].clone()  # a view would keep all of `joined` alive
        return joined
