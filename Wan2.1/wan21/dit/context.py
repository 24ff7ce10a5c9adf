"""What cross attention reads: the prompt, and perhaps pictures.

Letters: B videos, S prompt tokens, I image tokens, D model width.
"""

from typing import NamedTuple

import torch


class Context(NamedTuple):
    """The prompt and the pictures in the transformer's width.

    text: [B, S, D] in the compute dtype.
    pictures: [B, I, D] likewise, if there are any.
    repeats: how often the last row of the text counts. Upstream pads every prompt to as many tokens and attends to the
        padding, whose rows are all the same; one of them says as much, if it counts as often.
    """

    text: torch.Tensor
    pictures: torch.Tensor | None = None
    repeats: int = 1

    def expand(self, num_videos: int) -> "Context":
        """The same for so many videos, which share it."""
        pictures = None if self.pictures is None else self.pictures.expand(num_videos, -1, -1)
        return self._replace(text=self.text.expand(num_videos, -1, -1), pictures=pictures)
