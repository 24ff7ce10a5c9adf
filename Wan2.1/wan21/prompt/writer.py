"""What extends a prompt, seen from the phase that does it.

Letters: H, W of a picture.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

MOST_NEW_TOKENS = 512


class ExtensionError(Exception):
    """The prompt could not be extended. The text says why, without any secret.

    Args:
        problem: what happened.
        advice: what the user can do.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.advice = advice


class Writer(Protocol):
    """Writes prompts."""

    def write(self, instruction: str, prompt: str, pictures: Sequence[np.ndarray], seed: int) -> str:
        """The answer, as it came.

        Args:
            instruction: the system message.
            prompt: what the user gave.
            pictures: that are shown to the model, in this order: [H, W, 3], uint8.
            seed: of the model's choices.
        """

    def close(self) -> None:
        """Takes what it holds off the device."""
